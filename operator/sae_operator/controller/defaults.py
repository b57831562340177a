"""A namespace's defaults, read when they are needed and remembered for a few seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from sae_operator.controller.client import ApiClient, ApiError
from sae_operator.reconcile import projection
from sae_operator.reconcile.names import DEFAULTS_CONFIG_MAP
from sae_operator.reconcile.observed import Defaults

REMEMBER_SECONDS = 10.0


class NamespaceDefaults:
    """ConfigMap `sae-operator-defaults` by namespace: one GET serves a burst of resources."""

    def __init__(self, client: ApiClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._clock = client, clock
        self._known: dict[str, tuple[float, Defaults]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def of(self, namespace: str) -> Defaults:
        known = self._fresh(namespace)
        if known is not None:
            return known
        async with self._locks.setdefault(namespace, asyncio.Lock()):
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
            self._known[namespace] = (self._clock(), defaults)
            return defaults

    def _fresh(self, namespace: str) -> Defaults | None:
        at, defaults = self._known.get(namespace, (float("-inf"), None))
        return defaults if self._clock() - at < REMEMBER_SECONDS else None
