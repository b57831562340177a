"""What the reconciles of both kinds see alike, and the draft in which they collect their answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from sae_operator.api.base import MAX_COUNT
from sae_operator.api.run_settings import RunSettings
from sae_operator.api.status import AttemptStatus, CommonStatus, PlanStatus
from sae_operator.api.steps import StepResult
from sae_operator.reconcile.attempts import kept
from sae_operator.reconcile.cleanup import Expiry, leftovers
from sae_operator.reconcile.conditions import (
    CREATE_REFUSED,
    DEFAULTS_INVALID,
    INVALID,
    READY,
    SUSPENDING,
    Finding,
    Standing,
    build_conditions,
    rfc3339,
)
from sae_operator.reconcile.deadlines import ActiveTime, active_time, known_active_time, seconds_to_cleanup
from sae_operator.reconcile.diagnosis import find_stuck
from sae_operator.reconcile.names import DEFAULTS_CONFIG_MAP, step_of
from sae_operator.reconcile.observed import (
    Children,
    Defaults,
    InvalidSpec,
    JobFacts,
    Metadata,
    OperatorSettings,
    PodFacts,
)
from sae_operator.reconcile.progress import is_too_early
from sae_operator.reconcile.rounds import Round
from sae_operator.reconcile.wanted import CacheApplication, EventWanted, Wanted

Status = TypeVar("Status", bound=CommonStatus)
StepName = TypeVar("StepName", bound=str)

# Fields that change all the time while pods work; they are written no more often than an interval.
LIVE_FIELDS = ("progress", "saes", "summary", "checkpoint", "shards")
# Where no deadline depends on them, they are no reason to write: they go along with what is.
ACTIVE_FIELDS = ("active_seconds", "active_since")
# What a new round forgets of the one before.
ROUND_FIELDS = (
    "phase",
    "plan",
    "progress",
    "job_name",
    "attempt",
    "attempts",
    "start_time",
    "completion_time",
    *ACTIVE_FIELDS,
)
# A Job that is to be deleted may have to wait for its pods.
CLEANUP_AGAIN_SECONDS = 60.0


@dataclass(frozen=True)
class Scene(Generic[Status]):
    """One resource at one moment.

    Attributes:
        stored: its status as stored.
        previous: the same, without what belongs to an earlier round.
        round: the round that it is in.
        run: its pods' settings, with their deadlines.
    """

    kind: str
    metadata: Metadata
    children: Children
    stored: Status
    previous: Status
    round: Round
    defaults: Defaults
    settings: OperatorSettings
    now: datetime
    run: RunSettings = field(default_factory=RunSettings)

    @cached_property
    def active(self) -> ActiveTime:
        """How long the round's pods have worked."""
        known = known_active_time(self.previous)
        if not self.children.pods_listed:
            return known
        names = {job.name for job in self.round_jobs}
        return active_time(known, [pod for pod in self.children.pods if pod.job_name in names], self.now)

    @property
    def round_jobs(self) -> list[JobFacts]:
        return [job for job in self.children.jobs if job.work == self.round.key]

    @property
    def unfinished_jobs(self) -> list[JobFacts]:
        return [job for job in self.children.jobs if not job.finished]

    @property
    def orphaned_pods(self) -> list[PodFacts]:
        """Pods that may still work although their Job is gone."""
        names = {job.name for job in self.children.jobs}
        return [pod for pod in self.children.pods if not pod.finished and pod.job_name not in names]

    @property
    def previous_step(self) -> str | None:
        """Step of the Job that the status tells of."""
        return step_of(self.previous.job_name, self.metadata) if self.previous.job_name else None

    def current_step(self, steps: Sequence[StepName]) -> StepName:
        """The furthest step that the round has come to, by its Jobs and by the status."""
        reached = {job.step for job in self.round_jobs} | {self.previous_step}
        return next((step for step in reversed(steps) if step in reached), steps[0])

    def result_of(self, step: str) -> StepResult | None:
        """What a step that has succeeded in this round said, while its Job and pods are there."""
        names = {job.name for job in self.round_jobs if job.step == step and job.complete}
        results = (pod.result for pod in self.children.pods if pod.job_name in names and pod.phase == "Succeeded")
        return next((result for result in results if result is not None), None)


def phase_of(status: CommonStatus) -> str | None:
    """The phase; each kind has its own words for it."""
    return getattr(status, "phase", None)


def is_suspending(status: CommonStatus) -> bool:
    """Whether a suspension has begun to end the Job that the status tells of, and `Suspended` is yet to be told."""
    return any(condition.type == READY and condition.reason == SUSPENDING for condition in status.conditions or ())


