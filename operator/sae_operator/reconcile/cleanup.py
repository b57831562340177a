"""What the work of a finished resource has left behind, beside its Jobs and their pods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sae_operator.api.status import CommonStatus
from sae_operator.reconcile.names import attempt_of, child_name, service_name, step_of
from sae_operator.reconcile.observed import Children, Metadata


@dataclass(frozen=True)
class Expiry:
    """What a finished resource has left behind, and for how long it stays.

    Attributes:
        ttl_seconds: `spec.run.ttlSecondsAfterFinished`.
        steps: of which there may be ConfigMaps.
        service: there may be a Service.
    """

    ttl_seconds: int | None
    steps: Sequence[str]
    service: bool = False


def leftovers(
    metadata: Metadata, stored: CommonStatus, children: Children, expiry: Expiry
) -> Iterator[tuple[str, str]]:
    """Kind and name of what is there beside the Jobs; one of it may be gone. Jobs may have been deleted by anybody, so
    each step's attempts are those up to the last one that anything tells of."""
    told = [job.name for job in children.jobs]
    told += [stored.job_name] if stored.job_name is not None else []
    told += [entry.job_name for entry in stored.attempts or ()]
    for step in expiry.steps:
        attempts = max((attempt_of(name) for name in told if step_of(name, metadata) == step), default=1)
        for attempt in range(1, attempts + 1):
            yield "ConfigMap", child_name(metadata, step, attempt)
    if expiry.service:
        yield "Service", service_name(metadata)
