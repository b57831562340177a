"""SAETrainingJob: one or more sparse autoencoders trained from one stream of activations."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from sae_operator.api.activation_cache import (
    MAX_HOOKS,
    SOME_POSITIONS,
    UNIQUE_HOOKS,
    ActivationCacheSpec,
    DatasetSource,
    Dtype,
    Hook,
    ModelSource,
    Sampling,
)
from sae_operator.api.base import (
    ApiModel,
    Count,
    CountOrZero,
    EndpointUrl,
    ObjectName,
    Region,
    Rule,
    ShortText,
    TransitionRule,
    Uri,
    immutable,
    one_of_set,
    raised_only,
)
from sae_operator.api.run_settings import RunSettings
from sae_operator.api.sae import PositiveNumber, SaeSpec, UnitInterval
from sae_operator.api.store import SecretRef, StoreLocation, has_no_parent_segment

Metric = Literal["explained_variance", "l0", "mse", "dead_fraction", "ce_loss_score", "kl_divergence_score"]
# Metrics for which the training pod loads the language model.
MODEL_METRICS = ("ce_loss_score", "kl_divergence_score")


class CacheRef(ApiModel):
    name: ObjectName
    """Name of an ActivationCache in the same namespace; the job waits until it is Ready."""


class LiveActivations(ApiModel):
    """Activations that the model computes beside the training, and that are never stored; only the contexts are, below
    `output.uri`."""

    RULES = (UNIQUE_HOOKS, SOME_POSITIONS)
    # Contexts are stored for the rows of one pass; more may be asked for later, as of a cache.
    TRANSITION_RULES = (
        *(
            immutable(field)
            for field in ("model", "dataset", "hooks", "contextSize", "seed", "sampling", "dtype", "bufferBytes")
        ),
        raised_only("tokens"),
    )

    model: ModelSource
    """The language model."""
    dataset: DatasetSource
    """The text."""
    hooks: Annotated[list[Hook], Field(min_length=1, max_length=MAX_HOOKS)]
    """Where activations are taken; several hooks share one forward pass."""
    context_size: Annotated[Count, Field(ge=2, le=1_048_576)] = 128
    """Tokens per context."""
    tokens: Count
    """Rows of one pass over the text, after filters; training on more begins another pass."""
    seed: CountOrZero = 0
    """Seed of the order of contexts and rows."""
    sampling: Sampling = Field(default_factory=Sampling)
    """Which positions become rows."""
    dtype: Dtype = "bfloat16"
    """Number format in which rows wait to be trained on."""
    buffer_bytes: Annotated[Count, Field(ge=2**20, le=2**37)] = 2**31
    """Memory for rows that are mixed and computed ahead; a pass mixes the rows of as many contexts as fit."""


class Activations(ApiModel):
    """Where activations come from: exactly one of `cacheRef`, `cache`, `uri` and `live`."""

    RULES = (
        Rule(
            "[has(self.cacheRef), has(self.cache), has(self.uri), has(self.live)].filter(x, x).size() == 1",
            one_of_set("cache_ref", "cache", "uri", "live"),
            "exactly one of cacheRef, cache, uri and live must be set",
        ),
        Rule(
            "has(self.uri) || !(has(self.endpointUrl) || has(self.region) || has(self.secretRef))",
            lambda a: a.uri is not None or not (a.endpoint_url or a.region or a.secret_ref),
            "endpointUrl, region and secretRef belong to uri; a cache has its own under storage",
        ),
        Rule(
            "!has(self.uri) || !self.uri.matches('(^|/)\\\\.\\\\.(/|$)')",
            lambda a: a.uri is None or has_no_parent_segment(a.uri),
            "uri must not contain '..' segments",
            "uri",
        ),
        Rule(
            "!has(self.cache) || (!self.cache.suspend && self.cache.retry == 0)",
            lambda a: a.cache is None or (not a.cache.suspend and a.cache.retry == 0),
            "an inline cache follows the suspend and retry of its job; set spec.suspend and spec.retry instead",
            "cache",
        ),
    )
    # An inline cache has transition rules of its own.
    TRANSITION_RULES = (
        *(immutable(field) for field in ("cacheRef", "uri", "endpointUrl", "region", "secretRef")),
        TransitionRule(
            "has(self.cache) == has(oldSelf.cache)", "cache is immutable; create a new resource instead", "cache"
        ),
        TransitionRule(
            "has(self.live) == has(oldSelf.live)", "live is immutable; create a new resource instead", "live"
        ),
    )

    cache_ref: CacheRef | None = None
    """An ActivationCache of the namespace."""
    cache: ActivationCacheSpec | None = None
    """An ActivationCache spec inline: the operator creates it, and shares it with every job that asks for the same."""
    uri: Uri | None = None
    """A finished cache: the folder of its `manifest.json`."""
    endpoint_url: EndpointUrl | None = None
    """Address of the S3-compatible server of `uri`."""
    region: Region | None = None
    """Region of the bucket of `uri`."""
    secret_ref: SecretRef | None = None
    """Secret with the credentials of `uri`; where its model lies in an object store, `ce_loss_score` reads it with
    them, too."""
    live: LiveActivations | None = None
    """No cache: the model runs beside the training. Right for a single run; a cache pays from the second on."""


class Finetuning(ApiModel):
    """A last phase that trains on the reconstruction loss alone, with encoders frozen and a fresh optimiser: it undoes
    the shrinkage that a sparsity penalty leaves."""

    method: Literal["scale", "decoder", "unrotated_decoder"]
    """What trains besides a factor for each latent: `scale`: nothing. `decoder`: W_dec and b_dec. `unrotated_decoder`:
    b_dec."""
    tokens: Count
    """Activations to train on, after `training.tokens`."""
    learning_rate: PositiveNumber | None = None
    """Learning rate of this phase, which decays linearly to 0; a tenth of each SAE's peak when empty."""


