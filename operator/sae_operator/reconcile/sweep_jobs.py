"""The training jobs that a sweep wants: which to create, to change and to delete, given those that there are.

Nothing is remembered: what a job has taken over stands on the job itself (the sweep's retry, a hash of the template).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_operator.api.base import API_VERSION
from sae_operator.api.resources import SAE_SWEEP, SAE_TRAINING_JOB
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.api.sweep_expansion import job_name
from sae_operator.reconcile.names import LABEL_MANAGED_BY, MANAGED_BY, owner_reference
from sae_operator.reconcile.observed import Metadata
from sae_operator.reconcile.sweep_observed import (
    ANNOTATION_FOLDER,
    ANNOTATION_RETRY,
    ANNOTATION_SUSPENDED,
    ANNOTATION_TEMPLATE,
    LABEL_SWEEP,
    LABEL_SWEEP_UID,
    TrialJobFacts,
)
from sae_operator.reconcile.sweep_status import Claim
from sae_operator.reconcile.sweep_trials import Change, Outline, following
from sae_operator.reconcile.wanted import TrainingJobPatch


@dataclass
class JobsWanted:
    """What is to be done about training jobs now.

    Attributes:
        groups: trials that share a job which does not exist yet.
        unfinished: jobs that exist and have not ended, before anything of this is done.
    """

    groups: list[list[str]]
    unfinished: list[TrialJobFacts]
    create: list[dict[str, Any]] = field(default_factory=list)
    patches: list[TrainingJobPatch] = field(default_factory=list)


def run_again(spec: SAESweepSpec, outline: Outline, claims: Sequence[Claim]) -> list[Claim]:
    """The jobs that have ended and are to go on: failed ones after `retry` was raised, and all after tokens were."""
    return [
        claim
        for claim in claims
        if claim.job.ended and not claim.job.deleting and (_retries(spec, claim) or _asks_for_more(outline, claim))
    ]


def jobs_wanted(
    metadata: Metadata,
    spec: SAESweepSpec,
    outline: Outline,
    claims: Sequence[Claim],
    again: Sequence[Claim],
    *,
    leaving: int,
    given_up: bool,
) -> JobsWanted:
    """What is to be done, so that no more than `maxParallel` jobs are unfinished.

    Args:
        again: of `run_again`.
        leaving: unfinished jobs whose trials have all been removed; they are to be deleted first.
        given_up: too many trials have failed: what runs is finished, and no others are created.
    """
    taken = {name for claim in claims for name in claim.trials}
    unfinished = [claim.job for claim in claims if not claim.job.ended]
    wanted = JobsWanted(outline.groups(taken, spec.trials_per_job), unfinished)
    for claim in claims:
        if not claim.job.ended and not claim.job.deleting:
            _keep_up(spec, outline, claim, wanted)
    if spec.suspend:
        return wanted
    free = max(0, spec.max_parallel - len(unfinished) - leaving)
    for claim in again[:free]:
        wanted.patches.append(_go_on(spec, outline, claim))
    if not given_up:
        for names in wanted.groups[: free - len(again[:free])]:
            wanted.create.append(_manifest(metadata, spec, outline, names))
    return wanted


def _retries(spec: SAESweepSpec, claim: Claim) -> bool:
    return claim.job.phase == "Failed" and claim.job.sweep_retry < spec.retry


def _asks_for_more(outline: Outline, claim: Claim) -> bool:
    return _tokens(outline, claim) > claim.job.tokens


def _tokens(outline: Outline, claim: Claim) -> int:
    return outline.kind_of(claim.trials[0]).tokens


def _go_on(spec: SAESweepSpec, outline: Outline, claim: Claim) -> TrainingJobPatch:
    """A job that has ended runs again, as the template is now."""
    changes = _template(spec, outline, claim)
    annotations: dict[str, str | None] = {ANNOTATION_TEMPLATE: _digest(outline, claim)}
    if _retries(spec, claim):
        # Both at once: an operator that dies does not raise it twice. The job's own may have been raised by hand.
        changes.append((("retry",), claim.job.retry + 1))
        annotations[ANNOTATION_RETRY] = str(spec.retry)
    if claim.job.suspended_by_sweep:
        changes.append((("suspend",), False))
        annotations[ANNOTATION_SUSPENDED] = None
    return TrainingJobPatch(claim.job.name, claim.job.uid, tuple(changes), annotations)


def _keep_up(spec: SAESweepSpec, outline: Outline, claim: Claim, wanted: JobsWanted) -> None:
    """An unfinished job follows the template, and is suspended and resumed with the sweep."""
    job = claim.job
    changes: list[Change] = []
    annotations: dict[str, str | None] = {}
    if job.template != _digest(outline, claim):
        changes += _template(spec, outline, claim)
        annotations[ANNOTATION_TEMPLATE] = _digest(outline, claim)
    if spec.suspend and not job.suspended:
        changes.append((("suspend",), True))
        annotations[ANNOTATION_SUSPENDED] = "true"
    elif not spec.suspend and job.suspended_by_sweep:
        changes.append((("suspend",), False))
        annotations[ANNOTATION_SUSPENDED] = None
    if annotations:
        wanted.patches.append(TrainingJobPatch(job.name, job.uid, tuple(changes), annotations))


def _template(spec: SAESweepSpec, outline: Outline, claim: Claim) -> list[Change]:
    """What the job takes over from the template; tokens only if they are no fewer than it has."""
    changes = following(outline.job(spec, claim.trials[:1]).spec)
    if _tokens(outline, claim) < claim.job.tokens:
        changes = [change for change in changes if change[0][-1] != "tokens"]
    return changes


def _digest(outline: Outline, claim: Claim) -> str:
    return outline.kind_of(claim.trials[0]).template


def _manifest(metadata: Metadata, spec: SAESweepSpec, outline: Outline, names: Sequence[str]) -> dict[str, Any]:
    job = outline.job(spec, names)
    return {
        "apiVersion": API_VERSION,
        "kind": SAE_TRAINING_JOB.kind,
        "metadata": {
            "name": job_name(metadata.name, metadata.uid, names),
            "namespace": metadata.namespace,
            "labels": {LABEL_MANAGED_BY: MANAGED_BY, LABEL_SWEEP: metadata.name, LABEL_SWEEP_UID: metadata.uid},
            "annotations": {
                ANNOTATION_FOLDER: job.folder,
                ANNOTATION_TEMPLATE: outline.kind_of(names[0]).template,
                ANNOTATION_RETRY: str(spec.retry),
            },
            "ownerReferences": [owner_reference(SAE_SWEEP.kind, metadata, controller=True)],
        },
        "spec": job.spec.to_manifest(),
    }
