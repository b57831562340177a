"""What a training job comes to: every default resolved, from its spec and the facts of its activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sae_job.errors import InvalidInput
from sae_job.saes.normalization import LAYER_NORM
from sae_job.training.scaling import (
    STATISTICAL_NORMALIZATIONS,
    ActivationStatistics,
    Normalization,
    activation_scale,
)
from sae_job.training.schedules import LearningRateSchedule
from sae_operator.api.sae import SaeSpec
from sae_operator.api.training_job import SAETrainingJobSpec, Training

DEFAULT_EXPANSION_FACTOR = 8
MINIMUM_BATCH_SIZE, MAXIMUM_BATCH_SIZE = 256, 4096
# A smaller batch takes more steps from the same tokens, which trains better, until steps are plenty.
MINIMUM_STEPS = 1000
DEFAULT_HELD_OUT_ROWS = 20_000
DEFAULT_CHECKPOINT_SECONDS = 600
EVALUATIONS = 10
# The measured optimum that the default learning rate goes through, and its highest value.
REFERENCE_RATE, REFERENCE_BATCH, REFERENCE_STEPS = 1e-3, 256, 1390
HIGHEST_DEFAULT_RATE = 4e-3


@dataclass(frozen=True)
class SaePlan:
    """One SAE of the job.

    Attributes:
        spec: as the user wrote it, with `d_sae` resolved.
        hook: the hook that it trains on.
        d_in: width of its activations.
        d_sae: number of latents.
        scale: factor that its activations are multiplied by for training; 1 until `TrainingPlan.scaled_by`.
        learning_rate: the rate of each step.
        betas: Adam's decay rates.
    """

    spec: SaeSpec
    hook: str
    d_in: int
    d_sae: int
    scale: float
    learning_rate: LearningRateSchedule
    betas: tuple[float, float]

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class TrainingPlan:
    """The job.

    Attributes:
        batch_size: rows per step; every batch is full.
        steps: number of steps: the tokens asked for over the batch size, rounded up. Everything that needs the length
            of the training uses this number.
        held_out_rows: rows of the cache's first contexts that are kept for evaluation.
        evaluate_every_tokens: tokens between evaluations; None for every tenth of the steps.
        checkpoint_every_tokens: tokens between checkpoints, or None.
        checkpoint_every_seconds: seconds between checkpoints, or None.
        log_every_steps: steps between lines of metrics.
        gradient_clip_norm: largest norm of an SAE's gradient, or None.
        dead_after_tokens: tokens without firing after which a latent counts as dead.
        normalization: how SAEs see activations, beside their scale.
        saes: the SAEs, in the order of the spec.
    """

    batch_size: int
    steps: int
    held_out_rows: int
    evaluate_every_tokens: int | None
    checkpoint_every_tokens: int | None
    checkpoint_every_seconds: float | None
    log_every_steps: int
    gradient_clip_norm: float | None
    dead_after_tokens: int
    normalization: Normalization
    saes: tuple[SaePlan, ...]

    @property
    def tokens(self) -> int:
        """Rows that are trained on: at least as many as asked for, and whole batches."""
        return self.steps * self.batch_size

    @property
    def hooks(self) -> tuple[str, ...]:
        """Hooks that at least one SAE trains on, in the SAEs' order."""
        return tuple(dict.fromkeys(sae.hook for sae in self.saes))

    @property
    def tenth_step(self) -> int:
        """Number of steps after which a tenth of the training is done."""
        return -(-self.steps // EVALUATIONS)

    def logs_after(self, steps_done: int) -> bool:
        """Whether metrics are logged after so many steps; always after the last."""
        return steps_done % self.log_every_steps == 0 or steps_done == self.steps

    def evaluates_after(self, steps_done: int) -> bool:
        """Whether held-out rows are evaluated after so many steps; always after the first tenth and after the last."""
        if steps_done in (self.steps, self.tenth_step):
            return True
        if self.evaluate_every_tokens is None:
            return steps_done in {-(-self.steps * part // EVALUATIONS) for part in range(1, EVALUATIONS)}
        return self._crosses(self.evaluate_every_tokens, steps_done)

    def checkpoints_after(self, steps_done: int) -> bool:
        """Whether a checkpoint by tokens is due after so many steps; not after the last, when the results follow."""
        every = self.checkpoint_every_tokens
        return every is not None and steps_done < self.steps and self._crosses(every, steps_done)

    def _crosses(self, every: int, steps_done: int) -> bool:
        return steps_done * self.batch_size // every > (steps_done - 1) * self.batch_size // every

    @property
    def needs_statistics(self) -> bool:
        """Whether scales depend on the activations."""
        return self.normalization in STATISTICAL_NORMALIZATIONS

    def scaled_by(self, statistics: Mapping[str, ActivationStatistics]) -> TrainingPlan:
        """The same plan with the scales that follow from statistics of every hook that SAEs are trained on.

        Raises:
            InvalidInput: the activations of one cannot be scaled.
        """
        saes = tuple(
            replace(sae, scale=activation_scale(statistics[sae.hook], self.normalization)) for sae in self.saes
        )
        return replace(self, saes=saes)

    def with_scales_of(self, record: Mapping[str, Any]) -> TrainingPlan:
        """The same plan with the scales of an earlier `record`: what is measured anew may differ, but a training that
        goes on must see its activations as before."""
        saes = tuple(replace(sae, scale=record["saes"][sae.name]["scale"]) for sae in self.saes)
        return replace(self, saes=saes)

    def record(self) -> dict[str, Any]:
        """The resolved values as they are told in results.json."""
        return {
            "batch_size": self.batch_size,
            "steps": self.steps,
            "tokens": self.tokens,
            "held_out_rows": self.held_out_rows,
            "normalization": self.normalization,
            "saes": {
                sae.name: {
                    "hook": sae.hook,
                    "d_in": sae.d_in,
                    "d_sae": sae.d_sae,
                    "scale": sae.scale,
                    "learning_rate": sae.learning_rate.peak,
                    "warm_up_steps": sae.learning_rate.warm_up_steps,
                    "decay_steps": sae.learning_rate.decay_steps,
                    "adam_betas": list(sae.betas),
                }
                for sae in self.saes
            },
        }


def default_batch_size(tokens: int) -> int:
    """The power of two from 256 to 4096 that leaves at least 1,000 steps; 256 when none does."""
    size = MINIMUM_BATCH_SIZE
    while size < MAXIMUM_BATCH_SIZE and tokens // (2 * size) >= MINIMUM_STEPS:
        size *= 2
    return size


def default_learning_rate(batch_size: int, steps: int) -> float:
    """Peak rate where the user names none: 1e-3 · sqrt(batch / 256) · sqrt(1390 / steps), at most 4e-3.

    Through the best points of a search on residual activations with 356k tokens: 1e-3 at batch 256 (1,390 steps) and
    2e-3 at 512 (695); at 2,048 (174 steps) 4e-3 was best, where the cap holds. The square roots are the usual laws
    for Adam: rates rise with the root of the batch, and fall with the root of the number of steps; at 73,000 steps of
    4,096 rows they give 5.5e-4.
    """
    rate = REFERENCE_RATE * math.sqrt(batch_size / REFERENCE_BATCH) * math.sqrt(REFERENCE_STEPS / steps)
    return min(rate, HIGHEST_DEFAULT_RATE)


def held_out_rows(spec: SAETrainingJobSpec, cache_rows: int) -> int:
    """Rows to hold out: as asked, else the smaller of 20,000 and a tenth of the rows there are.

    Raises:
        InvalidInput: nothing would be left to train on.
    """
    asked = spec.evaluation.held_out_tokens
    rows = min(DEFAULT_HELD_OUT_ROWS, cache_rows // 10) if asked is None else asked
    if rows >= cache_rows:
        raise InvalidInput(
            "TooFewRows",
            f"the activations have {cache_rows} rows, of which {rows} are held out: none is left to train on; "
            "hold out fewer, or raise the tokens of the activations",
            field="spec.evaluation.heldOutTokens",
        )
    return rows


def resolve_plan(spec: SAETrainingJobSpec, *, cache_rows: int, widths: Mapping[str, int]) -> TrainingPlan:
    """Resolve every default but the scales, which `TrainingPlan.scaled_by` adds.

    Args:
        spec: the job's spec.
        cache_rows: rows of the cache, or of one pass of a live source, that the job uses, held-out ones included.
        widths: key of every hook that SAEs can be trained on -> width of its activations.

    Raises:
        InvalidInput: the spec does not fit the activations; the message names the field.
    """
    training = spec.training
    tokens = _tokens(spec, cache_rows)
    batch_size = training.batch_size or default_batch_size(tokens)
    steps = -(-tokens // batch_size)
    seconds = spec.checkpoints.every_seconds
    if seconds is None and spec.checkpoints.every_tokens is None:
        seconds = DEFAULT_CHECKPOINT_SECONDS
    return TrainingPlan(
        batch_size=batch_size,
        steps=steps,
        held_out_rows=held_out_rows(spec, cache_rows),
        evaluate_every_tokens=spec.evaluation.every_tokens,
        checkpoint_every_tokens=spec.checkpoints.every_tokens,
        checkpoint_every_seconds=seconds,
        log_every_steps=training.log_every_steps,
        gradient_clip_norm=training.gradient_clip_norm,
        dead_after_tokens=training.dead_after_tokens,
        normalization=spec.normalization,
        saes=tuple(
            _sae_plan(spec, index, batch_size=batch_size, steps=steps, widths=widths) for index in range(len(spec.saes))
        ),
    )


def tokens_asked_for(spec: SAETrainingJobSpec) -> int:
    """Tokens that the spec alone asks to train on; 0 where the length of somebody else's cache decides."""
    source = spec.activations.cache or spec.activations.live
    return spec.training.tokens or (0 if source is None else _tokens(spec, source.tokens))


def _tokens(spec: SAETrainingJobSpec, cache_rows: int) -> int:
    """Tokens asked for; all but the held-out rows when none are."""
    available = cache_rows - held_out_rows(spec, cache_rows)
    return spec.training.tokens or available


def _sae_plan(
    spec: SAETrainingJobSpec, index: int, *, batch_size: int, steps: int, widths: Mapping[str, int]
) -> SaePlan:
    sae = spec.saes[index]
    field = f"spec.saes[{index}]"
    hook = resolve_hook(spec, index, list(widths))
    d_in = widths[hook]
    if spec.normalization == LAYER_NORM and d_in < 2:
        raise InvalidInput(
            "NoVariance",
            "layer_norm leaves nothing of activations of one dimension; choose another",
            field="spec.normalization",
        )
    d_sae = sae.d_sae or (sae.expansion_factor or DEFAULT_EXPANSION_FACTOR) * d_in
    k = sae.architecture.k
    if k is not None and k > d_sae:
        raise InvalidInput(
            "KTooLarge", f"k {k} is more than the {d_sae} latents; lower it", field=f"{field}.architecture.k"
        )
    rate = sae.training.learning_rate or spec.training.learning_rate or default_learning_rate(batch_size, steps)
    beta1, beta2 = sae.training.adam_beta1, sae.training.adam_beta2
    return SaePlan(
        spec=sae.model_copy(update={"d_sae": d_sae, "expansion_factor": None}),
        hook=hook,
        d_in=d_in,
        d_sae=d_sae,
        scale=1.0,
        learning_rate=_schedule(spec.training, rate, steps),
        betas=(
            spec.training.adam_beta1 if beta1 is None else beta1,
            spec.training.adam_beta2 if beta2 is None else beta2,
        ),
    )


def resolve_hook(spec: SAETrainingJobSpec, index: int, hooks: list[str]) -> str:
    """The key of the hook that an SAE trains on: the one it names, or the only one.

    Args:
        index: place of the SAE in the spec.
        hooks: keys of the hooks of the job's activations.

    Raises:
        InvalidInput: it is not there, or there are several and the SAE names none.
    """
    field, sae = f"spec.saes[{index}].hook", spec.saes[index]
    if sae.hook is None:
        if len(hooks) != 1:
            raise InvalidInput(
                "HookMissing", f"the activations are of several hooks; name one of {', '.join(hooks)}", field=field
            )
        return hooks[0]
    if sae.hook not in hooks:
        reference = spec.activations.cache_ref
        add = "" if reference is None else f"add it to spec.hooks of ActivationCache {reference.name!r}, or "
        raise InvalidInput(
            "HookNotFound",
            f"there are no activations of {sae.hook!r}, but of {', '.join(hooks)}: {add}name one of these",
            field=field,
        )
    return sae.hook


def _schedule(training: Training, peak: float, steps: int) -> LearningRateSchedule:
    warm_up = training.warm_up_steps
    if warm_up > steps:
        raise InvalidInput(
            "ScheduleTooLong", f"{warm_up} warm-up steps are more than all {steps}", field="spec.training.warmUpSteps"
        )
    decay = training.decay_steps
    if decay is None:
        decay = min(steps // 5, steps - warm_up)
    main = steps - warm_up - decay
    if main < 0:
        raise InvalidInput(
            "ScheduleTooLong",
            f"{warm_up} warm-up and {decay} decay steps are more than all {steps}",
            field="spec.training.decaySteps",
        )
    if training.learning_rate_schedule == "cosineannealingwarmrestarts" and training.restart_cycles > main:
        raise InvalidInput(
            "ScheduleTooLong",
            f"{training.restart_cycles} cycles do not fit into the {main} steps between warm-up and decay",
            field="spec.training.restartCycles",
        )
    return LearningRateSchedule(
        name=training.learning_rate_schedule,
        peak=peak,
        end=training.learning_rate_end or peak / 10,
        warm_up_steps=warm_up,
        decay_steps=decay,
        total_steps=steps,
        restart_cycles=training.restart_cycles,
    )
