"""A cluster in memory: it applies what reconciles want, plays the Job controller and the kubelet, and keeps a clock.

Objects have the shape of the real API's, so that the projections are part of what is tested. Every call that the
operator makes is numbered; the operator can be made to die right after any of them. Rules that must hold at every
moment (kstatus, one Job at work per resource, no `Running` without a live pod) are checked on every status written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.status import ActivationCacheStatus, SAETrainingJobStatus
from sae_operator.api.steps import CacheStep, Progress, TrainStep
from sae_operator.api.training_job import SAETrainingJobSpec
from sae_operator.reconcile import projection
from sae_operator.reconcile.cache import reconcile_cache
from sae_operator.reconcile.conditions import CREATE_REFUSED
from sae_operator.reconcile.names import LABEL_STEP, LABEL_UID, cache_name_of, is_controlled_by
from sae_operator.reconcile.observed import (
    CacheFacts,
    Defaults,
    ObservedCache,
    ObservedTrainingJob,
    OperatorSettings,
    OwnerFacts,
)
from sae_operator.reconcile.training_job import reconcile_training_job
from sae_operator.reconcile.wanted import Wanted
from tests.unit.reconcile.fake_store import FakeStore

Spec = TypeVar("Spec", ActivationCacheSpec, SAETrainingJobSpec)

CACHE, JOB = "ActivationCache", "SAETrainingJob"
SETTINGS = OperatorSettings(job_image="sae-job:test")
NAMESPACE = "lab"


class Died(Exception):
    """The operator's process has ended."""


@dataclass(frozen=True)
class PodScript:
    """What a pod does.

    Attributes:
        waits: reason and message of a container that cannot start.
        unschedulable: what the scheduler says.
        seconds: how long it runs.
        message: termination message; a result that fits the step when None.
        disrupted: a disruption of its node ends it.
        progress: what it says of itself after n seconds.
    """

    waits: tuple[str, str] | None = None
    unschedulable: str | None = None
    seconds: int = 3
    exit_code: int = 0
    reason: str | None = None
    message: str | None = None
    disrupted: bool = False
    progress: Callable[[int], dict[str, Any]] | None = None


Script = Callable[[str, int, int], PodScript]


def everything_works(step: str, index: int, earlier: int) -> PodScript:
    """A script: step, completion index, how many pods the index has had in this Job."""
    return PodScript()


