"""Where a sweep's trials stand, and what its status tells of them: as much for thousands of trials as for ten."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sae_operator.api.redaction import redact
from sae_operator.api.status import JobCounts, SweepSummary, TrialCounts, TrialStatus
from sae_operator.api.sweep import Objective
from sae_operator.api.sweep_expansion import trial_of
from sae_operator.reconcile.conditions import Finding
from sae_operator.reconcile.sweep_observed import ENDED_PHASES, SaeFacts, TrialJobFacts
from sae_operator.reconcile.sweep_trials import Outline

TrialState = Literal["pending", "running", "succeeded", "stopped", "failed"]

TRIALS_FAILED = "TrialsFailed"
SHOWN = 5
# Bytes of JSON that a text of one trial takes at most.
TEXT_BYTES = 240
# The same of a condition's message.
MESSAGE_BYTES = 800
SHOWN_IN_MESSAGE = 3


@dataclass(frozen=True, slots=True)
class TrialView:
    """One trial.

    Attributes:
        job: the training job that has it; None while none has been created.
        saes: its SAEs, as far as that job's status tells of them.
    """

    name: str
    state: TrialState
    job: TrialJobFacts | None = None
    saes: tuple[SaeFacts, ...] = ()

    @property
    def message(self) -> str:
        """Why it failed."""
        if self.job is not None and self.job.phase == "Failed":
            return self.job.message
        return next((sae.message for sae in self.saes if sae.message), "")


@dataclass(frozen=True)
class Claim:
    """A training job and those of its trials that the space still has."""

    job: TrialJobFacts
    trials: tuple[str, ...]


def claims_of(outline: Outline, jobs: Sequence[TrialJobFacts], retry: int) -> tuple[list[Claim], list[TrialJobFacts]]:
    """Which job has which trials, in the order of the space; and the jobs that have none any more.

    A trial is the newest job's that has it. One that failed where others were trained is nobody's once the sweep's
    `retry` was raised: its job, which has succeeded, cannot run again, and another one is made for it.
    """
    positions = outline.positions
    claims: list[Claim] = []
    left: list[TrialJobFacts] = []
    taken: set[str] = set()
    for job in sorted(jobs, key=lambda job: (job.created, job.name), reverse=True):
        newest = [name for name in job.trials if name in positions and name not in taken]
        taken.update(newest)
        leaving = _failed_among_others(job) if job.sweep_retry < retry else ()
        mine = tuple(name for name in newest if name not in leaving)
        if mine:
            claims.append(Claim(job, mine))
        else:
            left.append(job)
    claims.sort(key=lambda claim: positions[claim.trials[0]])
    return claims, left


def _failed_among_others(job: TrialJobFacts) -> Collection[str]:
    """Trials that failed in a job that has succeeded all the same."""
    if job.phase != "Succeeded" or not job.ended:
        return ()
    saes = _saes_by_trial(job)
    failed = [name for name in job.trials if _state(job, saes.get(name, ())) == "failed"]
    # With none but them, another job would be the same one.
    return failed if len(failed) < len(job.trials) else ()


def _saes_by_trial(job: TrialJobFacts) -> Mapping[str, Sequence[SaeFacts]]:
    found: dict[str, list[SaeFacts]] = {}
    for sae in job.saes:
        found.setdefault(trial_of(sae.name), []).append(sae)
    return found


def view_trials(outline: Outline, claims: Sequence[Claim], runs_again: Collection[str]) -> list[TrialView]:
    """All trials in the order of the space; `runs_again` are UIDs of jobs that have ended and are to go on."""
    found: dict[str, TrialView] = {}
    for claim in claims:
        job, saes = claim.job, _saes_by_trial(claim.job)
        for name in claim.trials:
            mine = tuple(saes.get(name, ()))
            state = "pending" if job.uid in runs_again else _state(job, mine)
            found[name] = TrialView(name, state, job, mine)
    return [found.get(trial.name) or TrialView(trial.name, "pending") for trial in outline.trials]


def _state(job: TrialJobFacts, saes: Sequence[SaeFacts]) -> TrialState:
    if job.phase in ENDED_PHASES and not job.ended:
        # Its spec has just been changed: it goes on, or says soon that it does not.
        return "pending"
    if job.phase == "Failed":
        return "failed"
    phases = {sae.phase for sae in saes}
    if job.phase == "Succeeded":
        phases.discard("Running")
    if phases and phases <= {"Failed", "Stopped"}:
        return "stopped" if "Stopped" in phases else "failed"
    if job.phase == "Succeeded":
        return "succeeded"
    return "running" if job.phase == "Running" else "pending"


def count(trials: Sequence[TrialView]) -> TrialCounts:
    states = Counter(trial.state for trial in trials)
    return TrialCounts(
        total=len(trials),
        pending=states["pending"],
        running=states["running"],
        succeeded=states["succeeded"],
        stopped=states["stopped"],
        failed=states["failed"],
    )


def tell(
    outline: Outline, objective: Objective, trials: Sequence[TrialView], counts: TrialCounts, jobs: JobCounts
) -> dict[str, Any]:
    """The status' fields about trials."""
    best = _best(objective, trials)
    shown = [_trained(outline, objective, trial, sae) for trial, sae in best]
    failures = [_failure(outline, trial) for trial in _first_failed(trials, SHOWN)]
    first = shown[0] if shown else TrialStatus(name="")
    summary = SweepSummary(
        trial=first.name or None,
        objective=f"{first.objective:.4g}" if first.objective is not None else None,
        l0=f"{first.l0:.1f}" if first.l0 is not None else None,
        finished=f"{ended(counts)}/{counts.total}",
    )
    return {
        "trials": counts,
        "jobs": jobs,
        "best": shown or None,
        "failures": failures or None,
        "summary": summary,
        "observed_trials": outline.digest,
    }


