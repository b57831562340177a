"""Faults of a process and of its store, at any chosen store call: what a test does to prove that nothing is lost.

calls = count_calls(work)                                  # work(plan) opens its stores through `plan.wrap`
for n in range(1, calls + 1):
    assert run_in_child(lambda: work(FaultPlan(at=n, action=kill))) == KILLED
    ... run `work` to its end, and compare with an undisturbed run
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from sae_job.storage.base import ObjectInfo, ObjectStore, StoreError

# What a shell tells of a process that SIGKILL ended.
KILLED = 137


def kill() -> None:
    """End the process at once, as SIGKILL does: no handler, no clean-up, no flush."""
    os._exit(KILLED)


def terminate() -> None:
    """Ask the own process to stop, as the kubelet does."""
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    """A store that cannot be reached."""
    raise StoreError("the store cannot be reached")


class FaultPlan:
    """Counts the calls of all stores that it wraps, and does something at one of them.

    Args:
        at: number of the call, from 1, or how its name begins (`put shards/000001`: the first such call); None only
            counts.
        action: what happens there.
        when: before the call takes effect, or after.
    """

    def __init__(
        self,
        at: int | str | None = None,
        action: Callable[[], None] = kill,
        when: Literal["before", "after"] = "before",
    ) -> None:
        self._at = at
        self._action = action
        self._when = when
        self._lock = threading.Lock()
        self.names: list[str] = []

    @property
    def calls(self) -> int:
        return len(self.names)

    def wrap(self, store: ObjectStore) -> FaultyStore:
        return FaultyStore(store, self)

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Around one call."""
        with self._lock:
            self.names.append(name)
            mine = self._at == len(self.names)
            if isinstance(self._at, str) and name.startswith(self._at):
                mine, self._at = True, None
        if mine and self._when == "before":
            self._action()
        try:
            yield
        finally:
            if mine and self._when == "after":
                self._action()


class FaultyStore:
    """A store whose calls a `FaultPlan` counts and disturbs."""

    def __init__(self, store: ObjectStore, plan: FaultPlan) -> None:
        self._store = store
        self._plan = plan

    @property
    def uri(self) -> str:
        return self._store.uri

    def get(self, key: str) -> bytes:
        with self._plan.call(f"get {key}"):
            return self._store.get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._plan.call(f"get_range {key}"):
            return self._store.get_range(key, start, length)

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        with self._plan.call(f"read_into {key}"):
            return self._store.read_into(key, start, buffer)

    def head(self, key: str) -> ObjectInfo | None:
        with self._plan.call(f"head {key}"):
            return self._store.head(key)

    def put(
        self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False, if_match: str | None = None
    ) -> ObjectInfo:
        with self._plan.call(f"put {key}"):
            return self._store.put(key, data, if_absent=if_absent, if_match=if_match)

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        with self._plan.call(f"put_file {key}"):
            return self._store.put_file(key, path)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._plan.call(f"list {prefix}"):
            yield from self._store.list(prefix)

    def delete(self, key: str) -> None:
        with self._plan.call(f"delete {key}"):
            self._store.delete(key)


def count_calls(work: Callable[[FaultPlan], object]) -> int:
    """How many store calls an undisturbed run of `work` makes, in this process."""
    plan = FaultPlan()
    work(plan)
    return plan.calls


def run_in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child, which has all imports already; returns its exit code (128 + n for signal n).

    The child ends with what `work` returns when that is an int, with 0 otherwise, and with 1, after a traceback on
    stderr, when it raises.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            result = work()
            code = result if isinstance(result, int) else 0
        except BaseException:  # noqa: BLE001 - the end of a process, told by its exit code
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def folder_bytes(root: Path) -> dict[str, bytes]:
    """Contents of all files below a folder, by their relative path; hidden unfinished files too."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