def plan_of(result: StepResult) -> PlanStatus:
    """The plan as the status shows it; a figure that is no number is left out."""
    plan = result.plan or {}

    def figure(name: str) -> int | None:
        value = plan.get(name)
        return round(value) if isinstance(value, int | float) and abs(value) <= MAX_COUNT else None

    return PlanStatus(bytes=figure("bytes"), gpu_seconds=figure("gpuSeconds"), memory_bytes=figure("memoryBytes"))


def without_refused_job(stored: Status) -> Status:
    """The status without a Job that it tells of, but that the API server refused: nobody has deleted that one."""
    refused = any(
        condition.type == READY and condition.reason == CREATE_REFUSED for condition in stored.conditions or ()
    )
    return stored.model_copy(update={"job_name": None, "attempt": None}) if refused else stored


def forget_round(stored: Status, also: Sequence[str] = ()) -> Status:
    """The status as a new round begins."""
    return stored.model_copy(update=dict.fromkeys((*ROUND_FIELDS, *also)))


@dataclass
class Draft:
    """The answer, while it is being written.

    Attributes:
        phase: the status' phase.
        standing: the status' Ready, Reconciling and Stalled.
        updates: further fields of the status.
        live: pods work, so that figures change without anything having happened.
        hold: nothing is to be told before more is known: the status stays as it is.
    """

    phase: str = "Pending"
    standing: Standing = field(default_factory=lambda: Standing("working", "Pending", ""))
    updates: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    attempts: list[AttemptStatus] = field(default_factory=list)
    events: list[EventWanted] = field(default_factory=list)
    create: list[dict[str, Any]] = field(default_factory=list)
    delete_jobs: list[str] = field(default_factory=list)
    apply_cache: CacheApplication | None = None
    requeue_after: float | None = None
    poll_pods: bool = False
    live: bool = False
    hold: bool = False

    def stand(
        self, phase: str, kind: Literal["working", "done", "failed", "paused"], reason: str, message: str
    ) -> None:
        self.phase = phase
        self.standing = Standing(kind, reason, message)

    def look_again(self, seconds: float) -> None:
        """The earliest of several wishes counts."""
        self.requeue_after = seconds if self.requeue_after is None else min(seconds, self.requeue_after)

    def watch_pods(self, settings: OperatorSettings) -> None:
        self.poll_pods = True
        self.look_again(settings.poll_seconds)

    def delete(self, jobs: Sequence[JobFacts]) -> None:
        self.delete_jobs.extend(job.name for job in jobs if not job.deleting and job.name not in self.delete_jobs)


def compose(scene: Scene[Status], draft: Draft) -> Wanted:
    """The answer that a draft has become."""
    if scene.defaults.problem is not None:
        message = f"ConfigMap {DEFAULTS_CONFIG_MAP}: {scene.defaults.problem}"
        draft.findings.append(Finding(DEFAULTS_INVALID, "Malformed", message))
    ended = draft.standing.kind in ("done", "failed")
    working = draft.standing.kind == "working"
    previous = scene.previous
    active = scene.active.stopped(scene.now) if ended and scene.active.since is not None else scene.active
    begun = previous.start_time or (rfc3339(scene.now) if ended or working else None)
    status = previous.model_copy(
        update={
            "observed_generation": scene.metadata.generation,
            "observed_retry": scene.round.retry,
            "observed_tokens": scene.round.tokens,
            "start_time": begun,
            "attempts": kept(draft.attempts or previous.attempts or ()),
            "completion_time": rfc3339(scene.now) if ended else None,
            "active_seconds": active.seconds or None,
            "active_since": rfc3339(active.since) if active.since is not None else None,
            **draft.updates,
            "phase": draft.phase,
            "conditions": build_conditions(
                previous.conditions or (), draft.standing, draft.findings, scene.metadata.generation, scene.now
            ),
        }
    )
    hold = draft.hold and not scene.round.begins
    free = ACTIVE_FIELDS if scene.run.active_deadline_seconds is None else ()
    if free and _only_differ(status, scene.stored, free):
        hold = True
    elif draft.live and _only_differ(status, scene.stored, (*LIVE_FIELDS, *free)):
        hold = is_too_early(scene.stored.progress, scene.now, scene.settings.progress_interval_seconds)
    if ended and scene.run.ttl_seconds_after_finished is not None:
        draft.look_again(scene.run.ttl_seconds_after_finished)
    return Wanted(
        apply_cache=draft.apply_cache,
        create=tuple(draft.create),
        status=(scene.stored if hold else status).to_manifest(),
        events=tuple(draft.events) if hold else (*draft.events, *_events(scene, draft)),
        delete_jobs=tuple(draft.delete_jobs),
        requeue_after=draft.requeue_after,
        poll_pods=draft.poll_pods,
    )


