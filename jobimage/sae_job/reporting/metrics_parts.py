"""metrics.jsonl while it grows: parts `metrics/<number of the first line>.jsonl`, one after the other.

An object store cannot append, and writing the whole file anew each time costs the square of its length. So each line is
written once into a part, and once more into metrics.jsonl at the end, when the parts go. Their names sort in the order
of their lines, and a part begins where the one before it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from sae_job.reporting.wandb_rows import Moment

logger = logging.getLogger(__name__)

PREFIX = "metrics/"
_DIGITS = 9
# Seconds between parts: soon at first; later a 120th of the time that has passed, so that a run of a week has some
# thousand parts. Checkpoints, every ten minutes unless the job says otherwise, close a part as well.
FIRST_SECONDS, LONGEST_SECONDS, SHARE_OF_RUN = 30.0, 300.0, 120

Line = Mapping[str, Any]


class PartStore(Protocol):
    """Where parts are. Errors are the store's to tell: parts are a convenience that must not stop a training."""

    def starts(self) -> list[int]:
        """Numbers of first lines of the parts that are there."""
        ...

    def put(self, key: str, data: bytes) -> bool:
        """Write a part whole; False when that failed."""
        ...

    def delete(self, key: str) -> None: ...


def part_key(first_line: int) -> str:
    """Key of the part that begins with a line, counted from 0."""
    return f"{PREFIX}{first_line:0{_DIGITS}}.jsonl"


def first_line_of(key: str) -> int | None:
    """The reverse of `part_key`; None for what is no part."""
    name = key.removeprefix(PREFIX).removesuffix(".jsonl")
    return int(name) if name.isdecimal() and key == part_key(int(name)) else None


class MetricsParts:
    """An observer of a training that stores the lines of metrics.jsonl while it runs.

    It is told nothing but when to look: the lines that `started` is given are those of the training, and grow. An
    attempt that goes on from a checkpoint first makes the parts hold exactly the checkpoint's lines.

    Args:
        store: where parts go; called in a thread of its own, one call at a time.
        encode: the lines as metrics.jsonl has them.
        now: seconds.
    """

    def __init__(self, store: PartStore, encode: Callable[[Sequence[Line]], bytes], now: Callable[[], float]) -> None:
        self._store = store
        self._encode = encode
        self._now = now
        self._begun = self._last = now()
        self._first = 0
        self._lines: Sequence[Line] = ()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        self._writing: tuple[Future[bool], int] | None = None

    def started(self, moment: Moment, lines: Sequence[Line]) -> None:
        starts = self._store.starts()
        for start in starts:
            if start >= len(lines):
                self._store.delete(part_key(start))
        # The last part may lack lines, or have more than the checkpoint.
        self._first = max((start for start in starts if start < len(lines)), default=0)
        self._lines = lines
        self._submit()

    def logged(self, sae: str, moment: Moment, figures: Mapping[str, Any]) -> None:
        self._submit_if_due()

    def evaluated(self, sae: str, moment: Moment, figures: Mapping[str, Any], inference: object) -> None:
        self._submit_if_due()

    def window(self, sae: str, moment: Moment, window: object) -> None:
        self._submit_if_due()

    def phase(self, sae: str, moment: Moment, phase: str, message: str) -> None:
        self._submit_if_due()

    def checkpointed(self, moment: Moment, saes: object) -> None:
        self._submit()

    def finished(self) -> None:
        """metrics.jsonl itself follows."""

    def close(self) -> None:
        """Store what is left, of a training that did not come to its end."""
        self._wait()
        self._submit()
        self._wait()
        self._pool.shutdown()

    def remove(self) -> None:
        """Remove the parts, once metrics.jsonl is stored."""
        self._wait()
        self._pool.shutdown()
        for start in self._store.starts():
            self._store.delete(part_key(start))

    def _submit_if_due(self) -> None:
        now = self._now()
        if now - self._last >= min(max(FIRST_SECONDS, (now - self._begun) / SHARE_OF_RUN), LONGEST_SECONDS):
            self._submit()

    def _submit(self) -> None:
        """Begin to write a part of the lines that no part has, unless one is being written."""
        if self._writing is not None and not self._writing[0].done():
            return
        self._settle()
        self._last = self._now()
        if lines := self._lines[self._first :]:
            future = self._pool.submit(self._store.put, part_key(self._first), self._encode(lines))
            self._writing = future, len(lines)

    def _settle(self) -> None:
        """Count the lines of a part that is stored; those of one that failed are written with the next."""
        if self._writing is None:
            return
        future, count = self._writing
        self._writing = None
        if future.result():
            self._first += count

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing[0].exception()
        self._settle()
