"""How long a Hub that does not answer is waited for.

Left alone, its libraries wait for some answers without end, and try others again for up to half an hour. A pod that
waits looks alive; one that ends is started again and goes on after the blocks that are stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class HubWaits:
    """
    Attributes:
        answer_seconds: without a byte, when something is read.
        upload_seconds: without a byte, when something is written.
        trouble_seconds: without any good answer of a server, however often it is asked; then it is asked no more.
    """

    answer_seconds: float = 10
    upload_seconds: float = 60
    trouble_seconds: float = 90

    @property
    def pause_seconds(self) -> float:
        """Requests that are further apart than this are not attempts at the same thing."""
        return self.upload_seconds + 30


class HubUnreachable(ConnectionError):
    """The Hub has given no good answer for too long. None of the libraries tries again after this."""


class Watch:
    """Hooks of an HTTP client: its requests get timeouts, and none is sent to a server once the trouble with it has
    lasted too long."""

    def __init__(self, waits: HubWaits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._waits = waits
        self._clock = clock
        # Server -> when the first and the last request without a good answer were sent.
        self._trouble: dict[str, tuple[float, float]] = {}

    def before(self, request: Any) -> None:
        now = self._clock()
        first, last = self._trouble.get(_server(request), (now, now))
        if now - last > self._waits.pause_seconds:
            first = now
        self._trouble[_server(request)] = (first, now)
        if now - first > self._waits.trouble_seconds:
            raise HubUnreachable(
                f"{request.url.host} has given no good answer for {self._waits.trouble_seconds:g} seconds"
            )
        reads = request.method in ("GET", "HEAD")
        most = self._waits.answer_seconds if reads else self._waits.upload_seconds
        given = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            phase: most if given.get(phase) is None else min(most, given[phase])
            for phase in ("connect", "read", "write", "pool")
        }

    def after(self, response: Any) -> None:
        if response.status_code < 500:
            self._trouble.pop(_server(response.request), None)


def _server(request: Any) -> str:
    """Host and port that a request goes to."""
    return f"{request.url.host}:{request.url.port}"


_bounded = False


def bound_hub_waits(waits: HubWaits | None = None) -> None:
    """Bound the waits of `huggingface_hub` in this process; call it before anything is asked of the Hub.

    Args:
        waits: the bounds, from now on; when None, those that hold already, or the default ones.
    """
    global _bounded
    if _bounded and waits is None:
        return
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    watch = Watch(waits or HubWaits())

    def client() -> Any:
        made = default_client_factory()
        hooks = made.event_hooks
        made.event_hooks = {"request": [*hooks["request"], watch.before], "response": [*hooks["response"], watch.after]}
        return made

    set_client_factory(client)
    _bounded = True


def bound_dataset_waits() -> None:
    """Leave trying again to `huggingface_hub`: `datasets` would do so 20 times on top of it, with pauses of up to a
    minute."""
    from datasets import config

    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    # It pauses after the last attempt, too.
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 0
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
