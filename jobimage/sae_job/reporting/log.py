"""Logs of a step: to standard error for people, and the tail kept for the store."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from sae_operator.api.redaction import redact

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# Enough for what led to an end, small enough to hold in memory.
TAIL_LINES = 10_000
# What `log.txt` holds of all attempts together: some tails, and still quick to open.
STORED_BYTES = 4 * 2**20
NEXT_ATTEMPT = "--- the next attempt ---\n"


class Lines(logging.Formatter):
    """Lines without credentials: errors of libraries hold addresses with their users, and signed ones."""

    def __init__(self) -> None:
        super().__init__(FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class LogTail(logging.Handler):
    """Keeps the last lines of the log, for `log.txt` beside the results."""

    def __init__(self, lines: int = TAIL_LINES) -> None:
        super().__init__()
        self.setFormatter(Lines())
        self._lines: deque[str] = deque(maxlen=lines)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)


def with_earlier_attempts(earlier: bytes, text: str, *, limit: int = STORED_BYTES) -> bytes:
    """The log of an attempt behind those of the attempts before it; of what is too long whole lines go from the front.

    Args:
        earlier: what `log.txt` held, empty for the first attempt.
        text: the log of this attempt.
        limit: most bytes to keep.
    """
    content = earlier + (NEXT_ATTEMPT if earlier else "").encode() + text.encode()
    if len(content) <= limit:
        return content
    cut = content[len(content) - limit :]
    # The first line is whole only where the cut fell between two.
    return cut if content[-limit - 1 : -limit] == b"\n" else cut.partition(b"\n")[2]


@contextmanager
def kept_log(logger: str = "sae_job") -> Iterator[LogTail]:
    """Keep what a logger and those below it tell from INFO on while the block runs, whatever else is shown of it."""
    tail = LogTail()
    source = logging.getLogger(logger)
    before = source.level
    source.setLevel(logging.INFO)
    source.addHandler(tail)
    try:
        yield tail
    finally:
        source.removeHandler(tail)
        source.setLevel(before)


def set_up_logging(level: int = logging.INFO) -> LogTail:
    """Log to standard error and into the returned tail."""
    tail = LogTail()
    root = logging.getLogger()
    root.setLevel(level)
    stream = logging.StreamHandler()
    stream.setFormatter(Lines())
    root.handlers[:] = [stream, tail]
    # These tell every HTTP request at INFO.
    for noisy in ("httpx", "botocore", "boto3", "urllib3", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return tail
