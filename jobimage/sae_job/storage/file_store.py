"""Objects as files below a folder: `file://`."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from sae_job.errors import InvalidInput
from sae_job.storage.base import NoSpaceLeft, ObjectInfo, ObjectNotFound, PreconditionFailed, StoreError

# One unfinished file per key: a writer that died leaves at most this behind, and the next writer of the key reuses it.
PARTIAL_SUFFIX = ".partial"
COPY_BYTES = 2**22
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


def path_of_file_uri(uri: str) -> Path:
    """The folder of a `file://` URI; a relative path is relative to the working directory, `file:///` begins an
    absolute one."""
    return Path(uri.removeprefix("file://"))


class FileStore:
    """A folder as an object store.

    A write goes to a hidden file beside its target, is flushed to disk, and is renamed (or, when it must not replace
    anything, linked) into place: a reader sees the whole object or none, also after a crash. Writers of one key take
    turns by a lock on the hidden file, so that `if_match` holds between processes on one machine; `if_absent` holds
    wherever hard links do.

    Args:
        root: the folder; made at the first write.
        uri: what to call it in messages; `file://` and the folder when empty.
    """

    def __init__(self, root: Path, uri: str = "") -> None:
        self._root = root
        self._uri = (uri or f"file://{root}").rstrip("/")
        # Made absolute now: a later change of the working directory must not move the store.
        self._absolute = os.path.realpath(root)

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def root(self) -> Path:
        """The folder, as an absolute path."""
        return Path(self._absolute)

    def get(self, key: str) -> bytes:
        with self._reading(key) as descriptor:
            size = os.fstat(descriptor).st_size
            data = bytearray(size)
            return bytes(memoryview(data)[: _fill(descriptor, 0, memoryview(data))])

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._reading(key) as descriptor:
            left = max(min(length, os.fstat(descriptor).st_size - start), 0)
            data = bytearray(left)
            return bytes(memoryview(data)[: _fill(descriptor, start, memoryview(data))])

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        with self._reading(key) as descriptor:
            return _fill(descriptor, start, buffer)

    def map(self, key: str, start: int, length: int) -> memoryview:
        with self._reading(key) as descriptor:
            length = max(min(length, os.fstat(descriptor).st_size - start), 0)
            if length == 0:
                return memoryview(b"")
            before = start % mmap.ALLOCATIONGRANULARITY
            # Private and writable, although nobody writes: torch warns of memory that it must not write to.
            mapped = mmap.mmap(descriptor, before + length, access=mmap.ACCESS_COPY, offset=start - before)
            return memoryview(mapped)[before:]

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        try:
            facts = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._error(error, key) from error
        return None if os.path.isdir(path) else _info(key, facts)

    def put(
        self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False, if_match: str | None = None
    ) -> ObjectInfo:
        view = memoryview(data).cast("B")
        with self._writing(key, len(view)) as partial:
            _write(partial.descriptor, view)
            return self._publish(partial, key, if_absent=if_absent, if_match=if_match)

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        with open(path, "rb", buffering=0) as source, self._writing(key, os.path.getsize(path)) as partial:
            buffer = memoryview(bytearray(COPY_BYTES))
            while count := source.readinto(buffer):
                _write(partial.descriptor, buffer[:count])
            return self._publish(partial, key, if_absent=False, if_match=None)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        if not os.path.isdir(self._absolute):
            return
        yield from self._walk("", prefix)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        except OSError as error:
            raise self._error(error, key) from error
        # An object store has no folders: do not leave empty ones behind.
        for parent in Path(path).parents:
            if str(parent) == self._absolute:
                break
            try:
                os.rmdir(parent)
            except OSError:
                break

    def _path(self, key: str) -> str:
        """Where the object's file lies; a key or a symbolic link that leads out of the folder is refused."""
        parts = key.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\0" in key:
            raise StoreError(f"{self._uri}: {key!r} is not a key")
        path = os.path.join(self._absolute, *parts)
        if not self._inside(path):
            raise StoreError(f"{self._uri}/{key}: a symbolic link leads out of the store")
        return path

    def _inside(self, path: str) -> bool:
        return os.path.realpath(path).startswith(self._absolute.rstrip("/") + "/")

    def _walk(self, folder: str, prefix: str) -> Iterator[ObjectInfo]:
        try:
            entries = list(os.scandir(os.path.join(self._absolute, folder)))
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._error(error, folder) from error
        # A folder sorts by its name with the slash, so that keys come in the order of their characters.
        named = sorted(
            (f"{folder}{entry.name}" + ("/" if entry.is_dir(follow_symlinks=False) else ""), entry) for entry in entries
        )
        for key, entry in named:
            if key.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(key, prefix)
            elif key.startswith(prefix) and not _is_partial(entry.name) and self._inside(entry.path):
                try:
                    facts = entry.stat()
                except FileNotFoundError:
                    continue
                if entry.is_file():
                    yield _info(key, facts)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[int]:
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ObjectNotFound(f"{self._uri}/{key}: no such object") from error
        except OSError as error:
            raise self._error(error, key) from error
        try:
            yield descriptor
        except IsADirectoryError as error:
            raise ObjectNotFound(f"{self._uri}/{key}: no such object") from error
        except OSError as error:
            raise self._error(error, key) from error
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _writing(self, key: str, size: int) -> Iterator[_Partial]:
        path = self._path(key)
        try:
            partial = _open_partial(path)
        except OSError as error:
            raise self._error(error, key, size) from error
        try:
            yield partial
        except OSError as error:
            raise self._error(error, key, size) from error
        finally:
            partial.discard()

    def _publish(self, partial: _Partial, key: str, *, if_absent: bool, if_match: str | None) -> ObjectInfo:
        # The file system's own clock ticks in milliseconds, in which a file can be replaced more than once.
        now = time.time_ns()
        os.utime(partial.descriptor, ns=(now, now))
        os.fsync(partial.descriptor)
        if if_match is not None:
            there = self.head(key)
            if there is None or there.etag != if_match:
                raise PreconditionFailed(f"{self._uri}/{key}: another version is there than expected")
        if if_absent:
            self._link(partial, key)
        else:
            os.rename(partial.path, partial.target)
        _sync_folder(os.path.dirname(partial.target))
        return _info(key, os.fstat(partial.descriptor))

    def _link(self, partial: _Partial, key: str) -> None:
        taken = PreconditionFailed(f"{self._uri}/{key}: an object is there already")
        try:
            os.link(partial.path, partial.target)
        except FileExistsError as error:
            raise taken from error
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            # A file system without hard links: the lock still keeps the writers of this machine apart.
            if os.path.lexists(partial.target):
                raise taken from error
            os.rename(partial.path, partial.target)

    def _error(self, error: OSError, key: str, size: int = 0) -> Exception:
        where = f"{self._uri}/{key}".rstrip("/")
        if error.errno in NO_SPACE:
            return NoSpaceLeft(f"{where}: no space left for {size} bytes; free some space, or choose a larger place")
        if error.errno in NO_PERMISSION:
            return InvalidInput("AccessDenied", f"{where}: {os.strerror(error.errno or 0)} for user {os.getuid()}")
        return StoreError(f"{where}: {error.strerror or error}")


