"""The life of one step's Job: made, waited for, made anew when somebody deletes it, and judged by what its pods say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sae_operator.api.status import Condition
from sae_operator.api.steps import ExitCode, StepResult
from sae_operator.reconcile.attempts import (
    MAX_RECREATIONS,
    merge_failed_pods,
    recreations,
    with_deleted_job,
    without_peers,
)
from sae_operator.reconcile.children import StepWanted, config_map, step_objects
from sae_operator.reconcile.conditions import (
    IMAGE_PULL_FAILED,
    OOM_KILLED,
    POD_NOT_STARTING,
    PROGRESS_UNREACHABLE,
    SUSPENDING,
    UNSCHEDULABLE,
    Finding,
)
from sae_operator.reconcile.deadlines import DEADLINE_EXCEEDED, seconds_to_start
from sae_operator.reconcile.diagnosis import (
    SLOW_START,
    Failure,
    Surroundings,
    describe_failed_job,
    describe_failed_pod,
    exhausted_index,
    find_ailments,
    find_stuck,
    late_start,
    repeated_oom,
)
from sae_operator.reconcile.names import attempt_of, child_name, step_of
from sae_operator.reconcile.observed import JobFacts, PodFacts
from sae_operator.reconcile.scene import Draft, Scene, is_suspending, phase_of

# Pods of a finished Job are listed again soon: all that is missing is their message.
SETTLING_SECONDS = 1.0


@dataclass(frozen=True)
class StepPlan:
    """How a kind runs one of its steps.

    Attributes:
        waiting_phase, running_phase: the status' phase without and with a live pod.
        build: the Job's manifest for an attempt.
        needs_result: the step's message carries what the next step or the status needs.
        checkpoint_time: when work was last made safe; what an OOM kill after it costs is not lost.
        can_build: what the pods are given is known.
        limit_per_index: how often each completion index may fail, where pods work apart from each other.
    """

    step: str
    waiting_phase: str
    running_phase: str
    build: Callable[[int], StepWanted]
    surroundings: Surroundings
    needs_result: bool = True
    checkpoint_time: datetime | None = None
    can_build: bool = True
    limit_per_index: int | None = None


@dataclass(frozen=True)
class StepView:
    """What a step's newest Job in this round has come to.

    Attributes:
        state: `absent` no Job; `ending` the Job is being deleted; `unseen` its pods have not been listed yet;
            `waiting` no pod lives; `running`; `settling` its pods have ended, and the Job's end or the message is not
            there yet; `succeeded`; `failed`.
        result: its message; None when there is none, even after the grace period.
        failure: why it failed.
    """

    state: Literal["absent", "ending", "unseen", "waiting", "running", "settling", "succeeded", "failed"]
    job: JobFacts | None = None
    pods: tuple[PodFacts, ...] = ()
    result: StepResult | None = None
    failure: Failure | None = None


def view_step(scene: Scene[Any], plan: StepPlan) -> StepView:
    """Judge a step by its newest Job and that Job's pods."""
    jobs = [job for job in scene.round_jobs if job.step == plan.step]
    if not jobs:
        return StepView("absent")
    job = max(jobs, key=lambda job: job.attempt)
    pods = tuple(pod for pod in scene.children.pods if pod.job_name == job.name)
    if job.complete:
        # Of pods that worked together the first one tells figures; the others only that they have ended.
        first = (pod for pod in pods if not pod.index)
        result = next((pod.result for pod in first if pod.phase == "Succeeded" and pod.result is not None), None)
        settled = result is not None or not plan.needs_result or _grace_is_over(scene, job)
        return StepView("succeeded" if settled else "settling", job, pods, result)
    if job.failed_reason is not None:
        told = any(pod.phase == "Failed" for pod in pods)
        if not told and not _grace_is_over(scene, job):
            return StepView("settling", job, pods)
        return StepView("failed", job, pods, failure=describe_failed_job(job, pods, plan.surroundings))
    if job.deleting:
        return StepView("ending", job, pods)
    if job.active > 0 and not scene.children.pods_listed:
        return StepView("unseen", job)
    failure = repeated_oom(pods, plan.surroundings, plan.checkpoint_time)
    if failure is None and plan.limit_per_index is not None:
        failure = exhausted_index(job, pods, plan.limit_per_index, plan.surroundings)
    if failure is not None:
        return StepView("failed", job, pods, failure=failure)
    # Pods of a Job that a queue has taken back may still write a checkpoint: it runs no more.
    if not job.suspended and any(pod.running for pod in pods):
        # A Job without an active pod has seen them end; the listing of pods is older than that.
        return StepView("running" if job.active > 0 else "settling", job, pods)
    return StepView("settling" if _will_end(scene, pods) else "waiting", job, pods)


