"""Live progress of a step: one thread-safe place that steps write and the HTTP endpoint, the bars and the log read."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime

from sae_operator.api.steps import Progress, SaeProgress

# The rate is measured over this window: long enough to be steady, short enough to follow a change.
RATE_WINDOW_SECONDS = 30.0


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class ProgressReporter:
    """What a step tells of itself while it works.

    `update` is cheap and may be called at every batch; listeners (progress bars) are called with each new state.
    """

    def __init__(
        self,
        step: str,
        *,
        clock: Callable[[], float] = time.time,
        listeners: tuple[Callable[[Progress], None], ...] = (),
    ) -> None:
        self._clock = clock
        self._listeners = listeners
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, int]] = deque()
        self._state = Progress(step=step, updated_at=rfc3339(clock()))
        self._checkpoint_time: float | None = None

    def update(
        self,
        *,
        tokens: int | None = None,
        total_tokens: int | None = None,
        shards_complete: int | None = None,
        saes: list[SaeProgress] | None = None,
        checkpoint_tokens: int | None = None,
    ) -> None:
        """Set what is given, keep the rest. Tokens include those of earlier attempts; the rate does not."""
        now = self._clock()
        with self._lock:
            changes: dict[str, object] = {"updated_at": rfc3339(now)}
            if tokens is not None:
                changes["tokens"] = tokens
                self._samples.append((now, tokens))
                while len(self._samples) > 2 and now - self._samples[0][0] > RATE_WINDOW_SECONDS:
                    self._samples.popleft()
            if total_tokens is not None:
                changes["total_tokens"] = total_tokens
            if shards_complete is not None:
                changes["shards_complete"] = shards_complete
            if saes is not None:
                changes["saes"] = saes
            if checkpoint_tokens is not None:
                changes["checkpoint_tokens"] = checkpoint_tokens
                changes["checkpoint_time"] = rfc3339(now)
                self._checkpoint_time = now
            state = self._state.model_copy(update=changes)
            rate = self._rate()
            left = state.total_tokens - state.tokens
            state = state.model_copy(
                update={"tokens_per_second": rate, "eta_seconds": left / rate if rate > 0 and left >= 0 else None}
            )
            self._state = state
        for listener in self._listeners:
            listener(state)

    def _rate(self) -> float:
        if len(self._samples) < 2:
            return 0.0
        (start, before), (end, after) = self._samples[0], self._samples[-1]
        return (after - before) / (end - start) if end > start else 0.0

    @property
    def checkpoint_age(self) -> float | None:
        """Seconds since a checkpoint was last told of; None before the first."""
        with self._lock:
            return None if self._checkpoint_time is None else self._clock() - self._checkpoint_time

    @property
    def state(self) -> Progress:
        with self._lock:
            return self._state