def ended(counts: TrialCounts) -> int:
    return (counts.succeeded or 0) + (counts.stopped or 0) + (counts.failed or 0)


def failures_found(outline: Outline, trials: Sequence[TrialView], counts: TrialCounts) -> list[Finding]:
    """The condition that trials have failed, while some have."""
    if not counts.failed:
        return []
    told = (_failure(outline, trial) for trial in _first_failed(trials, SHOWN_IN_MESSAGE))
    text = "; ".join(f"{trial.name} ({trial.parameters}): {trial.message or 'failed'}" for trial in told)
    more = "; ..." if counts.failed > SHOWN_IN_MESSAGE else ""
    message = clipped(f"{counts.failed} of {counts.total} trials failed: {text}{more}", MESSAGE_BYTES)
    return [Finding(TRIALS_FAILED, "TrialsFailed", message)]


def clipped(text: str, limit: int) -> str:
    """A text on one line that takes at most so many bytes of JSON. Credentials go first: half of one is told from
    nothing else."""
    line = redact(" ".join(text.split()))
    if _bytes(line) <= limit:
        return line
    # A character takes at most six bytes (\\u0000), and mostly one.
    low, high = 0, min(len(line), limit)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _bytes(line[:middle]) <= limit - 3 else (low, middle - 1)
    return f"{line[:low]}..."


def _bytes(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode(errors="replace")) - 2


def _first_failed(trials: Sequence[TrialView], number: int) -> list[TrialView]:
    found: list[TrialView] = []
    for trial in trials:
        if trial.state == "failed":
            found.append(trial)
            if len(found) == number:
                break
    return found


def _best(objective: Objective, trials: Sequence[TrialView]) -> list[tuple[TrialView, SaeFacts]]:
    """The best trials that were trained to their end, each with its best SAE."""
    sign = -1.0 if objective.goal == "maximize" else 1.0
    ranked: list[tuple[float, int, TrialView, SaeFacts]] = []
    for position, trial in enumerate(trials):
        if trial.state != "succeeded":
            continue
        figures = [
            (sign * value, sae)
            for sae in trial.saes
            if sae.phase != "Failed" and sae.phase != "Stopped"
            if (value := sae.figure(objective.metric)) is not None and _within(objective, sae)
        ]
        if figures:
            value, sae = min(figures, key=lambda item: item[0])
            ranked.append((value, position, trial, sae))
    return [(trial, sae) for _, _, trial, sae in heapq.nsmallest(SHOWN, ranked, key=lambda item: item[:2])]


def _within(objective: Objective, sae: SaeFacts) -> bool:
    l0 = sae.figure("l0")
    return objective.l0_at_most is None or (l0 is not None and l0 <= objective.l0_at_most)


def _trained(outline: Outline, objective: Objective, trial: TrialView, sae: SaeFacts) -> TrialStatus:
    return TrialStatus(
        name=trial.name,
        job_name=trial.job.name if trial.job is not None else None,
        parameters=clipped(outline.describe(trial.name), TEXT_BYTES),
        sae=sae.name,
        objective=sae.figure(objective.metric),
        explained_variance=sae.figure("explained_variance"),
        l0=sae.figure("l0"),
        ce_loss_score=sae.figure("ce_loss_score"),
    )


def _failure(outline: Outline, trial: TrialView) -> TrialStatus:
    return TrialStatus(
        name=trial.name,
        job_name=trial.job.name if trial.job is not None else None,
        parameters=clipped(outline.describe(trial.name), TEXT_BYTES),
        message=clipped(trial.message, TEXT_BYTES) or None,
    )


def messages_of(claims: Sequence[Claim], total_bytes: int) -> Mapping[str, str]:
    """Why jobs failed, by their UIDs, in at most so many bytes of JSON."""
    failed = [claim.job for claim in claims if claim.job.phase == "Failed" and claim.job.message]
    share = min(TEXT_BYTES, total_bytes // max(1, len(failed)))
    return {job.uid: clipped(job.message, share) for job in failed}
