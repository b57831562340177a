"""`status.attempts`: the last failures of a round of work, and how often its Job had to be made anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from sae_operator.api.status import AttemptStatus
from sae_operator.api.steps import PEER_LOST
from sae_operator.reconcile.conditions import rfc3339
from sae_operator.reconcile.diagnosis import Failure
from sae_operator.reconcile.observed import PodFacts

KEPT = 10
MAX_MESSAGE = 300
KEPT_BEGINNING = 80
JOB_DELETED = "JobDeleted"
# A Job that somebody (or something) keeps deleting is not made for ever.
MAX_RECREATIONS = 3


def without_peers(pods: Sequence[PodFacts]) -> Sequence[PodFacts]:
    """The pods without those that failed because another one had, where that one is among them."""
    lost = [pod for pod in pods if pod.result is not None and pod.result.reason == PEER_LOST]
    if not any(pod.phase == "Failed" for pod in pods if pod not in lost):
        return pods
    return [pod for pod in pods if pod not in lost]


def merge_failed_pods(
    previous: Sequence[AttemptStatus], pods: Sequence[PodFacts], describe: Callable[[PodFacts], Failure]
) -> list[AttemptStatus]:
    """The earlier failures and those of `pods`, each once, the newest last.

    The order depends on nothing but what they are: a failure that a status had no room for is found again as long as
    its pod is there, and must not look like a new one then.
    """
    found = list(previous)
    known = {(entry.job_name, entry.reason, entry.time) for entry in previous}
    for pod in pods:
        if pod.phase != "Failed":
            continue
        failure = describe(pod)
        entry = AttemptStatus(
            step=pod.step,
            job_name=pod.job_name,
            reason=failure.reason,
            message=_shortened(failure.message),
            time=rfc3339(pod.finish_time) if pod.finish_time is not None else None,
        )
        key = (entry.job_name, entry.reason, entry.time)
        if key not in known:
            known.add(key)
            found.append(entry)
    return sorted(found, key=lambda entry: (entry.time or "", entry.job_name, entry.reason))


def _shortened(message: str) -> str:
    """Begin and end of a message: what ended, and the last words of its log, which tell why."""
    if len(message) <= MAX_MESSAGE:
        return message
    return f"{message[:KEPT_BEGINNING]}...{message[KEPT_BEGINNING + 3 - MAX_MESSAGE :]}"


def with_deleted_job(previous: Sequence[AttemptStatus], step: str, job_name: str, now: datetime) -> list[AttemptStatus]:
    """The failures and that a step's Job is gone although it had not finished; told once per Job."""
    if any(entry.job_name == job_name and entry.reason == JOB_DELETED for entry in previous):
        return list(previous)
    message = "the Job was deleted before it had finished"
    return [
        *previous,
        AttemptStatus(step=step, job_name=job_name, reason=JOB_DELETED, message=message, time=rfc3339(now)),
    ]


def recreations(entries: Sequence[AttemptStatus], step: str) -> int:
    """How many Jobs of the step were deleted before they had finished."""
    return sum(entry.step == step and entry.reason == JOB_DELETED for entry in entries)


def kept(entries: Sequence[AttemptStatus]) -> list[AttemptStatus] | None:
    """What a status holds of them: the newest, deletions first to stay, since they are counted."""
    deleted = [entry for entry in entries if entry.reason == JOB_DELETED]
    others = [entry for entry in entries if entry.reason != JOB_DELETED]
    room = max(0, KEPT - len(deleted))
    chosen = {id(entry) for entry in [*deleted[-KEPT:], *(others[-room:] if room else [])]}
    return [entry for entry in entries if id(entry) in chosen] or None
