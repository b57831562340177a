"""Settings that are valid and known to end badly: told before a job starts, refused never."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import cache_of
from sae_operator.api.sae import SaeSpec
from sae_operator.api.training_job import SAETrainingJobSpec

# Adam moves each weight by about the rate; decoder rows have entries of about 1/sqrt(dIn), a few hundredths.
HIGHEST_SENSIBLE_RATE = 1e-2
# Rows of one process's share of a batch, below which communication costs more than it saves.
FEWEST_ROWS_PER_POD = 256
# More passes over the same rows teach little that is new, and held-out figures begin to fall behind.
MOST_EPOCHS = 4
EIGHT_BIT = ("int8", "float8")


@dataclass(frozen=True)
class Advice:
    """A warning.

    Attributes:
        field: camelCase path of the setting.
        message: what will happen, and what to write instead.
    """

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def advice_for_cache(spec: ActivationCacheSpec, path: str = "spec") -> list[Advice]:
    """Warnings about a cache, or a live source described as one.

    Args:
        path: where the cache's spec lies.
    """
    if spec.sampling.max_norm_ratio > 0:
        return []
    field = f"{path}.sampling.maxNormRatio"
    if spec.storage.dtype in EIGHT_BIT:
        return [
            Advice(
                field,
                f"attention sinks stay in, and {spec.storage.dtype} cannot hold them: most of the variance is lost; "
                "keep the default of 10, or store bfloat16",
            )
        ]
    return [
        Advice(
            field,
            "attention sinks stay in: explained variance will mostly measure a handful of tokens; the default is 10",
        )
    ]


def advice_for_job(spec: SAETrainingJobSpec) -> list[Advice]:
    """Warnings about a training job, those about its inline cache or live source included."""
    found = [warning for check in (_activations, _training, _logging) for warning in check(spec)]
    for index, sae in enumerate(spec.saes):
        found += [warning for check in SAE_CHECKS for warning in check(sae, f"spec.saes[{index}]", spec)]
    return found


def _activations(spec: SAETrainingJobSpec) -> Iterator[Advice]:
    source = cache_of(spec)
    if source is None:
        return
    kind = "cache" if spec.activations.live is None else "live"
    yield from advice_for_cache(source, f"spec.activations.{kind}")
    tokens = spec.training.tokens
    if tokens is not None and tokens > MOST_EPOCHS * source.tokens:
        yield Advice(
            "spec.training.tokens",
            f"{tokens / source.tokens:.0f} passes over the same {source.tokens} rows: raise "
            f"activations.{kind}.tokens instead",
        )


def _training(spec: SAETrainingJobSpec) -> Iterator[Advice]:
    training = spec.training
    if training.learning_rate is not None and training.learning_rate > HIGHEST_SENSIBLE_RATE:
        yield Advice(
            "spec.training.learningRate",
            f"{training.learning_rate:g} is likely to diverge; leave it out for the default, or try 1e-3",
        )
    if spec.evaluation.held_out_tokens == 0:
        yield Advice(
            "spec.evaluation.heldOutTokens", "nothing is held out, so that there will be no figures; leave it out"
        )
    batch, pods = training.batch_size, spec.parallelism
    if batch is not None and batch // pods < FEWEST_ROWS_PER_POD and pods > 1:
        yield Advice(
            "spec.parallelism",
            f"a batch of {batch} leaves {batch // pods} rows to each of {pods} pods: they will wait for each other; "
            "raise batchSize or lower parallelism",
        )


def _logging(spec: SAETrainingJobSpec) -> Iterator[Advice]:
    wandb = spec.wandb
    if wandb is not None and wandb.mode == "online" and all(item.name != "WANDB_API_KEY" for item in spec.run.env):
        yield Advice(
            "spec.run.env",
            "spec.wandb needs WANDB_API_KEY, which is not among these; add it by secretKeyRef, or set "
            "wandb.mode: offline",
        )


def _rate(sae: SaeSpec, path: str, spec: SAETrainingJobSpec) -> Iterator[Advice]:
    rate = sae.training.learning_rate
    if rate is not None and rate > HIGHEST_SENSIBLE_RATE:
        yield Advice(f"{path}.training.learningRate", f"{rate:g} is likely to diverge; try 1e-3")


def _cheated_penalty(sae: SaeSpec, path: str, spec: SAETrainingJobSpec) -> Iterator[Advice]:
    architecture = sae.architecture
    if architecture.type == "standard" and not sae.normalizes_decoder and not sae.weights_penalty_by_decoder_norm:
        yield Advice(
            f"{path}.architecture.scaleSparsityPenaltyByDecoderNorm",
            "with normalizeDecoder: false the penalty vanishes without sparsity (small activations, long rows); leave "
            "one of the two out",
        )


def _no_revival(sae: SaeSpec, path: str, spec: SAETrainingJobSpec) -> Iterator[Advice]:
    if sae.architecture.aux_k_coefficient == 0:
        yield Advice(
            f"{path}.architecture.auxKCoefficient", "0 leaves dead latents dead; leave it out for the paper's 1/32"
        )


def _dense(sae: SaeSpec, path: str, spec: SAETrainingJobSpec) -> Iterator[Advice]:
    k = sae.architecture.k
    if k is not None and sae.d_sae is not None and 4 * k > sae.d_sae:
        yield Advice(
            f"{path}.architecture.k",
            f"{k} of {sae.d_sae} latents active per token is hardly sparse; lower k or raise dSae",
        )


def _unscaled_thresholds(sae: SaeSpec, path: str, spec: SAETrainingJobSpec) -> Iterator[Advice]:
    architecture = sae.architecture
    fixed = architecture.bandwidth is not None and architecture.initial_threshold is not None
    if architecture.type == "jumprelu" and spec.normalization == "none" and not fixed:
        yield Advice(
            "spec.normalization",
            f"the default bandwidth and threshold of {sae.name!r} are for scaled activations; set a normalization, or "
            "architecture.bandwidth and initialThreshold to the scale of yours",
        )


SaeCheck = Callable[[SaeSpec, str, SAETrainingJobSpec], Iterator[Advice]]
SAE_CHECKS: tuple[SaeCheck, ...] = (_rate, _cheated_penalty, _no_revival, _dense, _unscaled_thresholds)
