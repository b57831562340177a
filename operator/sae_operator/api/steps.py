"""The contract between operator and pods: what a pod is given, what it answers, and how it ends.

A pod runs `sae-job step NAME /etc/sae-job/step.json`. It serves `GET /progress` (a `Progress`) and `GET /metrics` on
`PROGRESS_PORT` of its pod IP while it works, writes a `StepResult` to its termination message, and ends with an
`ExitCode`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.base import ApiModel
from sae_operator.api.identity import cache_identity, training_identity
from sae_operator.api.store import StoreLocation
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.api.training_job import SAETrainingJobSpec

CacheStepName = Literal["prepare", "cache", "finalize"]
TrainStepName = Literal["preflight", "train"]
SweepStepName = Literal["report"]

STEP_SPEC_PATH = "/etc/sae-job/step.json"
# One folder per Secret, one file per key, as the kubelet mounts them.
SECRETS_DIRECTORY = "/run/sae-job/secrets"
TERMINATION_MESSAGE_PATH = "/run/sae-job/termination-message"
PROGRESS_PORT = 8080
# What the kubelet keeps of a termination message.
TERMINATION_MESSAGE_BYTES = 4096

# Environment of a pod.
ENV_SECRETS_DIRECTORY = "SAE_JOB_SECRETS_DIRECTORY"
ENV_TERMINATION_MESSAGE = "SAE_JOB_TERMINATION_MESSAGE"
ENV_POD_IP = "SAE_JOB_POD_IP"
# Set by the Job controller in Indexed Jobs.
ENV_COMPLETION_INDEX = "JOB_COMPLETION_INDEX"
# Of pods that train together: how many they are, and host:port of the first one.
ENV_PODS = "SAE_JOB_PODS"
ENV_RENDEZVOUS = "SAE_JOB_RENDEZVOUS"
RENDEZVOUS_PORT = 29400
# Processes of a training in one pod; one per GPU when it is not set.
ENV_PROCESSES = "SAE_JOB_PROCESSES"
# Reason of a process that ended because another one had: never the cause.
PEER_LOST = "PeerLost"


class ExitCode(IntEnum):
    DONE = 0
    # The specification or the data is wrong: retrying cannot help.
    INVALID = 2
    # Stopped by SIGTERM with work left, after a checkpoint: 128 + 15.
    STOPPED = 143
    # Anything else: retried within backoffLimit.
    FAILED = 1


class CacheStep(ApiModel):
    """What a pod of an ActivationCache is given; `spec` is resolved: defaults of the namespace are filled in."""

    step: CacheStepName
    """Which step to run."""
    namespace: str
    """Namespace of the resource."""
    name: str
    """Name of the resource."""
    uid: str
    """UID of the resource."""
    spec: ActivationCacheSpec
    """The resource's spec."""
    location: StoreLocation
    """Folder of the cache."""
    identity: str | None = None
    """Identity of the cache by its spec as it is written, which defaults of the namespace do not change; that of `spec`
    when empty."""
    completions: Annotated[int, Field(ge=1)] = 1
    """Groups of shards: the pod with completion index c writes the shards i with i % completions == c."""

    @property
    def cache_identity(self) -> str:
        """Identity of the cache."""
        return cache_identity(self.spec) if self.identity is None else self.identity


class TrainStep(ApiModel):
    """What a pod of an SAETrainingJob is given."""

    step: TrainStepName
    """Which step to run."""
    namespace: str
    """Namespace of the resource."""
    name: str
    """Name of the resource."""
    uid: str
    """UID of the resource."""
    spec: SAETrainingJobSpec
    """The resource's spec."""
    activations: StoreLocation
    """Folder of the cache; it need not exist yet at preflight. For a live source the folder of its contexts, which
    preflight prepares."""
    cache: ActivationCacheSpec | None = None
    """Spec of the cache, where it is known (inline, or of the resource that cacheRef names); what a live source would
    be as a cache."""
    identity: str | None = None
    """Identity of the job by its spec as it is written, which defaults of the namespace do not change; that of `spec`
    when empty."""
    identity_of_cache: str | None = None
    """The same of the cache; that of `cache` when empty."""

    @property
    def training_identity(self) -> str:
        """Identity of the job."""
        return training_identity(self.spec) if self.identity is None else self.identity

    @property
    def cache_identity(self) -> str | None:
        """Identity of the cache, where its spec is known."""
        if self.identity_of_cache is not None or self.cache is None:
            return self.identity_of_cache
        return cache_identity(self.cache)


