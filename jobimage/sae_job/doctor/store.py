"""What caches, checkpoints and results rely on in an object store, tried out on one.

Everything is written below a folder of its own, and removed at the end.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from sae_job.doctor.findings import Finding
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore, PreconditionFailed, StoreError
from sae_job.storage.folder import StoreFolder

FOLDER = "sae-job-doctor"
RACERS = 8
SMALL_BYTES = 4096
# Servers refuse requests whose signature is a quarter of an hour off; ages of objects are told wrongly before that.
MOST_SKEW_SECONDS = 60.0
_BLOCK = bytes(range(256)) * 4096


class _Broken(Exception):
    """The store does not keep a promise: what it did, and the fix."""

    def __init__(self, told: str, fix: str) -> None:
        super().__init__(told)
        self.told, self.fix = told, fix


class StoreCheck:
    """Checks of one store.

    Args:
        store: the store.
        token: name of the folder to write to; another one for each run.
        large_bytes: size of the large object; one above the store's limit is sent in parts.
        now: the time, by this machine's clock.
        timer: seconds, to tell rates.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        token: str,
        large_bytes: int,
        now: Callable[[], datetime],
        timer: Callable[[], float],
    ) -> None:
        self._root = store
        self._store = StoreFolder(store, f"{FOLDER}/{token}")
        self._large_bytes = large_bytes
        self._now = now
        self._timer = timer
        self._written = False

    def findings(self) -> Iterator[Finding]:
        """Try everything; a store that cannot be reached at all is told once."""
        checks: dict[str, Callable[[], str]] = {
            "write and read": self._write_and_read,
            "clocks": self._clocks,
            "ranges": self._ranges,
            "create if absent": self._create_if_absent,
            f"{RACERS} racers for one object": self._race,
            "replace one version alone": self._replace_one_version,
            "list after write": self._list_after_write,
            f"{self._large_bytes / 2**20:.0f} MiB in one object": self._large_object,
            "delete": self._delete,
        }
        left: Finding | None = None
        try:
            for name, check in checks.items():
                yield self._try(f"store, {name}", check)
                if not self._written:
                    return
        finally:
            if self._written:
                left = self._remove_all()
        if left is not None:
            yield left

    def _try(self, name: str, check: Callable[[], str]) -> Finding:
        try:
            return Finding(name, check())
        except _Broken as broken:
            return Finding(name, broken.told, broken.fix)
        except (StoreError, InvalidInput) as error:
            return Finding(name, str(error), "then run this again")

    def _remove_all(self) -> Finding | None:
        try:
            for info in list(self._store.list()):
                self._store.delete(info.key)
        except (StoreError, InvalidInput) as error:
            return Finding("store, clean up", str(error), f"remove {self._store.uri} by hand")
        return None

    # The promises

    def _write_and_read(self) -> str:
        data = _BLOCK[:SMALL_BYTES]
        self._store.put("object", data)
        self._written = True
        _expect(self._store.get("object") == data, "an object is read otherwise than it was written", _OTHER_SERVER)
        head = self._store.head("object")
        _expect(head is not None, "an object that was just written is not found", _CONSISTENT)
        _expect(head is not None and head.size == len(data), "the size of an object is told wrongly", _OTHER_SERVER)
        self._store.put("object", data[::-1])
        _expect(self._store.get("object") == data[::-1], "the old bytes are read after an overwrite", _CONSISTENT)
        return self._root.uri

    def _clocks(self) -> str:
        before = self._now()
        self._store.put("clock", b"now")
        after = self._now()
        head = self._store.head("clock")
        if head is None or head.modified is None:
            return "the store does not tell when an object was written"
        written = head.modified.astimezone(UTC)
        # Stores tell whole seconds.
        skew = max((before - written).total_seconds() - 1, (written - after).total_seconds(), 0.0)
        _expect(
            skew <= MOST_SKEW_SECONDS,
            f"this machine's clock and the store's are {skew:.0f} s apart",
            "set both by NTP: signatures are refused from 15 minutes on, and ages of objects are wrong",
        )
        return "this machine's and the store's agree" if skew < 2 else f"{skew:.0f} s apart"

    def _ranges(self) -> str:
        data = _BLOCK[:SMALL_BYTES]
        self._store.put("ranges", data)
        found = self._store.get_range("ranges", 1000, 100)
        _expect(found == data[1000:1100], "a range holds other bytes than the object", _RANGES)
        found = self._store.get_range("ranges", len(data) - 10, 100)
        _expect(found == data[-10:], "a range over the object's end is not cut there", _RANGES)
        found = self._store.get_range("ranges", len(data) + 10, 100)
        _expect(found == b"", "a range past the object's end is not refused (416)", _RANGES)
        return "inside, over the end, and past it"

    def _create_if_absent(self) -> str:
        self._store.put("marker", b"first", if_absent=True)
        try:
            self._store.put("marker", b"second", if_absent=True)
        except PreconditionFailed:
            _expect(self._store.get("marker") == b"first", "a refused write changed the object", _CONDITIONS)
            return "refused when there is one"
        raise _Broken("If-None-Match is ignored: the second writer replaced the first one's object", _CONDITIONS)

    def _race(self) -> str:
        together = threading.Barrier(RACERS)

        def run(number: int) -> bytes | None:
            mine = f"racer {number}".encode()
            together.wait()
            try:
                self._store.put("race", mine, if_absent=True)
            except PreconditionFailed:
                return None
            return mine

        with ThreadPoolExecutor(RACERS, thread_name_prefix="racer") as threads:
            winners = [mine for mine in threads.map(run, range(RACERS)) if mine is not None]
        _expect(len(winners) == 1, f"{len(winners)} of {RACERS} were told that they created it", _CONDITIONS)
        _expect(self._store.get("race") == winners[0], "the object is not the winner's", _CONDITIONS)
        return "one winner"

    def _replace_one_version(self) -> str:
        first = self._store.put("version", b"first")
        second = self._store.put("version", b"second", if_match=first.etag)
        try:
            self._store.put("version", b"third", if_match=first.etag)
        except PreconditionFailed:
            _expect(self._store.get("version") == b"second", "a refused write changed the object", _CONDITIONS)
            _expect(second.etag != first.etag, "two versions have one etag", _CONDITIONS)
            return "refused over another one"
        raise _Broken("If-Match is ignored: a writer replaced a version that it had not read", _CONDITIONS)

    def _list_after_write(self) -> str:
        keys = [f"list/{number:02d}" for number in range(12)]
        for key in reversed(keys):
            self._store.put(key, key.encode())
        found = [(info.key, info.size) for info in self._store.list("list/")]
        _expect(
            sorted(found) == [(key, len(key)) for key in keys],
            f"{len(found)} of {len(keys)} objects are listed, or with wrong sizes, right after they were written",
            _CONSISTENT,
        )
        _expect(found == sorted(found), "objects are not listed in the order of their keys", _OTHER_SERVER)
        self._store.delete(keys[0])
        left = [info.key for info in self._store.list("list/")]
        _expect(keys[0] not in left, "an object is listed after it was deleted", _CONSISTENT)
        return f"{len(keys)} objects, in order"

    def _large_object(self) -> str:
        repeats = -(-self._large_bytes // len(_BLOCK))
        data = (_BLOCK * repeats)[: self._large_bytes]
        wanted = hashlib.sha256(data).digest()
        started = self._timer()
        self._store.put("large", data)
        written = self._timer()
        del data
        buffer = memoryview(bytearray(self._large_bytes))
        count = self._store.read_into("large", 0, buffer)
        read = self._timer()
        whole = count == self._large_bytes and hashlib.sha256(buffer).digest() == wanted
        _expect(whole, "a large object is read otherwise than it was written", _OTHER_SERVER)
        mebibytes = self._large_bytes / 2**20
        up, down = (mebibytes / max(seconds, 1e-9) for seconds in (written - started, read - written))
        return f"written at {up:.0f} MiB/s, read at {down:.0f} MiB/s"

    def _delete(self) -> str:
        self._store.put("gone", b"soon")
        self._store.delete("gone")
        _expect(self._store.head("gone") is None, "a deleted object is still there", _CONSISTENT)
        try:
            self._store.get("gone")
        except ObjectNotFound:
            self._store.delete("gone")
            return "gone at once; deleting what is not there is no error"
        raise _Broken("a deleted object can still be read", _CONSISTENT)


_OTHER_SERVER = "use another server, or take what stands between it and the pods away: data would be wrong"
_CONSISTENT = "use a store with strong consistency, without a cache in front: steps would miss each other's objects"
_RANGES = "use a server that keeps to HTTP ranges, or take the proxy between away: activations are read by ranges"
_CONDITIONS = (
    "use a server with atomic conditional writes (If-None-Match, If-Match), or a newer version of it: two runs could "
    "write one cache"
)


def _expect(kept: bool, told: str, fix: str) -> None:
    if not kept:
        raise _Broken(told, fix)
