"""A watch of our own, for the kinds of which there may be thousands: training jobs, and Jobs. A list, page by page, and
then what changes, for ever.

kopf keeps a task, a queue and timers for each object that it watches: 0.4 ms of CPU an event, of which a training job
and its Job have four before a pod runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from sae_operator.controller.client import ApiClient, ApiError, ServerUnavailable

logger = logging.getLogger(__name__)

# The API server ends the watch then, and it is begun anew where it was.
WATCH_SECONDS = 600
# It sends a bookmark every minute; a connection that says nothing for longer is dead, whatever it looks like.
SILENCE_SECONDS = 90.0
PAUSE_SECONDS = (0.5, 1.5)
# After a refusal, which somebody has to end.
REFUSED_SECONDS = (3.0, 6.0)
GONE = 410

Event = Mapping[str, Any]


class Watch:
    """Delivers what is there, each as an event without a type as kopf does, and every change after that.

    Args:
        path: of the collection.
        selector: labels of the objects; all, when empty.
        deliver: takes the events.
        relisted: called after each list but the first, which tells nothing of what has vanished.
    """

    def __init__(
        self,
        client: ApiClient,
        path: str,
        selector: str,
        deliver: Callable[[Event], None],
        *,
        relisted: Callable[[], None] = lambda: None,
        uniform: Callable[[float, float], float] = random.uniform,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._client, self._path, self._deliver, self._relisted = client, path, deliver, relisted
        self._query = {"labelSelector": selector} if selector else {}
        self._uniform, self._sleep = uniform, sleep
        # The last version that was seen; None before a list.
        self._version: str | None = None
        self._was_listed = False

    async def run(self) -> None:
        """Watches until cancelled; nothing that the API server answers ends it."""
        while True:
            await self._client.breaker.wait_closed()
            pause = self._uniform(*PAUSE_SECONDS)
            try:
                if self._version is None:
                    await self._list()
                if await self._follow():
                    continue
            except ApiError as error:
                if error.status != GONE:
                    logger.warning("%s cannot be watched: %s", self._path, error)
                    pause = self._uniform(*REFUSED_SECONDS)
                self._version = None
            except ServerUnavailable as error:
                logger.info("the watch of %s is begun again: %s", self._path, error)
                pause = max(pause, error.retry_after or 0.0)
            await self._sleep(pause)

    async def _list(self) -> None:
        version = 0
        async for page in self._client.pages(self._path, self._query):
            version = page.version
            for item in page.items:
                self._take({"type": None, "object": item})
        self._version = str(version)
        if self._was_listed:
            self._relisted()
        self._was_listed = True

    async def _follow(self) -> bool:
        """Whether anything came, before the API server ended the watch as it does."""
        assert self._version is not None
        query = {
            **self._query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        begun_at = self._version
        events = self._client.stream(self._path, query, silence_seconds=SILENCE_SECONDS)
        async with contextlib.aclosing(events):
            async for event in events:
                found = event["object"]
                if event["type"] == "ERROR":
                    raise ApiError(found.get("code") or 0, found.get("reason") or "", found.get("message") or "")
                if event["type"] != "BOOKMARK":
                    self._take(event)
                self._version = found["metadata"]["resourceVersion"]
        return self._version != begun_at

    def _take(self, event: Event) -> None:
        try:
            self._deliver(event)
        except Exception:  # Anybody may make an object with these labels: one that is odd must not end everything.
            logger.exception("an event of %s was not taken", self._path)