class SweepJob(ApiModel):
    """A training job of a sweep."""

    name: str
    """Name of the SAETrainingJob."""
    folder: str
    """Its folder below the sweep's output."""
    trials: list[str]
    """Names of its trials."""
    message: str | None = None
    """Why it failed, where it did."""


class SweepStep(ApiModel):
    """What the report's pod of an SAESweep is given. Trials and their values follow from the spec."""

    step: SweepStepName
    """Which step to run."""
    namespace: str
    """Namespace of the resource."""
    name: str
    """Name of the resource."""
    uid: str
    """UID of the resource."""
    spec: SAESweepSpec
    """The resource's spec."""
    output: StoreLocation
    """The sweep's folder, with the namespace's defaults."""
    jobs: list[SweepJob]
    """Its training jobs; the trials of the report are those that the spec still has."""


class _Message(BaseModel):
    """JSON between pod and operator; unknown fields are ignored, so that versions can differ by one."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, extra="ignore", frozen=True
    )


class SaeProgress(_Message):
    name: str
    phase: Literal["Running", "Succeeded", "Failed", "Stopped"] = "Running"
    message: str | None = None
    loss: float | None = None
    explained_variance: float | None = None
    l0: float | None = None
    mse: float | None = None
    ce_loss_score: float | None = None
    kl_divergence_score: float | None = None
    dead_fraction: float | None = None
    # Only while the training runs: the status has no place for them.
    dead_features: int | None = None
    learning_rate: float | None = None


class Progress(_Message):
    """Answer of `GET /progress`."""

    step: str
    """Name of the step."""
    tokens: int = 0
    """Tokens (rows) done by this pod, earlier attempts included."""
    total_tokens: int = 0
    """Tokens (rows) that this pod has to do."""
    tokens_per_second: float = 0.0
    """Current rate."""
    eta_seconds: float | None = None
    """Time left at that rate."""
    updated_at: str
    """RFC 3339 time of this state."""
    shards_complete: int | None = None
    """cache: shards done by this pod."""
    saes: list[SaeProgress] = Field(default_factory=list)
    """train: latest figures of each SAE."""
    checkpoint_tokens: int | None = None
    """train: tokens of the last checkpoint that is safely stored."""
    checkpoint_time: str | None = None
    """train: its time."""


class HookFacts(_Message):
    name: str
    d_in: int
    mean_norm: float


class StepResult(_Message):
    """The termination message: compact JSON of at most 4096 bytes; URIs are derived, not sent."""

    step: str
    """Name of the step."""
    exit_code: int
    """As in `ExitCode`."""
    reason: str
    """CamelCase word for a condition, e.g. `Completed`, `HookNotFound`, `OutputTaken`, `Checkpointed`."""
    message: str = ""
    """One line for people, with the fix."""
    # prepare
    adopted: bool | None = None
    """prepare: a finished cache with enough rows is there already. train, preflight: finished results are there."""
    shards_total: int | None = None
    """prepare: shards of the cache for the tokens asked for."""
    shards_complete: int | None = None
    """prepare, finalize: shards of these that are there."""
    plan: dict[str, Any] | None = None
    """prepare, preflight: `{"bytes": int, "gpuSeconds": float | None, "memoryBytes": int}`."""
    # finalize (and prepare, when adopted)
    tokens: int | None = None
    """finalize: rows of the cache. train: tokens trained on."""
    bytes: int | None = None
    """finalize: bytes of the shards."""
    hooks: list[HookFacts] | None = None
    """finalize: what the manifest says of each hook."""
    # train
    tokens_per_second: float | None = None
    """train: mean rate."""
    saes: list[SaeProgress] | None = None
    """train: final figures."""
    checkpoint_tokens: int | None = None
    """train: tokens of the last checkpoint, when work is left."""