class Training(ApiModel):
    TRANSITION_RULES = (
        raised_only("tokens"),
        *(
            immutable(field)
            for field in (
                "batchSize",
                "learningRate",
                "learningRateEnd",
                "decaySteps",
                "gradientClipNorm",
                "learningRateSchedule",
                "restartCycles",
                "warmUpSteps",
                "adamBeta1",
                "adamBeta2",
                "deadAfterTokens",
                "logEverySteps",
                "optimizer",
                "mseLossNormalization",
                "precision",
                "selection",
                "compile",
                "finetuning",
            )
        ),
    )

    tokens: Count | None = None
    """Activations to train on; more than the cache holds is another epoch. All but the held-out ones when empty."""
    batch_size: Annotated[Count, Field(le=2**24)] | None = None
    """Activations per step. When empty: the power of two from 256 to 4096 that leaves at least 1,000 steps."""
    learning_rate: PositiveNumber | None = None
    """Peak learning rate; follows batch size and number of steps when empty."""
    learning_rate_schedule: Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"] = "constant"
    """Course between warm-up and decay."""
    learning_rate_end: PositiveNumber | None = None
    """Where the cosine ends; a tenth of the peak when empty."""
    restart_cycles: Annotated[Count, Field(le=1000)] = 1
    """Cycles of `cosineannealingwarmrestarts`."""
    warm_up_steps: CountOrZero = 0
    """Steps of linear warm-up."""
    decay_steps: CountOrZero | None = None
    """Steps of linear decay to 0 at the end; the last fifth when empty."""
    adam_beta1: UnitInterval = 0.9
    """Adam's decay rate of the first moment."""
    adam_beta2: UnitInterval = 0.999
    """Adam's decay rate of the second moment."""
    gradient_clip_norm: PositiveNumber | None = None
    """Clip each SAE's gradient to this norm; off when empty."""
    optimizer: Literal["adam", "adamw", "adafactor"] = "adam"
    """PyTorch's optimiser of that name, without weight decay; `adafactor` needs the least memory."""
    mse_loss_normalization: Literal["none", "dense_batch"] = "none"
    """`dense_batch`: divide a row's squared errors by its distance from the batch's mean."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Number format in which the products of a step are computed: `tf32` where a GPU has it, `bfloat16` by autocast.
    Weights, sums and the optimiser stay float32."""
    selection: Literal["exact", "bfloat16"] = "exact"
    """topk, batchtopk: `bfloat16` finds candidates by a product in bfloat16 and computes these again in float32."""
    compile: bool = False
    """Compile the dense parts of a step with torch.compile; needs a C compiler in the pod."""
    finetuning: Finetuning | None = None
    """A last phase with encoders frozen; none when empty."""
    dead_after_tokens: Count | None = None
    """A latent that has not fired for so many tokens (or, in a shorter run, never) counts as dead. When empty, a
    fiftieth of `tokens`, at most 1,000,000."""
    log_every_steps: Count = 10
    """Steps between lines of metrics.jsonl."""