@dataclass
class FakeCluster(FakeStore):
    """Attributes:
    resources: raw resources by kind and name.
    only_when_due: the operator looks at a resource only when it asked to or something about it has changed; otherwise
        every second.
    operator_away: nobody looks.
    node_away: the kubelet does nothing: pods stay as they are, also those that are to end.
    job_controller_away: no pods are made, and no Job ends.
    quota_used_up: the API server refuses Jobs.
    die_after: number of the operator's call after which it ends.
    die_after_changes: it ends after every call that changes something.
    """

    script: Script = everything_works
    only_when_due: bool = False
    defaults: Defaults = field(default_factory=Defaults)
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    resources: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    config_maps: dict[str, dict[str, Any]] = field(default_factory=dict)
    services: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=dict)
    created_jobs: list[str] = field(default_factory=list)
    statuses: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    events: list[tuple[str, str, str]] = field(default_factory=list)
    unreachable: dict[str, str] = field(default_factory=dict)
    calls: int = 0
    operator_away: bool = False
    node_away: bool = False
    job_controller_away: bool = False
    quota_used_up: bool = False
    die_after: int | None = None
    die_after_changes: bool = False
    lose_messages: frozenset[str] = frozenset()
    looks: int = 0
    _due: dict[tuple[str, str], datetime] = field(default_factory=dict)
    _seen: dict[tuple[str, str], object] = field(default_factory=dict)
    _listed: set[str] = field(default_factory=set)
    _ages: dict[str, int] = field(default_factory=dict)
    _uids: int = 0
    _specs: dict[tuple[str, int], Any] = field(default_factory=dict)

    # ---- what a user does

    def create(self, kind: str, name: str, spec: Mapping[str, Any]) -> None:
        self.resources[kind, name] = {
            "metadata": {
                "name": name,
                "namespace": NAMESPACE,
                "uid": self._uid(),
                "generation": 1,
                "ownerReferences": [],
            },
            "spec": dict(spec),
            "status": {"observedGeneration": -1},
        }

    def edit(self, kind: str, name: str, **changes: Any) -> None:
        raw = self.resources[kind, name]
        raw["spec"] = raw["spec"] | changes
        raw["metadata"]["generation"] += 1

    def delete_job(self, name: str) -> None:
        """As `kubectl delete job`: the Job is gone at once, its pods get SIGTERM."""
        del self.jobs[name]
        for pod in self.pods_of(name):
            pod["metadata"]["deletionTimestamp"] = self._time()

    # ---- what is asked of it

    def status(self, kind: str, name: str) -> dict[str, Any]:
        return self.resources[kind, name]["status"]

    def phase(self, kind: str, name: str) -> str | None:
        return self.status(kind, name).get("phase")

    def condition(self, kind: str, name: str, condition_type: str) -> dict[str, Any] | None:
        found = self.status(kind, name).get("conditions") or []
        return next((condition for condition in found if condition["type"] == condition_type), None)

    def pods_of(self, job: str) -> list[dict[str, Any]]:
        return [pod for pod in self.pods.values() if pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] == job]

    def step_spec(self, name: str) -> CacheStep | TrainStep:
        text = self.config_maps[name]["data"]["step.json"]
        return (CacheStep if "location" in json.loads(text) else TrainStep).model_validate_json(text)

    def phases(self, name: str) -> list[str]:
        """The phases that a resource's statuses told, each once in a row."""
        told = [status["phase"] for who, status in self.statuses if who == name]
        return [phase for i, phase in enumerate(told) if i == 0 or told[i - 1] != phase]

    # ---- time

    def run(self, seconds: int = 200) -> None:
        """Until nothing changes any more, for at most so many seconds."""
        quiet = 0
        for _ in range(seconds):
            before = self._fingerprint()
            self.tick()
            quiet = quiet + 1 if before == self._fingerprint() and not self._unfinished() else 0
            if quiet == 2:
                return

    def run_until(self, holds: Callable[[], bool], seconds: int = 200) -> None:
        for _ in range(seconds):
            if holds():
                return
            self.tick()
        raise AssertionError(f"not within {seconds} s; statuses: {json.dumps(self.statuses[-3:], indent=1)}")

    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.tick()

    def tick(self) -> None:
        """One second: the operator looks at everything, then Job controller and kubelet act."""
        if not self.operator_away:
            self.reconcile_all()
        if not self.job_controller_away:
            self._play_job_controller()
        if not self.node_away:
            self._play_kubelet()
        self.now += timedelta(seconds=1)

    def _unfinished(self) -> bool:
        return any(
            raw["status"].get("phase") not in ("Ready", "Succeeded", "Failed", "Suspended")
            for raw in self.resources.values()
        )

    def _fingerprint(self) -> object:
        pods = [(name, pod["status"]["phase"], self._ages[name]) for name, pod in self.pods.items()]
        return self.calls, list(self.resources), list(self.jobs), pods

    def _time(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")

    def _uid(self) -> str:
        self._uids += 1
        return f"{self._uids:08x}-0000-4000-8000-000000000000"

    # ---- the operator's shell

    def reconcile_all(self) -> None:
        """The shell's work; a dead operator starts again with nothing but what the cluster holds."""
        try:
            for kind, name in sorted(self.resources):
                if not self.only_when_due or self._asks_for_a_look(kind, name):
                    self._look(kind, name)
        except Died:
            self.restart()

    def restart(self) -> None:
        """A new process of the operator: it knows what the API server holds, and has not yet asked for pods."""
        self.progress.clear()
        self.unreachable.clear()
        self._due.clear()
        self._seen.clear()
        self._listed.clear()

    def _asks_for_a_look(self, kind: str, name: str) -> bool:
        due = self._due.get((kind, name))
        return self._observe(kind, name) != self._seen.get((kind, name)) or (due is not None and due <= self.now)

    def _look(self, kind: str, name: str) -> None:
        self.looks += 1
        wanted = self.wanted(kind, name)
        self._apply(kind, name, wanted)
        # Answers to own writes are known before the watch brings them.
        self._seen[kind, name] = self._observe(kind, name)
        self._due.pop((kind, name), None)
        if wanted.requeue_after is not None:
            self._due[kind, name] = self.now + timedelta(seconds=wanted.requeue_after)
        if wanted.poll_pods:
            self._listed.add(self.resources[kind, name]["metadata"]["uid"])

    def wanted(self, kind: str, name: str) -> Wanted:
        """What the resource's reconcile answers now."""
        return self._reconcile(self._observe(kind, name))

    def _reconcile(self, observed: ObservedCache | ObservedTrainingJob) -> Wanted:
        if isinstance(observed, ObservedCache):
            return reconcile_cache(observed, SETTINGS, self.now)
        return reconcile_training_job(observed, SETTINGS, self.now)

    def _pods_are_listed(self, uid: str) -> bool:
        """After a start they are when a Job has ended, a pod of it has failed, or a look asked for it."""
        jobs = [job for job in self.jobs.values() if is_controlled_by(job["metadata"], uid)]
        failed = any(
            pod["status"]["phase"] == "Failed" for job in jobs for pod in self.pods_of(job["metadata"]["name"])
        )
        if failed or any(_ended(job) for job in jobs):
            self._listed.add(uid)
        return uid in self._listed

    def _observe(self, kind: str, name: str) -> ObservedCache | ObservedTrainingJob:
        raw = self.resources[kind, name]
        uid = raw["metadata"]["uid"]
        listed = self._pods_are_listed(uid)
        children: dict[str, Any] = {
            "jobs": tuple(
                projection.job_facts(job) for job in self.jobs.values() if is_controlled_by(job["metadata"], uid)
            ),
            "pods": tuple(
                projection.pod_facts(pod)
                for pod in self.pods.values()
                if listed and pod["metadata"]["labels"][LABEL_UID] == uid
            ),
            "pods_listed": listed,
            "progress": dict(self.progress),
            "unreachable": dict(self.unreachable),
        }
        found = projection.metadata(raw)
        if kind == CACHE:
            return ObservedCache(
                metadata=found,
                spec=self._spec(raw, ActivationCacheSpec),
                status=ActivationCacheStatus.model_validate(raw["status"]),
                owners=tuple(self._owner(reference) for reference in raw["metadata"]["ownerReferences"]),
                defaults=self.defaults,
                **children,
            )
        spec = self._spec(raw, SAETrainingJobSpec)
        return ObservedTrainingJob(
            metadata=found,
            spec=spec,
            status=SAETrainingJobStatus.model_validate(raw["status"]),
            cache=self._cache_facts(cache_name_of(spec)),
            defaults=self.defaults,
            **children,
        )

    def _spec(self, raw: dict[str, Any], model: type[Spec]) -> Spec:
        """Parsed once per generation, as the shell does."""
        key = raw["metadata"]["uid"], raw["metadata"]["generation"]
        if key not in self._specs:
            self._specs[key] = model.model_validate(raw["spec"])
        return self._specs[key]

    def _owner(self, reference: dict[str, Any]) -> OwnerFacts:
        owner = self.resources.get((JOB, reference["name"]))
        if owner is None:
            return OwnerFacts(reference["name"], reference["uid"], finished=True)
        finished = owner["status"].get("phase") in ("Succeeded", "Failed")
        return OwnerFacts(reference["name"], reference["uid"], bool(owner["spec"].get("suspend")), finished)

    def _cache_facts(self, name: str | None) -> CacheFacts | None:
        raw = self.resources.get((CACHE, name or ""))
        if raw is None:
            return None
        return CacheFacts(
            name=raw["metadata"]["name"],
            uid=raw["metadata"]["uid"],
            generation=raw["metadata"]["generation"],
            spec=self._spec(raw, ActivationCacheSpec),
            status=ActivationCacheStatus.model_validate(raw["status"]),
            owner_uids=frozenset(reference["uid"] for reference in raw["metadata"]["ownerReferences"]),
        )

    def _called(self, *, changed: bool = True) -> None:
        self.calls += 1
        if self.calls == self.die_after or (self.die_after_changes and changed):
            raise Died

    def _apply(self, kind: str, name: str, wanted: Wanted) -> None:
        if wanted.apply_cache is not None:
            self._apply_cache(wanted.apply_cache.manifest)
            self._called()
        status = wanted.status
        for manifest in wanted.create:
            if self.quota_used_up and manifest["kind"] == "Job":
                status = _with_refusal(status)
                continue
            self._called(changed=self._create(manifest))
        raw = self.resources[kind, name]
        if status != raw["status"]:
            self._check_status(kind, name, status)
            raw["status"] = json.loads(json.dumps(status))
            self.statuses.append((name, raw["status"]))
            self._called()
        self.events.extend((name, event.reason, event.message) for event in wanted.events)
        for kind_of_child, child in wanted.delete_objects:
            existing = {"ConfigMap": self.config_maps, "Service": self.services}[kind_of_child]
            self._called(changed=existing.pop(child, None) is not None)
        for job in wanted.delete_jobs:
            self.jobs[job]["metadata"]["deletionTimestamp"] = self._time()
            for pod in self.pods_of(job):
                pod["metadata"]["deletionTimestamp"] = self._time()
            self._called()

    def _apply_cache(self, manifest: dict[str, Any]) -> None:
        name = manifest["metadata"]["name"]
        if (CACHE, name) not in self.resources:
            self.create(CACHE, name, manifest["spec"])
        raw = self.resources[CACHE, name]
        references = {reference["uid"]: reference for reference in raw["metadata"]["ownerReferences"]}
        references |= {reference["uid"]: reference for reference in manifest["metadata"]["ownerReferences"]}
        raw["metadata"]["ownerReferences"] = list(references.values())
        if raw["spec"] != manifest["spec"]:
            self.edit(CACHE, name, **manifest["spec"])

    def _create(self, manifest: dict[str, Any]) -> bool:
        name = manifest["metadata"]["name"]
        assert len(name) <= 63
        if manifest["kind"] == "Service":
            known = name in self.services
            self.services.setdefault(name, manifest)
            return not known
        existing = self.config_maps if manifest["kind"] == "ConfigMap" else self.jobs
        changed = existing.get(name) != manifest if manifest["kind"] == "ConfigMap" else name not in existing
        if manifest["kind"] == "ConfigMap":
            self.config_maps[name] = manifest
        elif changed:
            at_work = [
                other
                for other, job in self.jobs.items()
                if job["metadata"]["labels"][LABEL_UID] == manifest["metadata"]["labels"][LABEL_UID] and not _ended(job)
            ]
            assert not at_work, f"{name} was created while {at_work} works"
            raw = json.loads(json.dumps(manifest))
            raw["metadata"] |= {"uid": self._uid(), "creationTimestamp": self._time()}
            self.jobs[name] = raw | {"status": {}}
            self.created_jobs.append(name)
        return changed

    # ---- rules that hold at every moment

    def _check_status(self, kind: str, name: str, status: dict[str, Any]) -> None:
        raw = self.resources[kind, name]
        ends = {"Ready": "Current", "Succeeded": "Current", "Failed": "Failed"}
        refused = any(condition["type"] == "Invalid" for condition in status["conditions"])
        expected = "Failed" if refused else ends.get(status["phase"], "InProgress")
        assert kstatus(raw["metadata"]["generation"], status) == expected, status
        if status["phase"] in ("Running", "Caching"):
            job = self.jobs.get(status["jobName"])
            assert job is not None, status
            assert job["status"].get("active", 0) > 0
            assert any(pod["status"]["phase"] == "Running" for pod in self.pods_of(status["jobName"]))

    # ---- the Job controller

    def _play_job_controller(self) -> None:
        for name, job in list(self.jobs.items()):
            pods = self.pods_of(name)
            if "deletionTimestamp" in job["metadata"]:
                if not pods:
                    del self.jobs[name]
                continue
            if not _ended(job) and not job["spec"].get("suspend"):
                self._sync_job(name, job, pods)

    def _sync_job(self, name: str, job: dict[str, Any], pods: list[dict[str, Any]]) -> None:
        spec, status = job["spec"], job["status"]
        limit = spec["backoffLimit"]
        wanted, active = range(spec.get("completions") or 1), 0
        done = 0
        if "completions" in spec:
            # Failures of all indexes count together, but for those that a policy ignores.
            stopped = 143 if len(spec["podFailurePolicy"]["rules"]) > 2 else None
            counted = [pod for pod in pods if _exit_code(pod) not in (None, 0, stopped) and not _disrupted(pod)]
            if len(counted) > limit and not any(_exit_code(pod) == 2 for pod in counted):
                return self._end_job(job, "Failed", "BackoffLimitExceeded")
            limit = len(pods)
        for index in wanted:
            of_index = [pod for pod in pods if pod["metadata"]["annotations"].get("index") == str(index)]
            failed = [pod for pod in of_index if pod["status"]["phase"] == "Failed"]
            if any(_exit_code(pod) == 2 for pod in failed):
                return self._end_job(job, "Failed", "PodFailurePolicy")
            if sum(not _disrupted(pod) for pod in failed) > limit:
                return self._end_job(job, "Failed", "BackoffLimitExceeded")
            if any(pod["status"]["phase"] == "Succeeded" for pod in of_index):
                done += 1
            elif all(pod["status"]["phase"] == "Failed" for pod in of_index):
                self._create_pod(name, job, index, len(of_index))
                active += 1
            else:
                active += 1
        status["active"], status["succeeded"] = active, done
        if done == len(wanted):
            self._end_job(job, "Complete", "CompletionsReached")
        return None

    def _end_job(self, job: dict[str, Any], condition: str, reason: str) -> None:
        job["status"]["active"] = 0
        job["status"]["conditions"] = [
            {"type": condition, "status": "True", "reason": reason, "lastTransitionTime": self._time()}
        ]

    def _create_pod(self, job_name: str, job: dict[str, Any], index: int, earlier: int) -> None:
        template = job["spec"]["template"]
        name = f"{job_name}-{index}-{earlier}"
        annotations = {"index": str(index), "earlier": str(earlier)}
        if "completions" in job["spec"]:
            annotations["batch.kubernetes.io/job-completion-index"] = str(index)
        self.pods[name] = {
            "metadata": {
                "name": name,
                "labels": template["metadata"]["labels"] | {"batch.kubernetes.io/job-name": job_name},
                "annotations": annotations,
            },
            "spec": template["spec"],
            "status": {"phase": "Pending"},
        }
        self._ages[name] = 0

    # ---- the kubelet

    def _play_kubelet(self) -> None:
        for name, pod in list(self.pods.items()):
            if "deletionTimestamp" in pod["metadata"]:
                self._ages[name] = 0
                del self.pods[name]
                continue
            job = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
            if job not in self.jobs or pod["status"]["phase"] in ("Succeeded", "Failed"):
                continue
            self._play_pod(name, pod, job)

    def _play_pod(self, name: str, pod: dict[str, Any], job: str) -> None:
        annotations = pod["metadata"]["annotations"]
        step = pod["metadata"]["labels"][LABEL_STEP]
        script = self.script(step, int(annotations["index"]), int(annotations["earlier"]))
        status = pod["status"]
        if script.unschedulable is not None:
            scheduled = {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": script.unschedulable,
            }
            status["conditions"] = [scheduled]
            return
        status["conditions"] = []
        status.setdefault("startTime", self._time())
        mounted = pod["spec"]["volumes"][0]["configMap"]["name"] in self.config_maps
        if script.waits is not None or (self._ages[name] == 0 and not mounted):
            reason, message = script.waits or ("ContainerCreating", "")
            status["containerStatuses"] = [
                {"name": "step", "state": {"waiting": {"reason": reason, "message": message}}}
            ]
            return
        self._ages[name] += 1
        age = self._ages[name]
        if age <= script.seconds:
            status |= {"phase": "Running", "podIP": "127.1.0.1"}
            status.setdefault("beganAt", self._time())
            running = {"startedAt": status["beganAt"]}
            status["containerStatuses"] = [{"name": "step", "state": {"running": running}}]
            if script.progress is not None:
                said = script.progress(age) | {"step": step, "updatedAt": self._time()}
                self.progress[name] = Progress.model_validate(said)
            return
        message = script.message
        if message is None:
            message = json.dumps(self.step_result(self.step_spec(job))) if script.exit_code == 0 else ""
        if step in self.lose_messages:
            message = ""
        status["phase"] = "Succeeded" if script.exit_code == 0 else "Failed"
        terminated = {
            "exitCode": script.exit_code,
            "reason": script.reason,
            "message": message,
            "startedAt": status.get("beganAt"),
            "finishedAt": self._time(),
        }
        status["containerStatuses"] = [{"name": "step", "state": {"terminated": terminated}}]
        if script.disrupted:
            status["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]


def _with_refusal(status: Mapping[str, Any]) -> dict[str, Any]:
    """As the shell tells that the API server took no Job."""
    conditions = [
        {**condition, "reason": CREATE_REFUSED, "message": "exceeded quota"}
        if condition["type"] == "Ready"
        else condition
        for condition in status["conditions"]
    ]
    return {**status, "conditions": conditions}


def kstatus(generation: int, status: Mapping[str, Any]) -> str:
    """The status that the kstatus library computes of a custom resource."""
    if status.get("observedGeneration") != generation:
        return "InProgress"
    conditions = {condition["type"]: condition["status"] for condition in status.get("conditions") or []}
    if conditions.get("Reconciling") == "True":
        return "InProgress"
    if conditions.get("Stalled") == "True":
        return "Failed"
    return "Current" if conditions.get("Ready", "True") == "True" else "InProgress"


def _ended(job: Mapping[str, Any]) -> bool:
    return bool(job["status"].get("conditions"))


def _exit_code(pod: Mapping[str, Any]) -> int | None:
    statuses = pod["status"].get("containerStatuses") or [{}]
    return statuses[0].get("state", {}).get("terminated", {}).get("exitCode")


def _disrupted(pod: Mapping[str, Any]) -> bool:
    return any(condition["type"] == "DisruptionTarget" for condition in pod["status"].get("conditions") or [])
