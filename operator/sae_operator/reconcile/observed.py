"""What a reconcile is given: slim, frozen projections of what the API server and the pods said.

The shell builds these from its store (see `projection` for Jobs, pods and ConfigMaps); a reconcile never asks for more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.status import ActivationCacheStatus, SAETrainingJobStatus
from sae_operator.api.steps import Progress, StepResult
from sae_operator.api.training_job import SAETrainingJobSpec


@dataclass(frozen=True)
class OperatorSettings:
    """Settings of the operator that reconciles depend on.

    Attributes:
        job_image: image of the pods where neither `spec.run.image` nor the namespace's defaults name one.
        poll_seconds: how often a resource with an active Job is looked at again, its pods listed and polled before.
        progress_interval_seconds: live progress is written to the status no more often than this.
        result_grace_seconds: how long a finished Job's pods may take to show their termination message.
        unreachable_after_seconds: a pod that has run for this long without answering `GET /progress` is reported.
        slow_start_seconds: a container that is still being created after this is reported.
        allowed_images: patterns (`fnmatch`) of images that resources may name; none allows all.
        allowed_service_accounts: the same of ServiceAccounts.
        allowed_env: the same of names of environment variables; none allows those of known libraries.
        allow_trust_remote_code: whether resources may run code that a model's repository brings.
    """

    job_image: str
    poll_seconds: float = 5.0
    progress_interval_seconds: float = 10.0
    result_grace_seconds: float = 30.0
    unreachable_after_seconds: float = 60.0
    slow_start_seconds: float = 30.0
    allowed_images: tuple[str, ...] = ()
    allowed_service_accounts: tuple[str, ...] = ()
    allowed_env: tuple[str, ...] = ()
    allow_trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a reconcile needs of a resource's `metadata`; see `projection.metadata`."""

    name: str
    namespace: str
    uid: str
    generation: int
    deleting: bool = False


@dataclass(frozen=True)
class SpecProblem:
    """One thing that is wrong with a spec: camelCase path (e.g. `spec.saes[0].architecture.k`) and message."""

    field: str
    message: str


@dataclass(frozen=True)
class InvalidSpec:
    """A spec that the models refuse, although the API server took it (an older CRD, say)."""

    problems: tuple[SpecProblem, ...]

    @property
    def message(self) -> str:
        return "; ".join(
            f"{problem.field}: {problem.message}" if problem.field else problem.message for problem in self.problems
        )


@dataclass(frozen=True, slots=True)
class PodFacts:
    """One pod of a step's Job.

    Attributes:
        job_name: name of the Job that made it.
        step: step that it runs.
        index: completion index in an Indexed Job.
        phase: the pod's phase.
        ip: address where it serves progress.
        running: its container runs now (and the pod is not being deleted).
        lost: its container ran when its node was last heard of, which does not answer any more.
        deleting: it is being deleted.
        deletion_time: when it should be gone.
        start_time: when a kubelet took it.
        begin_time: when its container started.
        finish_time: when its container ended.
        waiting_reason, waiting_message: why its container does not start yet, e.g. `ImagePullBackOff`.
        exit_code: of its ended container.
        oom_killed: its container was killed for memory.
        termination_reason: Kubernetes' word for how it ended, e.g. `Error`, `Evicted`.
        termination_text: the termination message where it is not a `StepResult`.
        result: the termination message.
        unschedulable: the scheduler's message while no node fits.
        disrupted: it was ended by a disruption of the node, not by a failure of its own.
        image: image of its container.
    """

    name: str
    job_name: str
    step: str
    index: int | None = None
    phase: str = "Pending"
    ip: str | None = None
    node: str | None = None
    running: bool = False
    lost: bool = False
    deleting: bool = False
    deletion_time: datetime | None = None
    start_time: datetime | None = None
    begin_time: datetime | None = None
    finish_time: datetime | None = None
    waiting_reason: str | None = None
    waiting_message: str | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    termination_reason: str | None = None
    termination_text: str | None = None
    result: StepResult | None = None
    unschedulable: str | None = None
    disrupted: bool = False
    image: str | None = None

    @property
    def finished(self) -> bool:
        return self.phase in ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class JobFacts:
    """One Job of a resource.

    Attributes:
        step: step that it runs.
        attempt: number of the attempt, from 1.
        work: key of the round of work that it belongs to (see `names.work_key`).
        active: pods that are pending or running.
        complete: it has condition Complete.
        failed_reason, failed_message: its condition Failed; None while it has none.
        finish_time: when it completed or failed.
        suspended: its `spec.suspend`, which belongs to a queueing system.
        deleting: it is being deleted.
    """

    name: str
    uid: str
    step: str
    attempt: int
    work: str
    active: int = 0
    succeeded: int = 0
    failed: int = 0
    complete: bool = False
    failed_reason: str | None = None
    failed_message: str | None = None
    finish_time: datetime | None = None
    suspended: bool = False
    deleting: bool = False
    creation_time: datetime | None = None
    completions: int | None = None

    @property
    def finished(self) -> bool:
        return self.complete or self.failed_reason is not None