class Evaluation(ApiModel):
    every_tokens: Count | None = None
    """Tokens between evaluations on the held-out rows; a tenth of the training when empty."""
    held_out_tokens: CountOrZero | None = None
    """Rows of the cache's first contexts that are never trained on; the smaller of 20,000 and a tenth when empty."""
    metrics: Annotated[list[Metric], Field(min_length=1, max_length=8)] = Field(
        default_factory=lambda: ["explained_variance", "l0", "mse", "dead_fraction"]
    )
    """What is reported. `ce_loss_score` and `kl_divergence_score` load the language model into the training pod."""
    model_every_tokens: Count | None = None
    """Tokens between evaluations of `ce_loss_score` and `kl_divergence_score`; only at the end when empty."""


class Checkpoints(ApiModel):
    RULES = (
        Rule(
            "!(has(self.everyTokens) && has(self.everySeconds))",
            lambda c: c.every_tokens is None or c.every_seconds is None,
            "only one of everyTokens and everySeconds may be set",
        ),
    )

    every_tokens: Count | None = None
    """Tokens between checkpoints."""
    every_seconds: Count | None = None
    """Seconds between checkpoints; 600 when neither is set."""
    keep: Annotated[Count, Field(le=1000)] = 2
    """Checkpoints that are kept while training; all are removed on success."""


class MedianStop(ApiModel):
    """Give up an SAE that is worse than the median of those that came as far before it. Jobs that share `uri` compare
    themselves through it: each SAE leaves its figure there at the first evaluation from `afterTokens` on, and is frozen
    when it is worse than the median of the others' figures."""

    RULES = (
        Rule(
            "!has(self.uri) || !self.uri.matches('(^|/)\\\\.\\\\.(/|$)')",
            lambda m: m.uri is None or has_no_parent_segment(m.uri),
            "uri must not contain '..' segments",
            "uri",
        ),
    )

    metric: Literal["explained_variance", "mse", "dead_fraction"] = "explained_variance"
    """Figure on held-out activations that is compared: the higher the better for `explained_variance`, the lower the
    better for the others."""
    after_tokens: Count
    """Tokens from which evaluations count."""
    min_saes: Annotated[Count, Field(le=1000)] = 4
    """Stop nothing before so many other SAEs have left their figure."""
    uri: Uri | None = None
    """Folder of the figures, with the access of `output`; `<output.uri>/median-stop` when empty."""


class WandbSettings(ApiModel):
    """A run of Weights & Biases for each SAE. The key is the environment variable WANDB_API_KEY, which `run.env` takes
    from a Secret."""

    project: ShortText
    """Project of the runs."""
    entity: ShortText | None = None
    """User or team that they belong to; the key's own when empty."""
    group: ShortText | None = None
    """Group of the job's runs; the job's name when empty."""
    tags: Annotated[list[ShortText], Field(max_length=16)] = Field(default_factory=list)
    """Tags of the runs."""
    mode: Literal["online", "offline"] = "online"
    """`offline` sends nothing: the runs' files go to `<output.uri>/wandb`, for `wandb sync`."""
    log_artifacts: bool = False
    """Upload SAEs and their sparsity as artifacts at each checkpoint and at the end."""


def hooks_are_there(spec: SAETrainingJobSpec, *, source: Literal["cache", "live"]) -> bool:
    """Whether each SAE's hook is one of the source's, where the job has that source."""
    activations = getattr(spec.activations, source)
    if activations is None:
        return True
    keys = {hook.key for hook in activations.hooks}
    return all(len(keys) == 1 if sae.hook is None else sae.hook in keys for sae in spec.saes)


def target_hooks_are_there(spec: SAETrainingJobSpec, *, source: Literal["cache", "live"]) -> bool:
    """Whether each transcoder's target is one of the source's hooks, where the job has that source."""
    activations = getattr(spec.activations, source)
    if activations is None:
        return True
    keys = {hook.key for hook in activations.hooks}
    return all(sae.target_hook is None or sae.target_hook in keys for sae in spec.saes)


def rows_are_left(spec: SAETrainingJobSpec, *, source: Literal["cache", "live"]) -> bool:
    """Whether held-out rows leave some to train on, where the job has that source."""
    activations, held_out = getattr(spec.activations, source), spec.evaluation.held_out_tokens
    return activations is None or held_out is None or held_out < activations.tokens