def _only_differ(status: CommonStatus, stored: CommonStatus, names: Sequence[str]) -> bool:
    """Whether two statuses are the same but for these fields."""
    fields = [name for name in names if name in type(status).model_fields]
    return status.model_copy(update={name: getattr(stored, name) for name in fields}) == stored


def _events(scene: Scene[Any], draft: Draft) -> list[EventWanted]:
    """One event when the phase changes, and one when something begins to need attention."""
    events: list[EventWanted] = []
    before = {condition.type for condition in scene.stored.conditions or () if condition.status == "True"}
    for finding in draft.findings:
        if finding.status == "True" and finding.type not in before:
            before.add(finding.type)
            events.append(EventWanted("Warning", finding.type, finding.message))
    before_it = phase_of(scene.stored)
    # Every step waits for its pod for a moment, as the status says; what hinders one is told above. To wait again is
    # news: a queue has taken a training back.
    merely_waits = draft.phase == "Queued" and before_it not in ("Running", "Caching")
    if (before_it != draft.phase and not merely_waits) or scene.round.begins:
        failed = draft.standing.kind == "failed"
        reason = draft.standing.reason if failed else draft.phase
        events.append(EventWanted("Warning" if failed else "Normal", reason, draft.standing.message))
    return events


def at_rest(
    metadata: Metadata,
    stored: CommonStatus,
    children: Children,
    expiry: Expiry | None = None,
    now: datetime | None = None,
) -> Wanted:
    """A finished resource: nothing is done but to end Jobs that should not be, to tell that the spec was seen, and to
    delete what is left of its work when its time has come."""
    generation = metadata.generation
    conditions = [
        condition.model_copy(update={"observed_generation": generation}) for condition in stored.conditions or ()
    ]
    status = stored.model_copy(update={"observed_generation": generation, "conditions": conditions})
    wanted = Wanted(
        status=status.to_manifest(),
        delete_jobs=tuple(job.name for job in children.jobs if not job.finished and not job.deleting),
    )
    left = seconds_to_cleanup(stored, expiry.ttl_seconds, now) if expiry is not None and now is not None else None
    # A status that tells of no Job says that everything is deleted.
    if expiry is None or left is None or (stored.job_name is None and not children.jobs):
        return wanted
    if left > 0:
        return replace(wanted, requeue_after=left)
    if not children.jobs:
        status = status.model_copy(update={"job_name": None, "attempt": None})
        wanted = replace(wanted, status=status.to_manifest())
    elif all(job.deleting for job in children.jobs):
        return replace(wanted, requeue_after=CLEANUP_AGAIN_SECONDS)
    return replace(
        wanted,
        delete_objects=tuple(leftovers(metadata, stored, children, expiry)),
        delete_jobs=tuple(job.name for job in children.jobs if not job.deleting),
        requeue_after=CLEANUP_AGAIN_SECONDS if children.jobs else None,
    )


def refuse_invalid(
    metadata: Metadata,
    stored: CommonStatus,
    problem: InvalidSpec,
    now: datetime,
    *,
    reason: str = INVALID,
    again_after: float | None = None,
) -> Wanted:
    """A spec that cannot be read, or asks for what is not allowed: told, and nothing else touched until it is
    corrected."""
    standing = Standing("failed", reason, problem.message)
    finding = Finding(INVALID, reason, problem.message)
    phase = phase_of(stored) or "Pending"
    status = stored.model_copy(
        update={
            "phase": phase,
            "observed_generation": metadata.generation,
            "conditions": build_conditions(stored.conditions or (), standing, [finding], metadata.generation, now),
        }
    )
    known = {condition.type for condition in stored.conditions or () if condition.status == "True"}
    events = () if INVALID in known else (EventWanted("Warning", reason, problem.message),)
    return Wanted(status=status.to_manifest(), events=events, requeue_after=again_after)


def suspend(scene: Scene[Any], draft: Draft) -> None:
    """End the Jobs; `Suspended` is told when their pods are gone."""
    if not scene.unfinished_jobs and not scene.orphaned_pods:
        draft.stand(
            "Suspended", "paused", "Suspended", "suspended; what is written stays, and resuming continues from it"
        )
        return
    draft.delete(scene.unfinished_jobs)
    draft.findings.extend(find_stuck(scene.children.pods, scene.now))
    phase = phase_of(scene.previous) or "Pending"
    if phase in ("Running", "Caching") and not any(pod.running for pod in scene.children.pods):
        phase = "Queued"
    draft.stand(phase, "working", SUSPENDING, "waits for the pods to end")
    draft.watch_pods(scene.settings)
