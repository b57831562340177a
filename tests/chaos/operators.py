"""The real operator on the cluster in memory: only the watches and the session to the API server are replaced.

A watch brings the events of one plural in order, a moment late. When its connection is lost it starts again after a
while, either where it was, or (what it missed has expired) with a new list, whose objects have no event type and which
tells nothing of what has vanished.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextvars import Context, ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from pydantic_core import from_json, to_json

from sae_operator.controller.app import Nature, Operator, Options
from sae_operator.controller.queue import Key
from sae_operator.reconcile.names import LABEL_MANAGED_BY, MANAGED_BY
from tests.chaos.api_server import KIND_OF, OURS, ApiServer, Write, matches
from tests.chaos.simulated_time import SimulatedLoop
from tests.chaos.transport import Gateway, SimulatedClient, share

NAMESPACE = "lab"
LATEST_SECONDS = 0.3
LONGEST_BACKOFF_SECONDS = 30.0
# Kinds that the operator watches without kopf.
MANY = ("jobs", "saetrainingjobs")
SELECTORS = {
    "jobs": f"{LABEL_MANAGED_BY}={MANAGED_BY}",
    "leases": "app.kubernetes.io/name=sae-operator",
}


class SimulatedOperator(Operator):
    """One process of the operator, from its start to its death."""

    def __init__(
        self, loop: SimulatedLoop, gateway: Gateway, nature: Nature, *, number: int, poll_seconds: float = 5.0
    ) -> None:
        options = Options("sae-job:test", namespace=None, lease_namespace=NAMESPACE, poll_seconds=poll_seconds)
        super().__init__(options, client=SimulatedClient(gateway, nature.clock, nature.uniform), nature=nature)
        self.gateway = gateway
        self.number = number
        self._loop = loop
        self._watches = {
            plural: _Watch(self, loop, gateway, plural, self._take(plural))
            for plural in (*sorted(OURS), "jobs", "leases")
        }

    def look_at(self, keys: Iterable[Key]) -> None:
        # Sets have another order in each process: a life must replay.
        super().look_at(sorted(keys))

    async def watch(self) -> None:
        await self._watch(plural for plural in self._watches if plural not in MANY)

    async def watch_many(self) -> None:
        await self._watch(MANY)

    async def _watch(self, plurals: Iterable[str]) -> None:
        async with asyncio.TaskGroup() as group:
            for plural in plurals:
                group.create_task(self._watches[plural].run())

    def lose_watches(self, *, expired: bool) -> None:
        """All connections of watches break; with `expired` what they miss until they are back is never told."""
        for watch in self._watches.values():
            watch.lose(expired=expired)

    def _take(self, plural: str) -> Callable[[dict[str, Any]], None]:
        if plural == "jobs":
            return self.job_event
        if plural == "leases":
            return self.lease_event
        kind = KIND_OF[plural]
        return lambda event: self.resource_event(kind, event)


@dataclass
class _Watch:
    """The watch of one plural."""

    operator: SimulatedOperator
    loop: SimulatedLoop
    gateway: Gateway
    plural: str
    deliver: Callable[[dict[str, Any]], None]

    def __post_init__(self) -> None:
        self._events: asyncio.Queue[tuple[float, str | None, bytes] | None] = asyncio.Queue()
        self._connected = False
        self._expired = True
        self._missed: list[Write] = []
        self._delivered_at = 0.0
        self._lost = 0

    @property
    def server(self) -> ApiServer:
        return self.gateway.server

    def lose(self, *, expired: bool) -> None:
        if self._connected:
            self._connected = False
            self._expired = expired
            self._lost += 1
            self._events.put_nowait(None)

    async def run(self) -> None:
        self.server.listeners.append(self._wrote)
        try:
            while True:
                await self._connect()
                while (event := await self._events.get()) is not None:
                    at, kind, payload = event
                    await asyncio.sleep(max(at - self.loop.time(), 0.0))
                    self.deliver({"type": kind, "object": from_json(payload)})
        finally:
            self.server.listeners.remove(self._wrote)

    async def _connect(self) -> None:
        delay = 1.0
        while True:
            chance = share(self.gateway.seed, "watch", self.plural, self._lost, delay)
            if self._lost or delay > 1:
                await asyncio.sleep(delay * (0.5 + chance / 2))
            if self.gateway.available():
                break
            delay = min(2 * delay, LONGEST_BACKOFF_SECONDS)
        self._connected = True
        missed, self._missed = self._missed, []
        if not self._expired:
            for write in missed:
                self._tell(write.type, write.object)
            return
        for found in self.server.all(self.plural):
            self._tell(None, found)

    def _wrote(self, write: Write) -> None:
        if write.plural != self.plural:
            return
        if self._connected:
            self._tell(write.type, write.object)
        elif not self._expired:
            self._missed.append(write)

    def _tell(self, kind: str | None, found: dict[str, Any]) -> None:
        if not matches(found, SELECTORS.get(self.plural), None):
            return
        late = LATEST_SECONDS * share(self.gateway.seed, self.plural, found["metadata"]["resourceVersion"], kind)
        self._delivered_at = max(self._delivered_at, self.loop.time() + late)
        self._events.put_nowait((self._delivered_at, kind, to_json(found)))


class Processes:
    """Which tasks belong to which operator, so that one can be ended in a moment, as SIGKILL does: nothing of it that
    would finish first does."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop
        self._number: ContextVar[int | None] = ContextVar("number", default=None)
        self._tasks: dict[int, WeakSet[asyncio.Task[Any]]] = {}
        loop.set_task_factory(self._make)

    def start(self, number: int, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Runs `work` as operator `number`; all tasks that follow from it belong to it."""
        token = self._number.set(number)
        try:
            return self._loop.create_task(work())
        finally:
            self._number.reset(token)

    def kill(self, number: int) -> None:
        """Ends all tasks of an operator, in no time."""
        tasks = self._tasks.pop(number, WeakSet[asyncio.Task[Any]]())
        while any(not task.done() for task in tasks):
            for task in list(tasks):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
        for task in list(tasks):
            # Taken notice of: what a process says while it is killed, nobody hears.
            if not task.cancelled():
                task.exception()

    def _make(self, loop: asyncio.AbstractEventLoop, work: Any, context: Context | None = None) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, context=context)
        number = self._number.get() if context is None else context.get(self._number)
        if number is not None:
            self._tasks.setdefault(number, WeakSet()).add(task)
        return task
