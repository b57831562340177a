"""A namespace's defaults, read when they are needed and remembered for a few seconds."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from weakref import WeakValueDictionary

from sae_operator.controller.client import ApiClient, ApiError
from sae_operator.reconcile import projection
from sae_operator.reconcile.names import DEFAULTS_CONFIG_MAP
from sae_operator.reconcile.observed import Defaults

REMEMBER_SECONDS = 10.0


class NamespaceDefaults:
    """ConfigMap `sae-operator-defaults` by namespace: one GET serves a burst of resources."""

    def __init__(self, client: ApiClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._clock = client, clock
        # In the order in which they were read; what is too old to serve is dropped.
        self._known: OrderedDict[str, tuple[float, Defaults]] = OrderedDict()
        # A lock is there while somebody holds it or waits for it.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def of(self, namespace: str) -> Defaults:
        known = self._fresh(namespace)
        if known is not None:
            return known
        lock = self._locks.get(namespace)
        if lock is None:
            lock = self._locks[namespace] = asyncio.Lock()
        async with lock:
            known = self._fresh(namespace)
            if known is not None:
                return known
            try:
                raw = await self._client.get(f"/api/v1/namespaces/{namespace}/configmaps/{DEFAULTS_CONFIG_MAP}")
                defaults = projection.defaults(raw)
            except ApiError as error:
                if error.status != 404:
                    raise
                defaults = Defaults()
            self._remember(namespace, defaults)
            return defaults

    def _remember(self, namespace: str, defaults: Defaults) -> None:
        now = self._clock()
        self._known[namespace] = (now, defaults)
        self._known.move_to_end(namespace)
        while self._known and now - next(iter(self._known.values()))[0] >= REMEMBER_SECONDS:
            self._known.popitem(last=False)

    def _fresh(self, namespace: str) -> Defaults | None:
        at, defaults = self._known.get(namespace, (float("-inf"), None))
        return defaults if self._clock() - at < REMEMBER_SECONDS else None
