"""One Lease that is renewed and watched: that it comes back proves that writes and kopf's watches work.

The liveness probe asks here. Our own watch (`watch`) leaves by itself a connection that says nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from sae_operator.controller import paths
from sae_operator.controller.client import ApiClient, ApiError, ServerUnavailable

logger = logging.getLogger(__name__)

LEASE = "sae-operator"
LABELS = {"app.kubernetes.io/name": "sae-operator", "app.kubernetes.io/component": "heartbeat"}
BEAT_SECONDS = 30.0
# Four beats: an API server that is slow for a minute is no reason to restart.
LONGEST_SILENCE_SECONDS = 120.0
# A key is processed in milliseconds; one that waits for so long will not get through.
OLDEST_KEY_SECONDS = 180.0


class Unhealthy(Exception):
    """A restart may help; the message says what stands still."""


class Heartbeat:
    """Renews the Lease in `namespace` and remembers when a renewal was seen by the watch."""

    def __init__(
        self,
        client: ApiClient,
        *,
        namespace: str,
        identity: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client, self._namespace, self._clock, self._now = client, namespace, clock, now
        self.identity = identity or os.environ.get("HOSTNAME") or f"pid-{os.getpid()}"
        self._sent: str | None = None
        self._seen_at = clock()

    async def run(self) -> None:
        """Beats until cancelled."""
        while True:
            await self._client.breaker.wait_closed()
            try:
                await self.beat()
            except (ApiError, ServerUnavailable) as error:
                logger.warning("The heartbeat could not be written: %s", error)
            await asyncio.sleep(BEAT_SECONDS)

    async def beat(self) -> None:
        """Renews the Lease once."""
        self._sent = self._now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": LEASE, "namespace": self._namespace, "labels": LABELS},
            "spec": {
                "holderIdentity": self.identity,
                "renewTime": self._sent,
                "leaseDurationSeconds": int(LONGEST_SILENCE_SECONDS),
            },
        }
        await self._client.apply(f"{paths.leases(self._namespace)}/{LEASE}", lease, "sae-operator")

    def seen(self, raw: Mapping[str, Any]) -> None:
        """The watch brought the Lease."""
        if (raw.get("spec") or {}).get("renewTime") == self._sent and self._sent is not None:
            self._seen_at = self._clock()

    @property
    def age(self) -> float:
        """Seconds since a renewal came back through the watch; since the start before the first one has."""
        return self._clock() - self._seen_at

    @property
    def is_silent(self) -> bool:
        """Writes or watches do not work."""
        return self.age > LONGEST_SILENCE_SECONDS

    def check(self, oldest_key_age: float) -> dict[str, float]:
        """Figures for the liveness probe.

        Raises:
            Unhealthy: something stands still although the API server is there.
        """
        silence = self.age
        if self._client.breaker.open:
            # A restart would not bring the API server back, and the clock starts when it does.
            self._seen_at = self._clock()
            return {"heartbeat_age_seconds": silence, "oldest_key_seconds": oldest_key_age}
        if silence > LONGEST_SILENCE_SECONDS:
            raise Unhealthy(f"the heartbeat has not come back through the watch for {silence:.0f} s")
        if oldest_key_age > OLDEST_KEY_SECONDS:
            raise Unhealthy(f"a resource has waited for {oldest_key_age:.0f} s")
        return {"heartbeat_age_seconds": silence, "oldest_key_seconds": oldest_key_age}
