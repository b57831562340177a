"""The files that a run of Weights & Biases leaves on disk, as far as they must be stored and read again.

`run-<id>.wandb` is a log in the format of LevelDB after a header of 7 bytes: blocks of 32 KiB with records, each with a
checksum, a length and a kind (whole, first, middle, last), that hold messages of W&B's protocol.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

_MAGIC, _HEADER_BYTES, _BLOCK_BYTES = b":W&B", 7, 2**15
_RECORD = struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_TIME_IN_NAME = "%Y%m%d_%H%M%S"


def messages(data: bytes) -> Iterator[bytes]:
    """The messages of a file, until its end or until a record that was not written whole.

    Raises:
        ValueError: it is no file of a run.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        raise ValueError("the file does not begin as a run of Weights & Biases does")
    offset, parts = _HEADER_BYTES, []
    while True:
        left = _BLOCK_BYTES - offset % _BLOCK_BYTES
        if left < _RECORD.size:
            offset += left
            continue
        if offset + _RECORD.size > len(data):
            return
        _, length, kind = _RECORD.unpack_from(data, offset)
        offset += _RECORD.size
        if offset + length > len(data) or kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST):
            return
        parts.append(data[offset : offset + length])
        offset += length
        if kind in (_WHOLE, _LAST):
            yield b"".join(parts)
            parts = []


def history(data: bytes) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a run: step, and key -> value as JSON; of a nested key the parts are joined by dots."""
    from wandb.proto import wandb_internal_pb2 as protocol

    record_type: Any = protocol.Record  # pyright: ignore[reportAttributeAccessIssue]
    for message in messages(data):
        record = record_type.FromString(message)
        if record.WhichOneof("record_type") == "history":
            items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            yield record.history.step.num, items


def last_step(data: bytes) -> int:
    """The highest step of a run; -1 when it has no row."""
    return max((step for step, _ in history(data)), default=-1)


def run_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files of a run's folder that `wandb sync` needs, by their names in it; the log first."""
    logs = sorted(folder.glob("run-*.wandb"))
    others = sorted(path for path in (folder / "files").rglob("*") if path.is_file())
    for path in (*logs, *others):
        yield path.relative_to(folder).as_posix(), path


def name_after(name: str, taken: Collection[str]) -> str:
    """The name of a run's folder, `offline-run-<date>_<time>-<id>`, or one some seconds later that is not taken: the
    client counts whole seconds, and attempts may be quicker. Their names sort in their order."""
    while name in taken:
        kind, moment, id = name.rsplit("-", 2)
        later = datetime.strptime(moment, _TIME_IN_NAME) + timedelta(seconds=1)
        name = f"{kind}-{later.strftime(_TIME_IN_NAME)}-{id}"
    return name
