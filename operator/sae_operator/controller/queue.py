"""Work queue by key: one worker at a time for a key, however many events ask for it; it comes back when asked to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from sae_operator.controller import logs

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 60.0


class Key(NamedTuple):
    """One resource."""

    kind: str
    namespace: str
    name: str


class RetryAfter(Exception):
    """Raised by `process`: not now, come back after `seconds`; not counted as a failure."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"again after {seconds} s")
        self.seconds = seconds


class WorkQueue:
    """Runs `process` for keys. `process` returns after how many seconds the key wants to be looked at again, or None.

    An exception of `process` is logged, and the key comes back after a jittered delay that doubles with each failure
    in a row.
    """

    def __init__(
        self,
        process: Callable[[Key], Awaitable[float | None]],
        *,
        workers: int = 16,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._process, self._workers, self._clock, self._uniform = process, workers, clock, uniform
        self._ready: deque[Key] = deque()
        # When a key that waits or is being processed was added first.
        self._added_at: dict[Key, float] = {}
        self._active: set[Key] = set()
        # Keys that were added while they were being processed.
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}
        self._wake = asyncio.Semaphore(0)
        self._finishing = False
        self._finished = asyncio.Event()

    def add(self, key: Key) -> None:
        """Asks for `key` to be processed as soon as possible."""
        self._cancel_timer(key)
        if key in self._active:
            self._again.add(key)
        elif key not in self._added_at:
            self._added_at[key] = self._clock()
            self._ready.append(key)
            self._wake.release()

    def add_after(self, key: Key, seconds: float) -> None:
        """Asks for `key` after `seconds`, unless it is processed earlier."""
        if key in self._added_at and key not in self._active:
            return
        self._cancel_timer(key)
        self._timers[key] = asyncio.get_running_loop().call_later(max(seconds, 0.0), self._timer_fired, key)

    def add_within(self, key: Key, seconds: float) -> None:
        """Asks for `key` after `seconds` at the latest: a look that is due earlier serves, too."""
        if key in self._added_at and key not in self._active:
            return
        timer = self._timers.get(key)
        if timer is None or timer.when() > asyncio.get_running_loop().time() + seconds:
            self.add_after(key, seconds)

    def forget(self, key: Key) -> None:
        """The resource is gone: no timer and no memory of failures remains."""
        self._cancel_timer(key)
        self._failures.pop(key, None)

    def oldest_age(self) -> float:
        """Seconds since the oldest key that waits or is being processed was added; 0 when there is none."""
        return self._clock() - min(self._added_at.values()) if self._added_at else 0.0

    @property
    def pending(self) -> int:
        """Keys that wait or are being processed."""
        return len(self._added_at)

    async def run(self) -> None:
        """Works until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._workers):
                group.create_task(self._work(), name=f"worker {number}")

    async def finish(self, seconds: float) -> None:
        """Begins nothing more, and returns when what is being processed has ended, or after `seconds`."""
        self._finishing = True
        if self._active:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._finished.wait(), seconds)

    async def _work(self) -> None:
        while True:
            await self._wake.acquire()
            if self._finishing:
                return
            key = self._ready.popleft()
            self._active.add(key)
            try:
                with logs.about(*key):
                    after = await self._attempt(key)
            finally:
                self._active.discard(key)
                self._added_at.pop(key, None)
                if self._finishing and not self._active:
                    self._finished.set()
            if key in self._again:
                self._again.discard(key)
                self.add(key)
            elif after is not None:
                # Something may have asked for an earlier look meanwhile.
                self.add_within(key, after)

    async def _attempt(self, key: Key) -> float | None:
        try:
            after = await self._process(key)
        except RetryAfter as retry:
            return retry.seconds
        except Exception:
            failures = self._failures.get(key, 0) + 1
            self._failures[key] = failures
            delay = min(FIRST_BACKOFF_SECONDS * 2 ** (failures - 1), LONGEST_BACKOFF_SECONDS) * self._uniform(0.5, 1.0)
            logger.exception("failed (%d in a row); again in %.1f s", failures, delay)
            # What arrived meanwhile must not shorten the delay, or a failing key would spin.
            self._again.discard(key)
            return delay
        self._failures.pop(key, None)
        return after

    def _timer_fired(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def _cancel_timer(self, key: Key) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
