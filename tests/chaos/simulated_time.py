"""An event loop whose clock jumps to the next timer: hours of an operator's life pass in a moment, always alike."""

from __future__ import annotations

import asyncio
import selectors
from datetime import UTC, datetime, timedelta
from typing import Any

BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)


class Deadlock(RuntimeError):
    """Nothing is ready and no timer runs: time would stand still for ever."""


class _Timers(selectors.SelectSelector):
    """Waits for no file: a wait ends at once, and only the clock moves."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Deadlock("everything waits and no timer runs")
        self.now += max(timeout, 0.0)
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Runs coroutines and timers as any loop does; `time` is simulated."""

    def __init__(self) -> None:
        self._timers = _Timers()
        super().__init__(self._timers)

    def time(self) -> float:
        return self._timers.now

    def today(self) -> datetime:
        """The time of day."""
        return BEGINNING + timedelta(seconds=self._timers.now)


def rfc3339(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