def _will_end(scene: Scene[Any], pods: tuple[PodFacts, ...]) -> bool:
    """Whether the pods have just said how the Job will end, before its controller does."""
    times = [pod.finish_time for pod in pods if pod.finish_time is not None]
    if not times or (scene.now - max(times)).total_seconds() >= scene.settings.result_grace_seconds:
        return False
    invalid = any(pod.exit_code == ExitCode.INVALID for pod in pods)
    return invalid or all(pod.phase == "Succeeded" for pod in pods)


def _grace_is_over(scene: Scene[Any], job: JobFacts) -> bool:
    if job.finish_time is None:
        return True
    # A Job that ends long after now ended before the clock was put back.
    return abs((scene.now - job.finish_time).total_seconds()) >= scene.settings.result_grace_seconds


def drive_step(scene: Scene[Any], draft: Draft, plan: StepPlan) -> StepView:
    """Bring a step forward; the draft then tells where it stands, but for success, from which the caller goes on."""
    draft.attempts = draft.attempts or list(scene.previous.attempts or ())
    _note_deleted_job(scene, draft, plan)
    view = view_step(scene, plan)
    if view.job is not None:
        draft.updates["job_name"] = view.job.name
        draft.updates["attempt"] = view.job.attempt
        draft.attempts = merge_failed_pods(
            draft.attempts, without_peers(view.pods), lambda pod: describe_failed_pod(pod, plan.surroundings)
        )
        if view.state != "succeeded":
            found = find_ailments(view.pods, scene.children.unreachable, plan.surroundings, scene.settings, scene.now)
            draft.findings.extend(_steady(found, scene.previous.conditions or ()))
            draft.findings.extend(_without_pods(scene, view))
    if view.state != "succeeded":
        draft.findings.extend(find_stuck(scene.children.pods, scene.now))
    overdue = _overdue(scene, draft, plan, view)
    if overdue is not None:
        fail(scene, draft, overdue)
    elif view.state == "absent":
        _start(scene, draft, plan)
    elif view.state == "ending":
        phase = "Suspended" if phase_of(scene.previous) == "Suspended" else plan.waiting_phase
        reason = SUSPENDING if is_suspending(scene.previous) else "JobEnding"
        draft.stand(phase, "working", reason, f"waits for Job {_name(view)} to be deleted")
        draft.watch_pods(scene.settings)
    elif view.state == "unseen":
        # An operator that has just begun: what the last one told stays until there is something to compare it with.
        draft.hold = True
        draft.stand(plan.waiting_phase, "working", *_quiet_words(plan, _name(view)))
        draft.watch_pods(scene.settings)
    elif view.state == "settling":
        # What is told stays for this moment: going back to Queued would tell a lie.
        draft.hold = True
        draft.stand(plan.waiting_phase, "working", "Finishing", f"waits for the end of Job {_name(view)} to be told")
        draft.watch_pods(scene.settings)
        draft.look_again(SETTLING_SECONDS)
    elif view.state == "failed":
        failure = view.failure or Failure("Failed", f"Job {_name(view)} failed")
        fail(scene, draft, failure)
    elif view.state in ("waiting", "running"):
        _renew_config_map(scene, draft, plan, view)
        _tell_of_work(scene, draft, plan, view)
    _end_strays(scene, draft, view)
    return view