def _is_hook(field: str) -> str:
    """CEL: whether hook `h` is what `field` of SAE `s` names. The key is taken apart: the cost of one put together has
    no bound."""
    return (
        f"has(h.headIndex) ? s.{field}.startsWith(h.name + ':')"
        f" && int(s.{field}.substring(h.name.size() + 1)) == h.headIndex : s.{field} == h.name"
    )


class SAETrainingJobSpec(ApiModel):
    RULES = (
        Rule(
            "self.saes.all(s, self.saes.exists_one(t, t.name == s.name))",
            lambda spec: len({sae.name for sae in spec.saes}) == len(spec.saes),
            "names of saes must be unique",
            "saes",
        ),
        *(
            Rule(
                f"!has(self.activations.{source}) || self.saes.all(s, has(s.hook)"
                f" ? self.activations.{source}.hooks.exists(h, {_is_hook('hook')})"
                f" : self.activations.{source}.hooks.size() == 1)",
                partial(hooks_are_there, source=source),
                f"each SAE's hook must be one of activations.{source}.hooks; it may be left out only when there is one",
                "saes",
            )
            for source in ("cache", "live")
        ),
        *(
            Rule(
                f"!has(self.activations.{source}) || self.saes.all(s, !has(s.targetHook)"
                f" || self.activations.{source}.hooks.exists(h, {_is_hook('targetHook')}))",
                partial(target_hooks_are_there, source=source),
                f"each transcoder's targetHook must be one of activations.{source}.hooks",
                "saes",
            )
            for source in ("cache", "live")
        ),
        *(
            Rule(
                f"!has(self.activations.{source}) || !has(self.evaluation.heldOutTokens)"
                f" || self.evaluation.heldOutTokens < self.activations.{source}.tokens",
                partial(rows_are_left, source=source),
                f"evaluation.heldOutTokens must be less than activations.{source}.tokens, or nothing is left to train "
                "on",
                "evaluation.heldOutTokens",
            )
            for source in ("cache", "live")
        ),
    )
    # activations and training have transition rules of their own; run and suspend may change at any time.
    TRANSITION_RULES = (
        *(
            immutable(field)
            for field in ("saes", "normalization", "evaluation", "checkpoints", "saeFormat", "medianStop", "output")
        ),
        raised_only("retry"),
    )

    activations: Activations
    """Where activations come from: exactly one of `cacheRef`, `cache`, `uri` and `live`."""
    saes: Annotated[list[SaeSpec], Field(min_length=1, max_length=16)]
    """The SAEs; all train on the same stream, read once."""
    normalization: Literal[
        "centered_rms", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "none"
    ] = "centered_rms"
    """How activations are scaled for training. Folded into the saved SAE: `centered_rms` (the deviation from the mean
    has RMS norm sqrt(dIn)) and `expected_average_only_in` (the mean norm is sqrt(dIn)). Done for each activation
    again whenever the SAE is used: `constant_norm_rescale` (every norm is sqrt(dIn)) and `layer_norm` (mean 0 and
    standard deviation 1 over its dimensions)."""
    training: Training = Field(default_factory=Training)
    """Optimisation; the same for all SAEs but for what an SAE overrides."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """What is measured on held-out activations, and when."""
    checkpoints: Checkpoints = Field(default_factory=Checkpoints)
    """How much work an interruption can cost."""
    sae_format: Literal["saelens5", "saelens6"] = "saelens5"
    """Layout of saved SAEs: `saelens5`, which old and new versions of SAELens load, or the newest one's own, which
    tells more. Transcoders are always saved in the newest one, which alone knows them."""
    median_stop: MedianStop | None = None
    """Give up SAEs that are worse than the median at a number of tokens; off when empty."""
    output: StoreLocation
    """Where SAEs, results, report and checkpoints go."""
    wandb: WandbSettings | None = None
    """Log to Weights & Biases; off when empty."""
    parallelism: Annotated[Count, Field(le=1024)] = 1
    """Pods that train together, data-parallel, each on all of its GPUs; `batchSize` is that of all together. May be
    changed for the next attempt."""
    run: RunSettings = Field(default_factory=RunSettings)
    """Pod and Job settings; may be changed for the next attempt."""
    suspend: bool = False
    """Stop the training after a checkpoint and free its pod."""
    retry: CountOrZero = 0
    """Raise this number to run a failed resource again."""
