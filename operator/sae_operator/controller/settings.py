"""kopf's settings, each with the reason for its value. Figures: 1,000 to 3,000 resources on a real API server, when
kopf watched all kinds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from sae_operator.controller.framework import kopf

HEARTBEAT_SELECTOR = "app.kubernetes.io/name=sae-operator,app.kubernetes.io/component=heartbeat"


class EndlessBackoff:
    """Delays of an endless retry: 1, 2, 4 … at most 30 s, each with jitter. Each iteration starts anew."""

    def __init__(self, *, first: float = 1.0, longest: float = 30.0, uniform: Any = random.uniform) -> None:
        self._first, self._longest, self._uniform = first, longest, uniform

    def __iter__(self) -> Iterator[float]:
        delay = self._first
        while True:
            yield delay * self._uniform(0.5, 1.0)
            delay = min(delay * 2, self._longest)


class NoDiffBase(kopf.DiffBaseStorage):
    """Remembers nothing: only event handlers are used, and copying every object to compare it costs CPU."""

    def build(self, *, body: Any, extra_fields: Any = None) -> Any:
        return {}

    def fetch(self, *, body: Any) -> Any:
        return None

    def store(self, *, body: Any, patch: Any, essence: Any) -> None:
        return None


def configure(settings: kopf.OperatorSettings) -> kopf.OperatorSettings:
    """Fills in `settings` and returns it."""
    # The API server sends only our Lease.
    settings.watching.label_selectors["coordination.k8s.io", "v1", "leases"] = HEARTBEAT_SELECTOR
    # Restart with 3,000 objects: 118 MiB instead of 271, together with idle_timeout.
    settings.watching.chunk_size = 200
    # A per-object worker lives so long after its last event; it holds the object.
    settings.queueing.idle_timeout = 0.5
    # A worker holds its slot until it is idle: a limit of 20 gave 4 Jobs per second.
    settings.queueing.worker_limit = None
    settings.persistence.diffbase_storage = NoDiffBase()
    # kopf's default gives up after a minute of 503 and ends the process.
    settings.networking.error_backoffs = EndlessBackoff()
    settings.networking.request_timeout = 15
    settings.networking.connect_timeout = 5
    # Events are written by `events`, aggregated.
    settings.posting.enabled = False
    # No watching of namespaces and CRDs, and so no permission for it.
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.process.ultimate_exiting_timeout = 20
    return settings
