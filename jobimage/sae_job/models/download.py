"""Files of an object store, brought into a folder of this machine: in parallel, resumable, each whole or not there."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from sae_job.errors import InvalidInput, Stopped
from sae_job.storage.base import ObjectInfo, ObjectStore, StoreError

THREADS = 8
PART_BYTES = 2**23
_LOCK = ".lock"
# A file that is being fetched, and one byte per part of it that is there.
_UNFINISHED, _PARTS = ".partial", ".parts"


def download_folder(name: str) -> Path:
    """A folder of this user below the temporary one, for downloads that are told apart by `name`; made when missing."""
    root = Path(tempfile.gettempdir()) / f"sae-operator-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    facts = root.lstat()
    # Others may write to the temporary folder, too.
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise InvalidInput("TemporaryFolderTaken", f"{root} is another user's: set TMPDIR to a folder of your own")
    folder = root / name
    folder.mkdir(exist_ok=True)
    return folder


def download(
    store: ObjectStore,
    objects: Sequence[ObjectInfo],
    folder: Path,
    *,
    prefix: str = "",
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Bring objects into `folder` under their keys, less `prefix`; files that are there already are left alone.

    The folder must stand for one version of the objects: a file is taken for done when it has its object's size.
    Several processes may call this at once; one of them works.

    Raises:
        StoreError: the store failed, or an object is shorter than it was said to be; what was fetched stays.
        Stopped: `should_stop` said so.
    """
    with _locked(folder), ThreadPoolExecutor(THREADS, thread_name_prefix="download") as threads:
        for info in objects:
            path = folder / info.key.removeprefix(prefix)
            if path.exists() and path.stat().st_size == info.size:
                continue
            _fetch(store, info, path, threads, should_stop)


def _fetch(
    store: ObjectStore, info: ObjectInfo, path: Path, threads: ThreadPoolExecutor, should_stop: Callable[[], bool]
) -> None:
    unfinished, parts = path.with_name(path.name + _UNFINISHED), path.with_name(path.name + _PARTS)
    count = -(-info.size // PART_BYTES)
    with _opened(unfinished) as data, _opened(parts) as done:
        os.ftruncate(data, info.size)
        os.ftruncate(done, count)
        there = os.pread(done, count, 0)

        def fetch(number: int) -> None:
            if should_stop():
                raise Stopped("stopped while the model's files were fetched; what is here is not fetched again")
            start = number * PART_BYTES
            buffer = memoryview(bytearray(min(PART_BYTES, info.size - start)))
            if store.read_into(info.key, start, buffer) != len(buffer):
                raise StoreError(f"{store.uri}/{info.key}: shorter than the {info.size} bytes that it was listed with")
            written = 0
            while written < len(buffer):
                written += os.pwrite(data, buffer[written:], start + written)
            os.pwrite(done, b"\1", number)

        # The first error ends it; parts that wait are not begun.
        pending = [threads.submit(fetch, number) for number in range(count) if not there[number]]
        try:
            for future in pending:
                future.result()
        finally:
            for future in pending:
                future.cancel()
            for future in pending:
                if not future.cancelled():
                    future.exception()
    parts.unlink()
    unfinished.rename(path)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with _opened(folder / _LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
