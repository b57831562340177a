"""What the reconcile of an SAESweep is given: the sweep, its trials in outline, and slim facts of its training jobs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_operator.api.base import GROUP
from sae_operator.api.resources import SAE_SWEEP
from sae_operator.api.status import SAESweepStatus
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.api.sweep_expansion import trial_of
from sae_operator.reconcile.conditions import INVALID, READY
from sae_operator.reconcile.observed import Children, Defaults, InvalidSpec, Metadata
from sae_operator.reconcile.sweep_trials import Outline, tokens_asked_for

LABEL_SWEEP = f"{GROUP}/sweep"
LABEL_SWEEP_UID = f"{GROUP}/sweep-uid"
ANNOTATION_FOLDER = f"{GROUP}/folder"
# Hash of what the job has taken over from the template.
ANNOTATION_TEMPLATE = f"{GROUP}/template"
# The sweep's `spec.retry` for which the job was made, or run again.
ANNOTATION_RETRY = f"{GROUP}/sweep-retry"
# On a job that the sweep has suspended; one that somebody else suspends stays so when the sweep is resumed.
ANNOTATION_SUSPENDED = f"{GROUP}/suspended-by-sweep"

ENDED_PHASES = frozenset({"Succeeded", "Failed"})
# What is kept of a message; statuses show less.
MAX_TEXT = 300


@dataclass(frozen=True, slots=True)
class SaeFacts:
    """One SAE of a training job: its phase and figures, as the job's status tells them. While it trains, its figures
    change all the time and say nothing yet: they are left out."""

    name: str
    phase: str | None = None
    message: str | None = None
    explained_variance: float | None = None
    l0: float | None = None
    mse: float | None = None
    dead_fraction: float | None = None
    ce_loss_score: float | None = None
    kl_divergence_score: float | None = None

    def figure(self, metric: str) -> float | None:
        """A figure by its metric's name; None when it is not known or not finite."""
        value: float | None = getattr(self, metric)
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class TrialJobFacts:
    """One SAETrainingJob of a sweep.

    Attributes:
        trials: names of its trials, in the order of its SAEs.
        folder: its folder below the sweep's output.
        created: when it was created (RFC 3339).
        phase: its status' phase.
        seen: the status is about the current spec.
        suspended: its `spec.suspend`.
        suspended_by_sweep: the sweep has set that.
        retry: its `spec.retry`.
        sweep_retry: the sweep's `spec.retry` for which it was made, or run again.
        tokens: tokens that its spec asks for; 0 is all that there are.
        template: hash of what it has taken over from the template.
        message: why it failed.
    """

    name: str
    uid: str
    trials: tuple[str, ...]
    folder: str
    created: str = ""
    phase: str | None = None
    seen: bool = False
    suspended: bool = False
    suspended_by_sweep: bool = False
    retry: int = 0
    sweep_retry: int = 0
    tokens: int = 0
    template: str = ""
    message: str = ""
    deleting: bool = False
    saes: tuple[SaeFacts, ...] = ()

    @property
    def ended(self) -> bool:
        """It has succeeded or failed, and its spec asks for no more."""
        return self.seen and self.phase in ENDED_PHASES


@dataclass(frozen=True, kw_only=True)
class ObservedSweep(Children):
    """An SAESweep and what belongs to it. `jobs` and `pods` are those of its report.

    Attributes:
        outline: its trials; what is wrong with its space; or None while it `is_at_rest`.
        training_jobs: every SAETrainingJob whose controller it is.
    """

    metadata: Metadata
    spec: SAESweepSpec | InvalidSpec
    status: SAESweepStatus
    outline: Outline | InvalidSpec | None = None
    training_jobs: tuple[TrialJobFacts, ...] = ()
    defaults: Defaults = field(default_factory=Defaults)


def is_at_rest(metadata: Metadata, status: SAESweepStatus) -> bool:
    """Whether a sweep has ended and its spec asks for nothing else: its trials need not be known then."""
    refused = any(condition.type == INVALID and condition.status == "True" for condition in status.conditions or ())
    return status.phase in ENDED_PHASES and status.observed_generation == metadata.generation and not refused


def sweep_of(meta: Mapping[str, Any]) -> str | None:
    """UID of the sweep that controls an SAETrainingJob, by its `metadata`."""
    for owner in meta.get("ownerReferences") or ():
        if owner.get("controller") and owner.get("kind") == SAE_SWEEP.kind:
            return owner["uid"]
    return None


def trial_job_facts(raw: Mapping[str, Any]) -> TrialJobFacts:
    """Facts of an SAETrainingJob that a sweep controls."""
    meta, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    annotations = meta.get("annotations") or {}
    output = (spec.get("output") or {}).get("uri") or ""
    names = (sae.get("name") or "" for sae in spec.get("saes") or ())
    sweep_retry = annotations.get(ANNOTATION_RETRY) or ""
    return TrialJobFacts(
        name=meta["name"],
        uid=meta["uid"],
        trials=tuple(dict.fromkeys(trial_of(name) for name in names)),
        folder=annotations.get(ANNOTATION_FOLDER) or output.rstrip("/").rpartition("/")[2],
        created=meta.get("creationTimestamp") or "",
        phase=status.get("phase"),
        seen=status.get("observedGeneration") == meta.get("generation"),
        suspended=bool(spec.get("suspend")),
        suspended_by_sweep=ANNOTATION_SUSPENDED in annotations,
        retry=int(spec.get("retry") or 0),
        sweep_retry=int(sweep_retry) if sweep_retry.isdecimal() else 0,
        tokens=tokens_asked_for(spec),
        template=annotations.get(ANNOTATION_TEMPLATE) or "",
        message=_failure(status),
        deleting=bool(meta.get("deletionTimestamp")),
        saes=tuple(_sae(sae) for sae in status.get("saes") or ()),
    )


def _failure(status: Mapping[str, Any]) -> str:
    if status.get("phase") != "Failed":
        return ""
    conditions = status.get("conditions") or ()
    return next((_cut(item.get("message")) for item in conditions if item.get("type") == READY), "")


def _sae(told: Mapping[str, Any]) -> SaeFacts:
    if told.get("phase") == "Running":
        return SaeFacts(told.get("name") or "", "Running")
    return SaeFacts(
        name=told.get("name") or "",
        phase=told.get("phase"),
        message=_cut(told.get("message")) or None,
        explained_variance=told.get("explainedVariance"),
        l0=told.get("l0"),
        mse=told.get("mse"),
        dead_fraction=told.get("deadFraction"),
        ce_loss_score=told.get("ceLossScore"),
        kl_divergence_score=told.get("klDivergenceScore"),
    )


def _cut(text: str | None) -> str:
    return (text or "")[:MAX_TEXT]
