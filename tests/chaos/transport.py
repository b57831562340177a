"""The operator's connection to the API server in memory: HTTP in form, with answers that fail, come late or get lost.

The client is the operator's own, from its retries to its circuit breaker; what is replaced is the session below it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp
from pydantic_core import from_json, to_json

from sae_operator.controller.breaker import CircuitBreaker
from sae_operator.controller.client import APPLY_PATCH, ApiClient
from sae_operator.controller.credentials import Credentials
from sae_operator.controller.faults import kind_of
from tests.chaos.api_server import ApiServer, Object, Refusal, served_resources

SERVER = "https://api"
TIMEOUT_SECONDS = 15.0
LATENCY_SECONDS = 0.004
# How a call can go wrong: refused, failed, without an answer in time, or with an answer that never arrives. The last
# letter says whether it was done all the same.
FAULTS = ("409", "429", "500", "500 done", "timeout", "timeout done", "lost", "lost done")

Answer = tuple[int, dict[str, str], bytes]


def share(*parts: object) -> float:
    """A number in [0, 1) that follows from the parts alone, whatever else was drawn before."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


@dataclass
class Gateway:
    """What lies between one operator and the API server.

    Attributes:
        available: the API server answers.
        fault_rate: share of calls that go wrong.
        dies_at: number of calls from now on to the one at which the operator dies (None: at none), before it is sent or
            after it was done.
        died: called then.
        calls: of each kind, with the heartbeat's.
        tell: is told each call and what came of it.
    """

    server: ApiServer
    seed: object
    available: Callable[[], bool]
    fault_rate: Callable[[], float]
    died: Callable[[], None] = lambda: None
    tell: Callable[[str], None] = lambda line: None
    dies_at: int | None = None
    dies_before: bool = False
    dead: bool = False
    calls: Counter[str] = field(default_factory=Counter)

    async def answer(self, method: str, path: str, query: Mapping[str, str], data: bytes | None, kind: str) -> Answer:
        """The answer to a call; raises what aiohttp raises."""
        await self._unless_dead()
        what = kind_of(method, path)
        self.calls[what] += 1
        last = self._counts_down()
        if last and self.dies_before:
            await self._die()
        await asyncio.sleep(LATENCY_SECONDS)
        await self._unless_dead()
        if not self.available():
            await asyncio.sleep(LATENCY_SECONDS)
            raise aiohttp.ClientConnectionError("connection refused")
        fault = self._fault(what, path)
        status, body = (0, {}) if fault and not fault.endswith("done") else self._do(method, path, query, data, kind)
        if (method != "GET" and "/leases/" not in path) or fault:
            self.tell(f"{method} {path} {fault or status}")
        if last:
            await self._die()
        return await self._answered(fault, status, body)

    async def _answered(self, fault: str | None, status: int, body: Object) -> Answer:
        headers: dict[str, str] = {}
        if fault is None:
            await asyncio.sleep(LATENCY_SECONDS)
        else:
            if fault.startswith("timeout"):
                await asyncio.sleep(TIMEOUT_SECONDS)
                raise TimeoutError
            if fault.startswith("lost"):
                raise aiohttp.ServerDisconnectedError
            reason = {"409": "Conflict", "429": "TooManyRequests", "500": "InternalError"}[fault[:3]]
            status, body = int(fault[:3]), Refusal(int(fault[:3]), reason, "it was not the day").body()
            headers = {"Retry-After": "1"} if status == 429 else {}
        await self._unless_dead()
        return status, headers, to_json(body)

    def _fault(self, what: str, path: str) -> str | None:
        rate = self.fault_rate()
        if not rate:
            return None
        drawn = share(self.seed, what, path, self.calls[what])
        if drawn >= rate:
            return None
        fault = FAULTS[int(drawn / rate * len(FAULTS))]
        # Reads meet no conflict.
        return "500" if fault == "409" and what.startswith("GET") else fault

    def _counts_down(self) -> bool:
        if self.dies_at is None:
            return False
        self.dies_at -= 1
        return self.dies_at <= 0

    async def _die(self) -> None:
        self.dead = True
        self.tell("the operator dies")
        self.died()
        await self._unless_dead()

    async def _unless_dead(self) -> None:
        """A process that is dead does nothing more: this call never returns."""
        if self.dead:
            await asyncio.get_running_loop().create_future()

    def _do(
        self, method: str, path: str, query: Mapping[str, str], data: bytes | None, kind: str
    ) -> tuple[int, Object]:
        body: Object = from_json(data) if data else {}
        try:
            return (201 if method == "POST" else 200), self._route(method, path, query, body, kind)
        except Refusal as refusal:
            return refusal.status, refusal.body()

    def _route(self, method: str, path: str, query: Mapping[str, str], body: Object, kind: str) -> Object:
        parts = path.strip("/").split("/")
        below = parts[2:] if parts[0] == "api" else parts[3:]
        if not below:
            return served_resources()
        namespace = below[1] if below[0] == "namespaces" else None
        plural, *rest = below[2:] if namespace else below
        if not rest:
            if method == "GET":
                return self.server.page(plural, namespace, query)
            assert method == "POST"
            assert namespace is not None
            return self.server.create(plural, namespace, body)
        assert namespace is not None
        name, subresource = rest[0], rest[1] if len(rest) > 1 else None
        if method == "GET":
            return self.server.get(plural, namespace, name)
        if method == "DELETE":
            wanted = body.get("preconditions") or {}
            return self.server.delete(
                plural, namespace, name, uid=wanted.get("uid"), propagation=body["propagationPolicy"]
            )
        assert method == "PATCH"
        if kind == APPLY_PATCH:
            return self.server.apply(plural, namespace, name, body, query["fieldManager"])
        return self.server.merge(plural, namespace, name, body, subresource=subresource)


class _Call:
    """`async with session.request(...)`."""

    def __init__(self, answer: Coroutine[Any, Any, Answer]) -> None:
        self._answer = answer
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self._payload = b""

    async def __aenter__(self) -> Self:
        self.status, self.headers, self._payload = await self._answer
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    async def read(self) -> bytes:
        return self._payload


class Session:
    """What the client asks of aiohttp's session."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def request(
        self,
        method: str,
        url: str,
        *,
        params: Mapping[str, str] | None = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> _Call:
        kind = (headers or {}).get("Content-Type", "")
        return _Call(self._gateway.answer(method, url.removeprefix(SERVER), params or {}, data, kind))

    def get(self, url: str) -> _Call:
        """`/readyz`."""
        return _Call(self._ready())

    async def _ready(self) -> Answer:
        await asyncio.sleep(LATENCY_SECONDS)
        if not self._gateway.available():
            raise aiohttp.ClientConnectionError("connection refused")
        return 200, {}, b"ok"


class SimulatedClient(ApiClient):
    """The operator's client on a `Gateway`."""

    def __init__(self, gateway: Gateway, clock: Callable[[], float], uniform: Callable[[float, float], float]) -> None:
        credentials = Credentials(SERVER)
        super().__init__(lambda: credentials, clock=clock)
        self._both: tuple[Any, Credentials] = Session(gateway), credentials
        self.breaker = CircuitBreaker(self._is_back, uniform=uniform)

    async def _current(
        self, *, expired: bool, used: aiohttp.ClientSession | None = None
    ) -> tuple[aiohttp.ClientSession, Credentials]:
        return self._both