class _Partial:
    """The hidden, locked file that becomes an object."""

    def __init__(self, descriptor: int, path: str, target: str) -> None:
        self.descriptor = descriptor
        self.path = path
        self.target = target

    def discard(self) -> None:
        """Remove the hidden file, unless it was renamed away, and let the next writer in."""
        if _same_file(self.descriptor, self.path):
            os.unlink(self.path)
        os.close(self.descriptor)


def _open_partial(target: str) -> _Partial:
    """An empty file beside `target` that no other writer holds."""
    folder, name = os.path.split(target)
    path = os.path.join(folder, f".{name}{PARTIAL_SUFFIX}")
    while True:
        os.makedirs(folder, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            # Another process removed the folder, empty, in between.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The writer before us may have renamed or removed the file while we waited for the lock.
            if _same_file(descriptor, path):
                if os.fstat(descriptor).st_nlink == 1:
                    os.ftruncate(descriptor, 0)
                    return _Partial(descriptor, path, target)
                # Its writer died between linking it into place and removing the hidden name: the object must stay as
                # it is.
                os.unlink(path)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _same_file(descriptor: int, path: str) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(PARTIAL_SUFFIX)


def _info(key: str, facts: os.stat_result) -> ObjectInfo:
    # Every write makes a new file, so its number and time tell versions apart without reading it.
    etag = f"{facts.st_ino:x}-{facts.st_mtime_ns:x}-{facts.st_size:x}"
    return ObjectInfo(key, facts.st_size, etag, datetime.fromtimestamp(facts.st_mtime, UTC))


def _fill(descriptor: int, start: int, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if count == 0:
            break
        done += count
    return done


def _write(descriptor: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done:])


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
