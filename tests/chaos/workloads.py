"""Garbage collector, Job controller, scheduler and kubelet of the cluster in memory.

Each acts a moment after something has changed, as real ones do, on what is there then. The Job controller counts each
ended pod once, as the real one's finalizers ensure: what it has counted stays counted when the pod is deleted.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sae_operator.reconcile.names import LABEL_STEP
from tests.chaos.api_server import (
    FOREGROUND,
    ApiServer,
    Object,
    Place,
    Write,
    controller_uid,
    ended_job,
    ended_pod,
    place_of,
    without_absent_owners,
)
from tests.chaos.results import ObjectStore
from tests.chaos.simulated_time import SimulatedLoop, rfc3339
from tests.chaos.transport import share

INDEX = "batch.kubernetes.io/job-completion-index"
JOB_NAME = "batch.kubernetes.io/job-name"
# How long a controller takes to notice: between these.
NOTICE_SECONDS = (0.02, 0.4)
NODE = "node"


@dataclass(frozen=True)
class Fate:
    """What becomes of a pod.

    Attributes:
        starts_after, runs: seconds.
        waits: reason and message of a container that does not start for now; `Unschedulable` is the scheduler's.
        exit_code, reason: how the container ends.
        message: it leaves its result.
        disrupted: a disruption of its node ends it.
    """

    starts_after: float = 0.3
    runs: float = 2.0
    waits: tuple[str, str] | None = None
    exit_code: int = 0
    reason: str | None = None
    message: bool = True
    disrupted: bool = False


@dataclass
class _Book:
    """What the Job controller knows of a Job's pods."""

    counted: set[str] = field(default_factory=set)
    succeeded: set[int] = field(default_factory=set)
    failures: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    made: int = 0


