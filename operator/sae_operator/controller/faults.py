"""Kills the process at a chosen API call, and lets calls go wrong by chance, so that tests can prove that neither does
harm."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp

logger = logging.getLogger(__name__)

# `POST jobs#2:after` ends the process right after the second Job was answered, `POST jobs#2:before` right before it is
# sent; `never` only tells the calls in the log.
ENV_EXIT_AT_CALL = "SAE_OPERATOR_EXIT_AT_CALL"
EXIT_CODE = 137
# `0.1:7`: a tenth of the calls goes wrong; which ones, and how, follows from the seed 7.
ENV_FAULTS = "SAE_OPERATOR_FAULTS"
# How a call goes wrong. What ends with `done` was carried out all the same.
FAULTS = ("409", "429", "500", "500 done", "timeout", "timeout done", "lost", "lost done")
REASONS = {409: "Conflict", 429: "TooManyRequests", 500: "InternalError"}
# A test does not wait as long as a real time-out takes.
TIMEOUT_SECONDS = 0.5


@dataclass(frozen=True, order=True)
class Call:
    """One API call of a process: the n-th of its kind, from 1.

    Attributes:
        kind: method, resource and subresource, e.g. `PATCH activationcaches/status`.
    """

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}#{self.number}"

    @classmethod
    def parse(cls, text: str) -> Self:
        kind, _, number = text.rpartition("#")
        return cls(kind, int(number))


def kind_of(method: str, path: str) -> str:
    """The kind of a call; paths without a resource are discovery."""
    parts = path.strip("/").split("/")
    below = parts[2 if parts[0] == "api" else 3 :]
    if below[:1] == ["namespaces"] and len(below) > 2:
        below = below[2:]
    return f"{method} {'/'.join((*below[:1], *below[2:])) or 'discovery'}"


def fault_of(call: Call, rate: float, seed: str) -> str | None:
    """How a call goes wrong; None when it does not. Nothing but the call decides, so that a seed replays."""
    digest = hashlib.blake2b(f"{seed}/{call}".encode(), digest_size=8).digest()
    drawn = int.from_bytes(digest) / 2**64
    if drawn >= rate:
        return None
    fault = FAULTS[int(drawn / rate * len(FAULTS))]
    # Reads meet no conflict.
    return "500" if fault == "409" and call.kind.startswith("GET") else fault


class Session(Protocol):
    """What a client asks of aiohttp's session."""

    def request(self, method: str, url: str, **options: Any) -> AbstractAsyncContextManager[Any]: ...


@dataclass
class CallFaults:
    """Counts the API calls of each kind and ends the process, as SIGKILL would, at one of them (None: never).

    Attributes:
        rate: share of the calls that go wrong otherwise.
    """

    at: Call | None
    before: bool
    rate: float = 0.0
    seed: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_environment(cls) -> CallFaults | None:
        """None, at no cost, unless a test asks for it."""
        text, wrong = os.environ.get(ENV_EXIT_AT_CALL), os.environ.get(ENV_FAULTS)
        if not text and not wrong:
            return None
        call, _, moment = (text or "never").partition(":")
        rate, _, seed = (wrong or "0").partition(":")
        at = None if call == "never" else Call.parse(call)
        return cls(at, before=moment == "before", rate=float(rate), seed=seed)

    def sending(self, method: str, path: str) -> Call:
        """Counts a call that is about to be sent, and tells which one it is."""
        kind = kind_of(method, path)
        self.counts[kind] += 1
        call = Call(kind, self.counts[kind])
        logger.info("API call %s: %s", call, path)
        if self.before and call == self.at:
            os._exit(EXIT_CODE)
        return call

    def around(self, session: Session, call: Call) -> Session:
        """The session on which the call is to be made."""
        fault = fault_of(call, self.rate, self.seed) if self.rate else None
        if fault is None:
            return session
        logger.info("API call %s goes wrong: %s", call, fault)
        return _FaultySession(session, fault)

    def answered(self, call: Call) -> None:
        """The call was answered, whatever the answer."""
        if not self.before and call == self.at:
            os._exit(EXIT_CODE)


@dataclass(frozen=True)
class _FaultySession:
    """Makes calls that go wrong."""

    session: Session
    fault: str

    def request(self, method: str, url: str, **options: Any) -> AbstractAsyncContextManager[Any]:
        return _FaultyCall(lambda: self.session.request(method, url, **options), self.fault)


class _FaultyCall:
    """A call and, instead of its response, what went wrong."""

    def __init__(self, call: Callable[[], AbstractAsyncContextManager[Any]], fault: str) -> None:
        self._call = call
        self._fault, _, done = fault.partition(" ")
        self._done = bool(done)
        self.status = int(self._fault) if self._fault.isdecimal() else 0
        self.headers: Mapping[str, str] = {"Retry-After": "1"} if self.status == 429 else {}

    async def __aenter__(self) -> Self:
        if self._done:
            async with self._call() as response:
                await response.read()
        if self._fault == "timeout":
            await asyncio.sleep(TIMEOUT_SECONDS)
            raise TimeoutError
        if self._fault == "lost":
            raise aiohttp.ServerDisconnectedError
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    async def read(self) -> bytes:
        told = {"kind": "Status", "status": "Failure", "code": self.status, "reason": REASONS[self.status]}
        return json.dumps({**told, "message": f"a test lets this call fail with {self.status}"}).encode()
