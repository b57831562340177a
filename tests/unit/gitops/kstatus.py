"""The status that kstatus computes of a custom resource, by the rules that its library publishes.

`sigs.k8s.io/cli-utils/pkg/kstatus` is what Flux's health checks, `kpt` and `cli-utils` apply; its rules for built-in
kinds are left out here, because none of ours is one. Written from v0.37.2 and its README.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Kstatus = Literal["InProgress", "Failed", "Current", "Terminating"]


def kstatus(resource: Mapping[str, Any]) -> Kstatus:
    """What the library makes of an object as the API server shows it; the first rule that applies decides."""
    metadata, status = resource.get("metadata") or {}, resource.get("status") or {}
    if metadata.get("deletionTimestamp"):
        return "Terminating"
    if _behind(metadata.get("generation"), status.get("observedGeneration")):
        return "InProgress"
    conditions = status.get("conditions") or []
    for condition in conditions:
        # In the order of the list: whichever of the two stands first.
        if condition.get("status") == "True" and condition.get("type") == "Reconciling":
            return "InProgress"
        if condition.get("status") == "True" and condition.get("type") == "Stalled":
            return "Failed"
    for condition in conditions:
        if condition.get("type") == "Ready" and condition.get("status") == "True":
            return "Current"
        if condition.get("type") == "Ready" and condition.get("status") in ("False", "Unknown"):
            return "InProgress"
    # Nothing speaks against it: this is why a new resource must never look like this.
    return "Current"


def _behind(generation: int | None, observed: int | None) -> bool:
    """Whether the status is about another version of the spec; it cannot be told where either is missing."""
    return generation is not None and observed is not None and generation != observed
