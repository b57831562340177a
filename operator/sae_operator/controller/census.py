"""Mark and sweep: a relist after a lost connection brings no DELETED events, so what vanished is found by comparing.

The same metadata-only LIST tells at the start when the store is complete: before that, a resource's owner, cache or
Job that was not listed yet would look as if it did not exist.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from sae_operator.api.resources import KINDS
from sae_operator.controller import paths
from sae_operator.controller.client import ApiClient, ApiError, ServerUnavailable
from sae_operator.controller.queue import Key
from sae_operator.controller.store import Store, parent_uid
from sae_operator.reconcile.names import OURS

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 300.0
# Relists come in bursts: one per kind and namespace.
SETTLE_SECONDS = 2.0
LISTING_DEADLINE_SECONDS = 10.0
PAGE = 250


class Sweeper:
    """Compares the store with what the API server lists: every five minutes, and soon after a relist."""

    def __init__(
        self,
        client: ApiClient,
        store: Store,
        look_at: Callable[[Iterable[Key]], None],
        *,
        namespace: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._store, self._look_at = client, store, look_at
        self._namespace, self._clock = namespace, clock
        self._relisted = asyncio.Event()
        client.breaker.on_close.append(self.relisted)

    def relisted(self) -> None:
        """A watch has started over."""
        self._relisted.set()

    async def wait_until_listed(self) -> None:
        """Returns when the store holds everything that the API server lists."""
        while True:
            resources, jobs = await self._census()
            deadline = self._clock() + LISTING_DEADLINE_SECONDS
            while self._clock() < deadline:
                resources = {uid for uid in resources if not self._store.knows(uid)}
                jobs = {uid: parent for uid, parent in jobs.items() if not self._store.knows_job(uid, parent)}
                if not resources and not jobs:
                    self._relisted.clear()
                    return
                await asyncio.sleep(0.02)
            logger.warning("%d resources and %d Jobs are not listed yet", len(resources), len(jobs))

    async def run(self) -> None:
        """Sweeps until cancelled."""
        while True:
            try:
                await asyncio.wait_for(self._relisted.wait(), SWEEP_SECONDS)
                await asyncio.sleep(SETTLE_SECONDS)
            except TimeoutError:
                pass
            self._relisted.clear()
            await self._client.breaker.wait_closed()
            try:
                await self.sweep()
            except (ApiError, ServerUnavailable) as error:
                logger.warning("The store could not be compared with the API server: %s", error)
                # One bad moment, or pages that expired: what has vanished must not wait for the next regular sweep.
                if isinstance(error, ServerUnavailable) or error.status == 410:
                    self._relisted.set()

    async def sweep(self) -> None:
        """Drops what is in the store and not listed any more."""
        # Taken before the LIST: what arrives while it runs is not in it.
        resources = {uid for kind in KINDS for uid in self._store.resource_uids(kind)}
        jobs = self._store.jobs()
        listed_resources, listed_jobs = await self._census()
        keys: set[Key] = set()
        for uid in resources - listed_resources:
            keys |= self._store.drop_resource(uid)
        for uid in jobs.keys() - listed_jobs.keys():
            key = self._store.drop_unlisted_job(*jobs[uid])
            if key is not None:
                keys.add(key)
        if keys:
            logger.info("Swept what had vanished unseen; %d resources are looked at", len(keys))
        self._look_at(keys)

    async def _census(self) -> tuple[set[str], dict[str, str]]:
        """UIDs of all our resources; and of all their Jobs, each with its resource's UID."""
        resources: set[str] = set()
        jobs: dict[str, str] = {}
        for kind in KINDS:
            async for meta in self._metadata(paths.resources(kind, self._namespace), {}):
                resources.add(meta["uid"])
        async for meta in self._metadata(paths.jobs(self._namespace), {"labelSelector": OURS}):
            parent = parent_uid(meta)
            if parent is not None:
                jobs[meta["uid"]] = parent
        return resources, jobs

    async def _metadata(self, path: str, query: dict[str, str]) -> AsyncIterator[dict[str, Any]]:
        async for page in self._client.pages(path, query, metadata_only=True, limit=PAGE):
            for item in page.items:
                yield item["metadata"]
