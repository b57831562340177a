"""Conditions as kstatus reads them, so that `kubectl wait`, Flux and Argo CD understand a resource without knowing it.

Every status carries Ready, Reconciling and Stalled. Ready is True only when the work is done; Reconciling is True while
the operator works or waits; Stalled is True when only a change by a user can help. Further conditions are there while
they hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from sae_operator.api.redaction import redact
from sae_operator.api.status import Condition

Truth = Literal["True", "False", "Unknown"]

READY = "Ready"
RECONCILING = "Reconciling"
STALLED = "Stalled"
IMAGE_PULL_FAILED = "ImagePullFailed"
UNSCHEDULABLE = "Unschedulable"
SECRET_MISSING = "SecretMissing"
POD_NOT_STARTING = "PodNotStarting"
OOM_KILLED = "OOMKilled"
METRICS_UNAVAILABLE = "MetricsUnavailable"
PROGRESS_UNREACHABLE = "ProgressUnreachable"
NODE_UNREACHABLE = "NodeUnreachable"
DEFAULTS_INVALID = "DefaultsInvalid"
INVALID = "Invalid"

# Reason of Ready that the shell writes when the API server took no Job (a quota, say).
CREATE_REFUSED = "CreateRefused"
# Reason of Ready while Jobs that a suspension has ended are still there, also when it has been lifted since.
SUSPENDING = "Suspending"

# Bounds of the CRD's metav1.Condition-like object; a message is for people, a longer one helps nobody.
MAX_MESSAGE = 2048


@dataclass(frozen=True)
class Finding:
    """Something that needs attention: a further condition."""

    type: str
    reason: str
    message: str
    status: Truth = "True"


@dataclass(frozen=True)
class Standing:
    """Where a resource stands, as its three kstatus conditions tell it."""

    kind: Literal["working", "done", "failed", "paused"]
    reason: str
    message: str

    @property
    def truths(self) -> tuple[Truth, Truth, Truth]:
        """Status of Ready, Reconciling and Stalled."""
        done: Truth = "True" if self.kind == "done" else "False"
        working: Truth = "True" if self.kind == "working" else "False"
        failed: Truth = "True" if self.kind == "failed" else "False"
        return done, working, failed


def rfc3339(moment: datetime) -> str:
    """A time as Kubernetes writes it: UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def build_conditions(
    previous: Iterable[Condition], standing: Standing, findings: Sequence[Finding], generation: int, now: datetime
) -> list[Condition]:
    """Ready, Reconciling, Stalled and the findings; a condition whose status is unchanged keeps its transition time."""
    wanted = [
        Finding(kind, standing.reason, standing.message, status)
        for kind, status in zip((READY, RECONCILING, STALLED), standing.truths, strict=True)
    ]
    # One condition per type, whatever the number of pods that it is about.
    seen: set[str] = set()
    for finding in findings:
        if finding.type not in seen:
            seen.add(finding.type)
            wanted.append(finding)
    before = {condition.type: condition for condition in previous}
    return [_condition(finding, before.get(finding.type), generation, now) for finding in wanted]


def _condition(finding: Finding, before: Condition | None, generation: int, now: datetime) -> Condition:
    unchanged = before is not None and before.status == finding.status
    since = before.last_transition_time if unchanged and before is not None else None
    return Condition(
        type=finding.type,
        status=finding.status,
        reason=finding.reason,
        message=redact(finding.message)[:MAX_MESSAGE],
        observed_generation=generation,
        last_transition_time=since or rfc3339(now),
    )