@dataclass(frozen=True)
class Defaults:
    """ConfigMap `sae-operator-defaults` of the namespace; see `projection.defaults`.

    Attributes:
        problem: what is wrong with the ConfigMap, for a condition.
    """

    endpoint_url: str | None = None
    region: str | None = None
    secret_name: str | None = None
    image: str | None = None
    queue_name: str | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, object], ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class OwnerFacts:
    """A training job that asked for an inline cache.

    Attributes:
        suspended: its `spec.suspend`.
        finished: it has succeeded or failed, or does not exist any more.
    """

    name: str
    uid: str
    suspended: bool = False
    finished: bool = False


@dataclass(frozen=True)
class CacheFacts:
    """The ActivationCache that a training job reads.

    Attributes:
        owner_uids: UIDs in its ownerReferences.
        spec: its spec.
        status: its status as stored.
    """

    name: str
    uid: str
    generation: int
    spec: ActivationCacheSpec | InvalidSpec
    status: ActivationCacheStatus
    owner_uids: frozenset[str] = frozenset()
    deleting: bool = False


@dataclass(frozen=True, kw_only=True)
class Children:
    """What exists of a resource's Jobs and pods.

    Attributes:
        jobs: every Job whose controller is the resource.
        pods: every pod with the resource's uid label, as last listed; pods of a Job that is gone included.
        progress: last answer of `GET /progress` by pod name; kept after a pod ended.
        unreachable: pods whose last poll failed, with the error.
        pods_listed: pods have been listed at all; until then, that there are none means nothing.
    """

    jobs: tuple[JobFacts, ...] = ()
    pods: tuple[PodFacts, ...] = ()
    progress: Mapping[str, Progress] = field(default_factory=dict)
    unreachable: Mapping[str, str] = field(default_factory=dict)
    pods_listed: bool = True


@dataclass(frozen=True, kw_only=True)
class ObservedCache(Children):
    """An ActivationCache and what belongs to it.

    Attributes:
        status: as stored; an empty one for a new resource.
        owners: one entry for each ownerReference to an SAETrainingJob; empty for a cache that a user made.
    """

    metadata: Metadata
    spec: ActivationCacheSpec | InvalidSpec
    status: ActivationCacheStatus
    owners: tuple[OwnerFacts, ...] = ()
    defaults: Defaults = Defaults()


@dataclass(frozen=True, kw_only=True)
class ObservedTrainingJob(Children):
    """An SAETrainingJob and what belongs to it.

    Attributes:
        cache: the ActivationCache named by `names.cache_name_of(spec)`, in the job's namespace; None when it does not
            exist or the job reads none.
    """

    metadata: Metadata
    spec: SAETrainingJobSpec | InvalidSpec
    status: SAETrainingJobStatus
    cache: CacheFacts | None = None
    defaults: Defaults = Defaults()