def _overdue(scene: Scene[Any], draft: Draft, plan: StepPlan, view: StepView) -> Failure | None:
    """Why a deadline ends the round now; while none does, the draft is told when the next one is due."""
    if view.state not in ("absent", "ending", "waiting", "running"):
        return None
    limit, active = scene.run.active_deadline_seconds, scene.active
    if limit is not None:
        left = limit - active.total(scene.now)
        field = f"{plan.surroundings.run_field}.activeDeadlineSeconds"
        if left <= 0:
            message = f"pods have worked for {field} ({limit} s); raise it and spec.retry to go on from what is stored"
            return Failure(DEADLINE_EXCEEDED, message)
        if active.since is not None:
            draft.look_again(left)
    limit = scene.run.startup_deadline_seconds
    for pod in view.pods:
        left = seconds_to_start(pod, limit, scene.now)
        if left is not None and left <= 0:
            found = find_ailments([pod], {}, plan.surroundings, scene.settings, scene.now)
            return late_start(pod, limit, _steady(found, scene.previous.conditions or ()), plan.surroundings)
        if left is not None:
            draft.look_again(left)
    return None


def _renew_config_map(scene: Scene[Any], draft: Draft, plan: StepPlan, view: StepView) -> None:
    """Ask for the ConfigMap once more when its pod begins to take long: the kubelet, which waits for one that somebody
    has deleted, tells so in an event alone."""
    told = {condition.type for condition in scene.previous.conditions or ()}
    slow = any(finding.reason == SLOW_START and finding.type not in told for finding in draft.findings)
    if slow and plan.can_build and view.job is not None:
        draft.create.append(config_map(plan.build(view.job.attempt)))


def _without_pods(scene: Scene[Any], view: StepView) -> list[Finding]:
    """A Job whose pods the API server refuses tells so in an event alone: say where to look."""
    job = view.job
    if view.state != "waiting" or view.pods or job is None or job.suspended or job.creation_time is None:
        return []
    if (scene.now - job.creation_time).total_seconds() < scene.settings.slow_start_seconds:
        return []
    message = (
        f"Job {job.name} has no pod yet: a quota or an admission policy of namespace {scene.metadata.namespace} may"
        f" refuse it (kubectl describe job {job.name} tells)"
    )
    return [Finding(POD_NOT_STARTING, "NoPod", message, "Unknown")]


def _steady(found: Sequence[Finding], before: Sequence[Condition]) -> list[Finding]:
    """The kubelet alternates between the cause (ErrImagePull) and that it backs off: the cause stays. The scheduler
    counts nodes, which come and go: another count alone is no news."""
    told = {condition.type: condition for condition in before if condition.status == "True"}
    steady: list[Finding] = []
    for finding in found:
        known = told.get(finding.type)
        if known is not None:
            backs_off = finding.type == IMAGE_PULL_FAILED and finding.reason == "ImagePullBackOff"
            if backs_off or (finding.type == UNSCHEDULABLE and _counts_alone_differ(finding, known)):
                finding = Finding(finding.type, known.reason, known.message)
        steady.append(finding)
    return steady


def _counts_alone_differ(finding: Finding, known: Condition) -> bool:
    """Whether two messages are about the same pod and say the same of it but for numbers."""
    (pod, _, now), (same_pod, _, before) = (said.message.partition(": ") for said in (finding, known))
    return pod == same_pod and re.sub(r"\d+", "", now) == re.sub(r"\d+", "", before)


def fail(scene: Scene[Any], draft: Draft, failure: Failure) -> None:
    """The round ends without success; whatever still works for it is ended."""
    draft.stand("Failed", "failed", failure.reason, failure.message)
    draft.delete(scene.unfinished_jobs)
    draft.requeue_after = None
    draft.poll_pods = False


