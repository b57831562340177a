"""Status of the resources, as the operator writes it and `kubectl get` shows it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

CachePhase = Literal["Pending", "Preparing", "Queued", "Caching", "Finalizing", "Ready", "Failed", "Suspended"]
SweepPhase = Literal["Pending", "Running", "Reporting", "Succeeded", "Failed", "Suspended"]
TrainingPhase = Literal[
    "Pending", "Preflight", "WaitingForCache", "Queued", "Running", "Succeeded", "Failed", "Suspended"
]


class StatusModel(BaseModel):
    """A part of a status: every field optional, unknown fields ignored (a newer operator may have written them)."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
    )

    def to_manifest(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Condition(StatusModel):
    type: str
    """`Ready`, `Reconciling`, `Stalled`, or a more specific one."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: str
    """CamelCase word."""
    message: str = ""
    """One line for people, with the fix where there is one."""
    observed_generation: int | None = None
    """Generation of the spec that it is about."""
    last_transition_time: str | None = None
    """When `status` changed last."""


class ProgressStatus(StatusModel):
    tokens: int | None = None
    """Tokens done."""
    total_tokens: int | None = None
    """Tokens to do."""
    percent: int | None = None
    """Share done."""
    tokens_per_second: int | None = None
    """Current rate of all pods."""
    eta_seconds: int | None = None
    """Time left at that rate."""
    updated_at: str | None = None
    """When this was last measured."""


class PlanStatus(StatusModel):
    bytes: int | None = None
    """Size of the result in the store."""
    gpu_seconds: int | None = None
    """Estimated GPU time, where it can be estimated."""
    memory_bytes: int | None = None
    """Memory that a pod needs."""


class ShardsStatus(StatusModel):
    total: int | None = None
    """Shards of the cache."""
    complete: int | None = None
    """Shards that are stored."""


class HookStatus(StatusModel):
    name: str
    """Name of the hook; `name:headIndex` of a head."""
    d_in: int | None = None
    """Width of its activations."""
    mean_norm: float | None = None
    """Mean L2 norm of its activations."""


class AttemptStatus(StatusModel):
    """One step's Job that ended without success, or that is being retried."""

    step: str
    """Which step."""
    job_name: str
    """Its Job."""
    reason: str
    """How it ended, e.g. `OOMKilled`."""
    message: str = ""
    """What it said."""
    time: str | None = None
    """When."""


class CommonStatus(StatusModel):
    conditions: Annotated[list[Condition], Field(max_length=16)] | None = None
    """Ready, Reconciling, Stalled (as kstatus reads them), and what needs attention."""
    observed_generation: int | None = None
    """Generation of the spec that this status is about; -1 until the operator has seen the resource."""
    progress: ProgressStatus | None = None
    """Live progress of the current step."""
    plan: PlanStatus | None = None
    """What the work costs, known before it starts."""
    job_name: str | None = None
    """Job of the current step."""
    attempt: int | None = None
    """How often the current step's Job was created anew."""
    observed_retry: int | None = None
    """The value of `spec.retry` that this status is about."""
    observed_tokens: int | None = None
    """The tokens asked for that this status is about."""
    attempts: Annotated[list[AttemptStatus], Field(max_length=10)] | None = None
    """The last failures."""
    active_seconds: int | None = None
    """How long pods had worked on the current round before `activeSince`."""
    active_since: str | None = None
    """Since when pods have been working, while they do."""
    start_time: str | None = None
    """When work began."""
    completion_time: str | None = None
    """When it ended."""


class ActivationCacheStatus(CommonStatus):
    phase: CachePhase | None = None
    """Where it stands."""
    shards: ShardsStatus | None = None
    """Shards stored."""
    tokens: int | None = None
    """Rows of the finished cache."""
    bytes: int | None = None
    """Bytes of the finished cache."""
    manifest_uri: str | None = None
    """The finished cache's manifest."""
    hooks: Annotated[list[HookStatus], Field(max_length=16)] | None = None
    """Hooks of the finished cache."""
    observed_hooks: Annotated[list[str], Field(max_length=16)] | None = None
    """The hooks asked for that this status is about."""


class SaeStatus(StatusModel):
    name: str
    """Name of the SAE."""
    phase: str | None = None
    """`Running`, `Succeeded`, `Failed`, or `Stopped` by stopEarly."""
    message: str | None = None
    """Why it failed."""
    explained_variance: float | None = None
    """On held-out activations."""
    l0: float | None = None
    """Mean active latents per token."""
    mse: float | None = None
    """Mean squared error per token, summed over dIn, in raw scale."""
    ce_loss_score: float | None = None
    """Share of the ablation's cross-entropy loss that is recovered."""
    kl_divergence_score: float | None = None
    """Share of the divergence from the model's own predictions that ablation causes and the SAE does not."""
    dead_fraction: float | None = None
    """Share of latents that are dead."""


class CheckpointStatus(StatusModel):
    tokens: int | None = None
    """Tokens trained at the last checkpoint."""
    uri: str | None = None
    """Where it is."""
    time: str | None = None
    """When it was written."""


class SummaryStatus(StatusModel):
    """Figures of the best SAE (by explained variance), as text for the columns."""

    sae: str | None = None
    """Its name."""
    explained_variance: str | None = None
    """Its explained variance."""
    l0: str | None = None
    """Its L0."""


class SAETrainingJobStatus(CommonStatus):
    phase: TrainingPhase | None = None
    """Where it stands."""
    cache_name: str | None = None
    """ActivationCache that the job reads."""
    saes: Annotated[list[SaeStatus], Field(max_length=16)] | None = None
    """Figures of each SAE."""
    summary: SummaryStatus | None = None
    """Figures of the best SAE."""
    checkpoint: CheckpointStatus | None = None
    """Last checkpoint."""
    report_uri: str | None = None
    """The report, when finished."""
    log_uri: str | None = None
    """The log, when finished."""


class TrialCounts(StatusModel):
    total: int | None = None
    """Trials of the space."""
    pending: int | None = None
    """Trials whose job has not been created, or waits."""
    running: int | None = None
    """Trials that are being trained."""
    succeeded: int | None = None
    """Trials that were trained to their end."""
    stopped: int | None = None
    """Trials that were given up early, by a stop rule."""
    failed: int | None = None
    """Trials that failed."""


class JobCounts(StatusModel):
    total: int | None = None
    """Training jobs that the trials are packed into."""
    unfinished: int | None = None
    """Training jobs that exist and have not finished."""


class TrialStatus(StatusModel):
    """One trial; the whole table is at `tableUri`."""

    name: str
    """Name of the trial, which its SAEs' names begin with."""
    job_name: str | None = None
    """SAETrainingJob that trains it."""
    parameters: str | None = None
    """Its values, e.g. `training.learningRate=0.001, saes[0].architecture.k=32`."""
    sae: str | None = None
    """The trial's best SAE."""
    objective: float | None = None
    """Its figure of the objective's metric."""
    explained_variance: float | None = None
    """On held-out activations."""
    l0: float | None = None
    """Mean active latents per token."""
    ce_loss_score: float | None = None
    """Share of the ablation's cross-entropy loss that is recovered."""
    message: str | None = None
    """Why it failed."""


class SweepSummary(StatusModel):
    """Figures of the best trial, as text for the columns."""

    trial: str | None = None
    """Its name."""
    objective: str | None = None
    """Its figure of the objective's metric."""
    l0: str | None = None
    """Its L0."""
    finished: str | None = None
    """Finished trials of all, e.g. `12/20`."""


class SAESweepStatus(CommonStatus):
    """Its size does not depend on the number of trials: counts, the best and the failed few, and where the rest is."""

    phase: SweepPhase | None = None
    """Where it stands."""
    trials: TrialCounts | None = None
    """How many trials stand where."""
    jobs: JobCounts | None = None
    """How many training jobs there are."""
    best: Annotated[list[TrialStatus], Field(max_length=5)] | None = None
    """The best trials so far, best first."""
    failures: Annotated[list[TrialStatus], Field(max_length=5)] | None = None
    """The first trials that failed."""
    summary: SweepSummary | None = None
    """Figures of the best trial."""
    observed_trials: str | None = None
    """Hash of the trials and the objective that this status is about."""
    report_uri: str | None = None
    """Report with the Pareto plot, when finished."""
    table_uri: str | None = None
    """All trials as JSON, when finished."""
