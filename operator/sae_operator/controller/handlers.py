"""The triggers: kopf's watches bring events, the inbox takes them. Nothing is decided here.

Only event handlers: they write no annotations and force no finalizers. They are coroutines, since kopf runs plain
functions in threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from sae_operator.api.base import GROUP, VERSION
from sae_operator.api.resources import KINDS, SAE_TRAINING_JOB
from sae_operator.controller.framework import kopf


class Inbox(Protocol):
    """Where events go."""

    def resource_event(self, kind: str, event: Mapping[str, Any]) -> None: ...

    def lease_event(self, event: Mapping[str, Any]) -> None: ...

    def login(self) -> kopf.ConnectionInfo: ...

    def probe(self) -> dict[str, float]: ...

    async def stop(self) -> None: ...


def register(registry: kopf.OperatorRegistry, inbox: Inbox) -> kopf.OperatorRegistry:
    """Registers all handlers in `registry` and returns it."""
    for kind in KINDS.values():
        # Those have a watch of their own: see `watch`.
        if kind.kind != SAE_TRAINING_JOB.kind:
            _register_resource(registry, inbox, kind.kind, kind.plural)

    @kopf.on.event("coordination.k8s.io", "v1", "leases", registry=registry)
    async def lease(event: Any, **_: Any) -> None:
        inbox.lease_event(event)

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return inbox.login()

    @kopf.on.probe(registry=registry)
    async def health(**_: Any) -> dict[str, float]:
        return inbox.probe()

    @kopf.on.cleanup(registry=registry)
    async def stop(**_: Any) -> None:
        await inbox.stop()

    return registry


def _register_resource(registry: kopf.OperatorRegistry, inbox: Inbox, kind: str, plural: str) -> None:
    @kopf.on.event(GROUP, VERSION, plural, registry=registry, id=f"{plural}-event")
    async def resource(event: Any, **_: Any) -> None:
        inbox.resource_event(kind, event)
