"""Circuit breaker: while the API server is away, nobody hammers it and no key loses its place."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)


class CircuitBreaker:
    """Opens after `threshold` failures in a row; while open, one probe at a time asks whether the server is back.

    Work waits in `wait_closed`. A single failed request is the caller's to retry.
    """

    def __init__(
        self,
        probe: Callable[[], Awaitable[bool]],
        *,
        threshold: int = 3,
        first_delay: float = 0.5,
        longest_delay: float = 15.0,
        uniform: Callable[[float, float], float] = random.uniform,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._probe, self._threshold = probe, threshold
        self._first_delay, self._longest_delay = first_delay, longest_delay
        self._uniform, self._sleep = uniform, sleep
        self._failures = 0
        self._closed = asyncio.Event()
        self._closed.set()
        self._probing: asyncio.Task[None] | None = None
        self.on_close: list[Callable[[], None]] = []

    @property
    def open(self) -> bool:
        """The API server is away."""
        return not self._closed.is_set()

    def success(self) -> None:
        self._failures = 0

    def failure(self) -> None:
        self._failures += 1
        if self._failures >= self._threshold and not self.open:
            logger.warning("The API server is away; work waits until it is back.")
            self._closed.clear()
            self._probing = asyncio.create_task(self._probe_until_back(), name="circuit breaker")

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def _probe_until_back(self) -> None:
        delay = self._first_delay
        while True:
            await self._sleep(delay * self._uniform(0.5, 1.0))
            if await self._probe():
                break
            delay = min(delay * 2, self._longest_delay)
        self._failures = 0
        logger.info("The API server is back.")
        self._closed.set()
        for callback in self.on_close:
            callback()