def _note_deleted_job(scene: Scene[Any], draft: Draft, plan: StepPlan) -> None:
    """A Job that the status tells of and that is gone was deleted by somebody else, unless we were suspended."""
    told, suspended = scene.previous.job_name, phase_of(scene.previous) == "Suspended" or is_suspending(scene.previous)
    if told is None or scene.previous_step != plan.step or suspended:
        return
    if not any(job.name == told for job in scene.children.jobs):
        draft.attempts = with_deleted_job(draft.attempts, plan.step, told, scene.now)


def _start(scene: Scene[Any], draft: Draft, plan: StepPlan) -> None:
    """Create the step's Job, once nothing else of the resource works any more."""
    if recreations(draft.attempts, plan.step) > MAX_RECREATIONS:
        message = f"the Job of step {plan.step} was deleted {MAX_RECREATIONS + 1} times before it had finished"
        fail(scene, draft, Failure("JobDeleted", f"{message}; raise spec.retry to run it again"))
        return
    paused = phase_of(scene.previous) == "Suspended"
    if scene.unfinished_jobs or scene.orphaned_pods:
        # Still Suspended: a Job that is gone because of that is not one that somebody deleted.
        phase = "Suspended" if paused else plan.waiting_phase
        reason = SUSPENDING if is_suspending(scene.previous) else "EarlierPodsEnding"
        draft.stand(phase, "working", reason, "waits for the pods of an earlier attempt to end")
        draft.watch_pods(scene.settings)
        return
    attempt = _next_attempt(scene, plan.step)
    draft.create.extend(step_objects(plan.build(attempt)))
    name = child_name(scene.metadata, plan.step, attempt)
    draft.updates["job_name"] = name
    draft.updates["attempt"] = attempt
    draft.stand(plan.waiting_phase, "working", *_quiet_words(plan, name))
    draft.watch_pods(scene.settings)


def _next_attempt(scene: Scene[Any], step: str) -> int:
    """One more than any attempt that is, or was told of: a name is not used twice while anything knows it."""
    seen = [job.attempt for job in scene.children.jobs if job.step == step]
    told = scene.stored.job_name
    if told is not None and step_of(told, scene.metadata) == step:
        seen.append(attempt_of(told))
    seen.extend(attempt_of(entry.job_name) for entry in scene.stored.attempts or () if entry.step == step)
    return 1 + max(seen, default=0)


def _tell_of_work(scene: Scene[Any], draft: Draft, plan: StepPlan, view: StepView) -> None:
    running = view.state == "running"
    phase = plan.running_phase if running else plan.waiting_phase
    hindrance = next(
        (finding for finding in draft.findings if finding.type not in (OOM_KILLED, PROGRESS_UNREACHABLE)), None
    )
    if running:
        draft.stand(phase, "working", "Working", _working(plan, _name(view)))
    elif hindrance is not None:
        draft.stand(phase, "working", hindrance.type, hindrance.message)
    elif view.job is not None and view.job.suspended:
        draft.stand(phase, "working", "Queued", f"Job {_name(view)} is held by a queue")
    elif view.pods and all(pod.finished for pod in view.pods) and draft.attempts:
        last = draft.attempts[-1]
        draft.stand(phase, "working", "Retrying", f"a pod is started again after {last.reason}: {last.message}")
    else:
        draft.stand(phase, "working", *_quiet_words(plan, _name(view)))
    draft.live = running
    draft.watch_pods(scene.settings)


def _working(plan: StepPlan, job_name: str) -> str:
    return f"step {plan.step} runs as Job {job_name}"


def _quiet_words(plan: StepPlan, job_name: str) -> tuple[str, str]:
    """Reason and message of a Job that has no live pod yet; the same as with one where the phase is the same."""
    if plan.waiting_phase == plan.running_phase:
        return "Working", _working(plan, job_name)
    return "Queued", f"Job {job_name} waits for a pod to start"


def _end_strays(scene: Scene[Any], draft: Draft, view: StepView) -> None:
    """Only the step's own Job may work: end what an earlier round, or a race, has left."""
    current = view.job.name if view.job is not None else None
    draft.delete([job for job in scene.unfinished_jobs if job.name != current])


def _name(view: StepView) -> str:
    return view.job.name if view.job is not None else ""
