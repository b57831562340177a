"""Deadlines: computed anew at every look from what the object and its pods tell, so that they outlive any restart.

No timer is kept anywhere. A look says when the next one is due; an operator that was away finds what is overdue when it
is back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sae_operator.api.status import CommonStatus
from sae_operator.reconcile.observed import PodFacts
from sae_operator.reconcile.projection import parse_time

DEADLINE_EXCEEDED = "DeadlineExceeded"


@dataclass(frozen=True)
class ActiveTime:
    """How long pods have worked on a round, all steps and retries together.

    Attributes:
        seconds: before `since`.
        since: since when at least one works; None while none does.
    """

    seconds: int = 0
    since: datetime | None = None

    def total(self, now: datetime) -> float:
        """Seconds until now."""
        running = (now - self.since).total_seconds() if self.since is not None else 0.0
        return self.seconds + max(running, 0.0)

    def stopped(self, at: datetime) -> ActiveTime:
        """The same when nothing works any more from a time on."""
        return ActiveTime(int(self.total(at)))


def known_active_time(status: CommonStatus) -> ActiveTime:
    """Active time as a status tells it."""
    return ActiveTime(status.active_seconds or 0, parse_time(status.active_since))


def active_time(known: ActiveTime, pods: Sequence[PodFacts], now: datetime) -> ActiveTime:
    """Active time by what was known and what all of the round's pods are now.

    Queueing, waiting for a node and pulling an image are no activity: only a container that runs is. A pod counts from
    its container's start, also when that was before anybody looked, and to its container's end.
    """
    # Nobody knows whether the pod of a node that does not answer works on.
    working = [pod for pod in pods if pod.running or pod.lost]
    begins = min((pod.begin_time for pod in working if pod.begin_time is not None), default=now)
    if known.since is None:
        return ActiveTime(known.seconds, min(begins, now)) if working else known
    ends = [pod.finish_time for pod in pods if pod.finish_time is not None and known.since <= pod.finish_time <= now]
    if not working:
        return known.stopped(max(ends, default=now))
    if ends and max(ends) < begins:
        # One ended and another began while nobody looked.
        return ActiveTime(known.stopped(max(ends)).seconds, begins)
    return known


def starts(pod: PodFacts) -> bool:
    """Whether the pod has a node and its container is yet to start."""
    begun = pod.running or pod.lost or pod.finished or pod.begin_time is not None
    return pod.start_time is not None and not begun and not pod.deleting


def seconds_to_start(pod: PodFacts, deadline_seconds: int, now: datetime) -> float | None:
    """Seconds that a pod which starts may still take; None for one that does not."""
    if pod.start_time is None or not starts(pod):
        return None
    return deadline_seconds - (now - pod.start_time).total_seconds()


def seconds_to_cleanup(status: CommonStatus, ttl_seconds: int | None, now: datetime) -> float | None:
    """Seconds until what a finished resource has left behind is to be deleted; None when it is kept."""
    ended = parse_time(status.completion_time)
    if ttl_seconds is None or ended is None:
        return None
    return ttl_seconds - (now - ended).total_seconds()