@dataclass
class Workloads:
    """Attributes:
    fate: what becomes of a pod, asked when it is made; asked again, while it waits, by `heal`.
    running: called when a pod begins to run.
    """

    loop: SimulatedLoop
    server: ApiServer
    store: ObjectStore
    seed: object
    fate: Callable[[Object], Fate]
    running: Callable[[Object], None] = lambda pod: None
    _books: dict[str, _Book] = field(default_factory=dict)
    _due: bool = False
    _handles: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    _addresses: int = 0
    # Uids of pods that run, with their address: what answers polls.
    addresses: dict[str, Object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server.listeners.append(self._wrote)

    def _wrote(self, write: Write) -> None:
        if write.plural == "pods" and write.after is None:
            self._forget(write.object)
        elif write.plural == "jobs" and write.after is None:
            self._books.pop(write.object["metadata"]["uid"], None)
            self._cancel(write.object)
        if write.plural in ("events", "leases") or self._due:
            return
        self._due = True
        low, high = NOTICE_SECONDS
        self.loop.call_later(low + (high - low) * share(self.seed, "notice", write.version), self._act)

    def _act(self) -> None:
        self._due = False
        self._collect_garbage()
        pods: defaultdict[str | None, list[Object]] = defaultdict(list)
        for pod in self.server.all("pods"):
            pods[controller_uid(pod)].append(pod)
        for job in self.server.all("jobs"):
            self._sync(job, pods[job["metadata"]["uid"]])
        for pod in self.server.all("pods"):
            self._look_at(pod)

    # The garbage collector

    def _collect_garbage(self) -> None:
        there = {found["metadata"]["uid"] for found in self.server.objects.values()}
        for place, found in sorted(self.server.objects.items()):
            meta = found["metadata"]
            references = meta.get("ownerReferences")
            if references and "deletionTimestamp" not in meta:
                alive = without_absent_owners(found, there)
                if not alive:
                    self.server.delete(*place)
                elif len(alive) < len(references):
                    self.server.merge(*place, {"metadata": {"ownerReferences": alive}})
            if FOREGROUND in (meta.get("finalizers") or ()):
                self._delete_in_foreground(place, meta["uid"])

    def _delete_in_foreground(self, place: Place, uid: str) -> None:
        """Dependents first; those that block are waited for."""
        blocking = False
        for other_place, other in sorted(self.server.objects.items()):
            references = [one for one in other["metadata"].get("ownerReferences") or [] if one["uid"] == uid]
            if not references:
                continue
            if "deletionTimestamp" not in other["metadata"]:
                self.server.delete(*other_place)
            there = other_place in self.server.objects
            blocking = blocking or (there and bool(references[0].get("blockOwnerDeletion")))
        if not blocking:
            self.server.remove(place)

    # The Job controller

    def _sync(self, job: Object, pods: list[Object]) -> None:
        if ended_job(job):
            self._expire(job)
            return
        if "deletionTimestamp" in job["metadata"] or job["spec"].get("suspend"):
            return
        book = self._books.setdefault(job["metadata"]["uid"], _Book())
        for pod in pods:
            self._count(book, job, pod)
        end = self._end_of(book, job, pods)
        active = [pod for pod in pods if not ended_pod(pod)]
        if end is not None:
            for pod in active:
                self.server.delete(*place_of(pod))
            condition = {"type": end[0], "status": "True", "reason": end[1], "lastTransitionTime": self._time()}
            self.server.set_status(
                job, active=0, succeeded=len(book.succeeded), failed=sum(book.failures.values()), conditions=[condition]
            )
            return
        missing = [
            index
            for index in range(job["spec"].get("completions") or 1)
            if index not in book.succeeded and not any(_index(pod) == index for pod in active)
        ]
        for index in missing:
            self._make_pod(book, job, index)
        self.server.set_status(
            job,
            active=len(active) + len(missing),
            succeeded=len(book.succeeded),
            failed=sum(book.failures.values()),
        )

    def _count(self, book: _Book, job: Object, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if not ended_pod(pod) or uid in book.counted:
            return
        book.counted.add(uid)
        if pod["status"]["phase"] == "Succeeded":
            book.succeeded.add(_index(pod))
        elif not _ignored(job, pod):
            book.failures[_index(pod)] += 1

    def _end_of(self, book: _Book, job: Object, pods: list[Object]) -> tuple[str, str] | None:
        spec = job["spec"]
        if any(_exit_code(pod) == 2 for pod in pods):
            return "Failed", "PodFailurePolicy"
        if "backoffLimitPerIndex" in spec:
            bad = [index for index, count in book.failures.items() if count > spec["backoffLimitPerIndex"]]
            if len(bad) > spec.get("maxFailedIndexes", 0):
                return "Failed", "MaxFailedIndexesExceeded"
        elif sum(book.failures.values()) > spec.get("backoffLimit", 6):
            return "Failed", "BackoffLimitExceeded"
        if len(book.succeeded) == (spec.get("completions") or 1):
            return "Complete", "CompletionsReached"
        return None

    def _expire(self, job: Object) -> None:
        seconds = job["spec"].get("ttlSecondsAfterFinished")
        uid = job["metadata"]["uid"]
        if seconds is not None and uid not in self._handles:
            self._handles[uid] = self.loop.call_later(seconds, self._delete_expired, job)

    def _delete_expired(self, job: Object) -> None:
        found = self.server.objects.get(place_of(job))
        if found is not None and found["metadata"]["uid"] == job["metadata"]["uid"]:
            self.server.delete(*place_of(job))

    def _make_pod(self, book: _Book, job: Object, index: int) -> None:
        template, meta = job["spec"]["template"], job["metadata"]
        # The real one takes a random end, so that pods of a deleted Job of the same name are not in the way.
        name = f"{meta['name']}-{index}-{meta['uid'][:4]}{book.made}"
        book.made += 1
        owner = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": meta["name"],
            "uid": meta["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        annotations = dict(template["metadata"].get("annotations") or {})
        if "completions" in job["spec"]:
            annotations[INDEX] = str(index)
        self.server.create(
            "pods",
            meta["namespace"],
            {
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "labels": template["metadata"]["labels"] | {JOB_NAME: meta["name"]},
                    "annotations": annotations,
                    "ownerReferences": [owner],
                },
                "spec": template["spec"],
                "status": {"phase": "Pending"},
            },
        )

    # Scheduler and kubelet

    def _look_at(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if "deletionTimestamp" in pod["metadata"]:
            self._later(pod, 0.5, self._terminate)
        elif pod["status"]["phase"] == "Pending" and uid not in self._handles:
            fate = self.fate(pod)
            self._later(pod, fate.starts_after, self._start, fate)

    def heal(self) -> None:
        """What keeps pods from starting is over."""
        for pod in self.server.all("pods"):
            if pod["status"]["phase"] == "Pending":
                self._cancel(pod)
                self._look_at(pod)

    def _later(self, pod: Object, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        self._cancel(pod)
        self._handles[pod["metadata"]["uid"]] = self.loop.call_later(seconds, action, pod, *arguments)

    def _cancel(self, pod: Object) -> None:
        handle = self._handles.pop(pod["metadata"]["uid"], None)
        if handle is not None:
            handle.cancel()

    def _forget(self, pod: Object) -> None:
        self._cancel(pod)
        self.addresses.pop((pod["status"].get("podIP")) or "", None)

    def _current(self, pod: Object) -> Object | None:
        found = self.server.objects.get(place_of(pod))
        return found if found is not None and found["metadata"]["uid"] == pod["metadata"]["uid"] else None

    def _start(self, pod: Object, fate: Fate) -> None:
        current = self._current(pod)
        if current is None or "deletionTimestamp" in current["metadata"]:
            return
        if fate.waits is not None and fate.waits[0] == "Unschedulable":
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": fate.waits[1]}
            self.server.set_status(current, conditions=[condition])
            return
        current = self.server.merge(*place_of(current), {"spec": {"nodeName": NODE}})
        given = self._config_map(current)
        if fate.waits is not None or given is None:
            reason, message = fate.waits or ("ContainerCreating", "")
            state = {"waiting": {"reason": reason, "message": message}}
            begun = current["status"].get("startTime") or self._time()
            self.server.set_status(
                current, startTime=begun, containerStatuses=[{"name": "step", "state": state}], conditions=[]
            )
            if given is None:
                # The kubelet tries to mount it again and again.
                self._later(current, 10.0, self._start, fate)
            return
        self._addresses += 1
        address = f"10.0.{self._addresses // 250}.{self._addresses % 250 + 1}"
        current = self.server.set_status(
            current,
            phase="Running",
            startTime=self._time(),
            podIP=address,
            conditions=[],
            containerStatuses=[{"name": "step", "state": {"running": {"startedAt": self._time()}}}],
        )
        self.addresses[address] = current
        self.running(current)
        self._later(current, fate.runs, self._end, fate, given)

    def _config_map(self, pod: Object) -> Object | None:
        name = next(volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume)
        return self.server.objects.get(("configmaps", pod["metadata"]["namespace"], name))

    def _end(self, pod: Object, fate: Fate, given: Object) -> None:
        current = self._current(pod)
        if current is None or "deletionTimestamp" in current["metadata"]:
            return
        message = ""
        if fate.exit_code == 0:
            # It was read when the pod began, whatever became of the ConfigMap since.
            message = self.store.finish(current["metadata"]["labels"][LABEL_STEP], given)
        self._finish(current, fate.exit_code, fate.reason, message if fate.message else "", disrupted=fate.disrupted)

    def _finish(self, pod: Object, code: int, reason: str | None, message: str, *, disrupted: bool = False) -> None:
        terminated = {"exitCode": code, "reason": reason, "message": message, "finishedAt": self._time()}
        conditions = [{"type": "DisruptionTarget", "status": "True"}] if disrupted else []
        self.addresses.pop((pod["status"].get("podIP")) or "", None)
        self.server.set_status(
            pod,
            phase="Succeeded" if code == 0 else "Failed",
            conditions=conditions,
            containerStatuses=[{"name": "step", "state": {"terminated": terminated}}],
        )

    def _terminate(self, pod: Object) -> None:
        """A pod that is deleted: SIGTERM, its end, and it is gone once the Job controller has counted it."""
        current = self._current(pod)
        if current is None:
            return
        if not ended_pod(current):
            started = current["status"]["phase"] == "Running"
            step = current["metadata"]["labels"][LABEL_STEP]
            text = f'{{"step": "{step}", "exitCode": 143, "reason": "Checkpointed"}}'
            disrupted = bool(current["metadata"].get("annotations", {}).get("vanished"))
            self._finish(current, 143, None, text if started and not disrupted else "", disrupted=disrupted)
            self._later(current, 0.5, self._terminate)
            return
        self.server.remove(place_of(current))

    def lose_node(self) -> None:
        """The node vanishes: its pods are unreachable, and then ended by a disruption."""
        for pod in self.server.all("pods"):
            if pod["spec"].get("nodeName") and not ended_pod(pod):
                self._cancel(pod)
                self.addresses.pop(pod["status"].get("podIP") or "", None)
                self._later(pod, 45.0, self._evict)

    def _evict(self, pod: Object) -> None:
        current = self._current(pod)
        if current is None:
            return
        marked = self.server.merge(*place_of(current), {"metadata": {"annotations": {"vanished": "true"}}})
        if "deletionTimestamp" not in marked["metadata"]:
            self.server.delete(*place_of(marked))
        else:
            self._later(marked, 0.5, self._terminate)

    def _time(self) -> str:
        return rfc3339(self.loop.today())


def _index(pod: Object) -> int:
    return int(pod["metadata"]["annotations"].get(INDEX, "0"))


def _exit_code(pod: Object) -> int | None:
    statuses = pod["status"].get("containerStatuses") or [{}]
    return statuses[0].get("state", {}).get("terminated", {}).get("exitCode")


def _ignored(job: Object, pod: Object) -> bool:
    """By the Job's pod failure policy."""
    disrupted = any(item["type"] == "DisruptionTarget" for item in pod["status"].get("conditions") or [])
    stopped = any(
        143 in rule.get("onExitCodes", {}).get("values", ()) and rule["action"] == "Ignore"
        for rule in job["spec"].get("podFailurePolicy", {}).get("rules", ())
    )
    return disrupted or (stopped and _exit_code(pod) == 143)
