"""What ails a pod or a Job, in words that tell its user what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sae_operator.api.steps import PEER_LOST, ExitCode
from sae_operator.reconcile.conditions import (
    IMAGE_PULL_FAILED,
    NODE_UNREACHABLE,
    OOM_KILLED,
    POD_NOT_STARTING,
    PROGRESS_UNREACHABLE,
    SECRET_MISSING,
    UNSCHEDULABLE,
    Finding,
)
from sae_operator.reconcile.observed import JobFacts, OperatorSettings, PodFacts

IMAGE_REASONS = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
        "RegistryUnavailable",
    }
)
# Reasons of a container that is on its way and has nothing to complain of.
STARTING_REASONS = frozenset({"ContainerCreating", "PodInitializing"})
# Reason of a finding about a container that takes long to be created.
SLOW_START = "ContainerCreating"
# A pod that is still there so long after it should be gone is on a node that does not end it.
STUCK_AFTER_SECONDS = 30.0
# An OOM kill may be bad luck (a neighbour on the node); the second one is the job's own size.
OOM_KILLS_ALLOWED = 1


@dataclass(frozen=True)
class Failure:
    """Why a step ended, or must end, without success."""

    reason: str
    message: str


@dataclass(frozen=True)
class Surroundings:
    """What messages about a pod name.

    Attributes:
        run_field: path of the run settings, e.g. `spec.run`.
        resources_field: path of the step's resources, e.g. `spec.run.cpuSteps.resources`.
        limits: the step's resource limits.
        secrets: tells the Secrets that the pod mounts; seldom asked for.
    """

    namespace: str
    run_field: str
    resources_field: str
    limits: Mapping[str, int | str]
    secrets: Callable[[], Sequence[str]] = tuple

    @property
    def memory_limit(self) -> str:
        limit = self.limits.get("memory")
        return f"its memory limit of {limit}" if limit is not None else "the node's memory (no limit is set)"


def find_ailments(
    pods: Sequence[PodFacts],
    unreachable: Mapping[str, str],
    surroundings: Surroundings,
    settings: OperatorSettings,
    now: datetime,
) -> list[Finding]:
    """Further conditions for the pods of the current Job."""
    findings: list[Finding] = []
    for pod in pods:
        if not pod.finished and not pod.deleting:
            findings.extend(_not_starting(pod, surroundings, settings, now))
        if pod.lost:
            findings.append(_lost(pod))
        if pod.oom_killed:
            findings.append(Finding(OOM_KILLED, "OOMKilled", _oom_message(pod, surroundings)))
        if pod.running and pod.name in unreachable and _age(pod.start_time, now) > settings.unreachable_after_seconds:
            findings.append(
                Finding(
                    PROGRESS_UNREACHABLE,
                    "NoAnswer",
                    f"pod {pod.name} does not answer on {pod.ip}: {unreachable[pod.name]}; it works on, but its"
                    " progress is not shown (does a NetworkPolicy keep the operator out?)",
                )
            )
    return findings


def find_stuck(pods: Sequence[PodFacts], now: datetime) -> list[Finding]:
    """Pods that were told to end and are still there: nothing else may work before they are gone."""
    return [
        Finding(
            NODE_UNREACHABLE,
            "PodNotEnding",
            f"pod {pod.name} was told to end and is still there: node {pod.node} does not answer; work goes on when it"
            f" does, or when the Node is deleted (kubectl delete node {pod.node}, only if it is really gone)",
        )
        for pod in pods
        if not pod.finished and _age(pod.deletion_time, now) > STUCK_AFTER_SECONDS
    ]


def _lost(pod: PodFacts) -> Finding:
    return Finding(
        NODE_UNREACHABLE,
        "NodeNotReady",
        f"node {pod.node} of pod {pod.name} does not answer; Kubernetes ends the pod after its tolerationSeconds (5"
        " minutes by default), and another one goes on from the last checkpoint when it is gone",
    )


def late_start(pod: PodFacts, deadline_seconds: int, found: Sequence[Finding], surroundings: Surroundings) -> Failure:
    """The failure of a pod that had a node and did not start in time, with what ails it."""
    ailment = found[0] if found else Finding(POD_NOT_STARTING, "", f"pod {pod.name} did not start on node {pod.node}")
    reason = ailment.type if ailment.status == "True" else POD_NOT_STARTING
    waited = f"not started within {surroundings.run_field}.startupDeadlineSeconds ({deadline_seconds} s)"
    return Failure(reason, f"{waited}: {ailment.message}; raise spec.retry to try again")


def _not_starting(pod: PodFacts, around: Surroundings, settings: OperatorSettings, now: datetime) -> list[Finding]:
    reason, message = pod.waiting_reason, pod.waiting_message or ""
    if pod.unschedulable is not None:
        return [
            Finding(
                UNSCHEDULABLE,
                "Unschedulable",
                f"no node can take pod {pod.name}: {pod.unschedulable}"
                f" (see {around.resources_field} and the selectors and tolerations of {around.run_field})",
            )
        ]
    if reason in IMAGE_REASONS:
        detail = f": {message}" if message else ""
        return [
            Finding(
                IMAGE_PULL_FAILED,
                reason or "ErrImagePull",
                f'image "{pod.image}" of pod {pod.name} cannot be pulled{detail}; correct {around.run_field}.image, or'
                f" {around.run_field}.imagePullSecrets for a private registry",
            )
        ]
    if reason is not None and "secret" in message.lower():
        return [
            Finding(
                SECRET_MISSING,
                reason,
                f"pod {pod.name} cannot start: {message}; create the Secret in namespace {around.namespace}"
                " (the pod starts by itself then)",
            )
        ]
    if reason is not None and reason not in STARTING_REASONS:
        return [Finding(POD_NOT_STARTING, reason, f"pod {pod.name} cannot start: {message or reason}")]
    if reason in STARTING_REASONS and _age(pod.start_time, now) > settings.slow_start_seconds:
        return [_slow_start(pod, around)]
    return []


def _slow_start(pod: PodFacts, around: Surroundings) -> Finding:
    """The kubelet tells a volume that cannot be mounted in an event alone: say what it most often is."""
    secrets = around.secrets()
    if not secrets:
        return Finding(
            POD_NOT_STARTING,
            SLOW_START,
            f"pod {pod.name} is still being created on node {pod.node}; its image may be large"
            f" (kubectl describe pod {pod.name})",
            "Unknown",
        )
    names = ", ".join(secrets)
    return Finding(
        SECRET_MISSING,
        SLOW_START,
        f"pod {pod.name} is still being created on node {pod.node}: either its image is large, or a Secret that it"
        f" mounts is missing from namespace {around.namespace} ({names}; kubectl describe pod {pod.name} tells)",
        "Unknown",
    )


def repeated_oom(
    pods: Sequence[PodFacts], surroundings: Surroundings, checkpoint_time: datetime | None
) -> Failure | None:
    """A failure when a pod (one completion index) was killed for memory twice with no checkpoint in between."""
    by_index: dict[int | None, list[PodFacts]] = {}
    for pod in pods:
        if pod.oom_killed:
            by_index.setdefault(pod.index, []).append(pod)
    for killed in by_index.values():
        killed.sort(key=lambda pod: (pod.finish_time is not None, pod.finish_time, pod.name))
        if len(killed) <= OOM_KILLS_ALLOWED:
            continue
        earlier, later = killed[-2], killed[-1]
        if checkpoint_time is not None and earlier.finish_time is not None and checkpoint_time > earlier.finish_time:
            continue
        return Failure("OOMKilled", f"killed for memory {len(killed)} times; {_oom_message(later, surroundings)}")
    return None


def exhausted_index(job: JobFacts, pods: Sequence[PodFacts], limit: int, surroundings: Surroundings) -> Failure | None:
    """A failure when pods of one completion index have failed more than `limit` times by themselves."""
    by_index: dict[int | None, list[PodFacts]] = {}
    for pod in pods:
        if pod.phase == "Failed" and not pod.disrupted:
            by_index.setdefault(pod.index, []).append(pod)
    failed = next((found for found in by_index.values() if len(found) > limit), None)
    return describe_failed_job(job, failed, surroundings) if failed is not None else None


def _oom_message(pod: PodFacts, surroundings: Surroundings) -> str:
    return (
        f"pod {pod.name} used more than {surroundings.memory_limit};"
        f" raise {surroundings.resources_field}.limits.memory and spec.retry"
    )


def describe_failed_pod(pod: PodFacts, surroundings: Surroundings) -> Failure:
    """How one pod ended."""
    if pod.oom_killed:
        return Failure("OOMKilled", _oom_message(pod, surroundings))
    if pod.result is not None:
        return Failure(pod.result.reason, pod.result.message or f"exit code {pod.result.exit_code}")
    detail = f": {pod.termination_text}" if pod.termination_text else ""
    if pod.disrupted:
        return Failure("Disrupted", f"pod {pod.name} was ended by a disruption of node {pod.node}{detail}")
    if pod.exit_code is not None:
        return Failure("StepFailed", f"pod {pod.name} ended with exit code {pod.exit_code}{detail}")
    return Failure(pod.termination_reason or "PodFailed", f"pod {pod.name} failed{detail}")


def describe_failed_job(job: JobFacts, pods: Sequence[PodFacts], surroundings: Surroundings) -> Failure:
    """Why a Job failed: what the pod said that ended it, else the last one that failed, else what the Job says."""
    ended = sorted(
        (pod for pod in pods if pod.phase == "Failed" and not pod.disrupted),
        key=lambda pod: (pod.finish_time is not None, pod.finish_time, pod.name),
    )
    fatal = [pod for pod in ended if pod.exit_code == ExitCode.INVALID]
    if fatal:
        return describe_failed_pod(fatal[-1], surroundings)
    if ended:
        # Of pods that work together, what the one said that the others lost.
        causes = [pod for pod in ended if pod.result is None or pod.result.reason != PEER_LOST]
        failure = describe_failed_pod((causes or ended)[-1], surroundings)
        times = f" (after {len(ended)} failed pods)" if len(ended) > 1 else ""
        return Failure(failure.reason, failure.message + times)
    return Failure(job.failed_reason or "Failed", job.failed_message or f"Job {job.name} failed")


def _age(since: datetime | None, now: datetime) -> float:
    return (now - since).total_seconds() if since is not None else 0.0
