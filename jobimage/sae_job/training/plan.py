"""What a training job comes to: every default resolved, from its spec and the facts of its activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sae_job.errors import InvalidInput
from sae_job.training.plan_checks import check_architecture, check_normalization, check_ranks
from sae_job.training.rates import finetuning_schedule, training_schedule
from sae_job.training.scaling import (
    STATISTICAL_NORMALIZATIONS,
    ActivationStatistics,
    Normalization,
    activation_scale,
)
from sae_job.training.schedules import LearningRateSchedule
from sae_operator.api.sae import SaeSpec
from sae_operator.api.training_job import SAETrainingJobSpec, Training

MINIMUM_BATCH_SIZE, MAXIMUM_BATCH_SIZE = 256, 4096
# A smaller batch takes more steps from the same tokens, which trains better, until steps are plenty.
MINIMUM_STEPS = 1000
DEFAULT_HELD_OUT_ROWS = 20_000
DEFAULT_CHECKPOINT_SECONDS = 600
EVALUATIONS = 10
# A fiftieth of a long training is longer than it takes to tell that a latent is dead.
MOST_DEAD_AFTER_TOKENS = 1_000_000
# The measured optimum that the default learning rate goes through, and its highest value.
REFERENCE_RATE, REFERENCE_BATCH, REFERENCE_STEPS = 1e-3, 256, 1390
HIGHEST_DEFAULT_RATE = 4e-3
# An L1 penalty has to silence latents within the training: at rates of the others it must be so strong for that that it
# costs explained variance; at twice their rate more latents die.
RATE_FACTORS = {"standard": 1.7}
# Of standard SAEs trained on 1.5M tokens in batches of 1,024, 3 % were dead in the end at this rate, 36 % at 3.3e-3.
HIGHEST_RATES = {"standard": 2.3e-3}


@dataclass(frozen=True)
class SaePlan:
    """One SAE of the job.

    Attributes:
        spec: as the user wrote it, with `d_sae` resolved.
        hook: the hook that it trains on.
        target_hook: the hook that it reconstructs; `hook`, unless it is a transcoder.
        d_in: width of the activations of `hook`.
        d_out: width of the activations of `target_hook`.
        d_sae: number of latents.
        scale: factor that the activations of `hook` are multiplied by for training; 1 until `TrainingPlan.scaled_by`.
        target_scale: the same of `target_hook`.
        learning_rate: the rate of each step of the training.
        finetuning_rate: the rate of each step of the fine-tuning, counted from its own first; None without one.
        betas: Adam's decay rates.
    """

    spec: SaeSpec
    hook: str
    target_hook: str
    d_in: int
    d_out: int
    d_sae: int
    scale: float
    target_scale: float
    learning_rate: LearningRateSchedule
    finetuning_rate: LearningRateSchedule | None
    betas: tuple[float, float]

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_transcoder(self) -> bool:
        return self.spec.target_hook is not None


@dataclass(frozen=True)
class TrainingPlan:
    """The job.

    Attributes:
        batch_size: rows per step; every batch is full.
        training_steps: steps before fine-tuning: `training.tokens` over the batch size, rounded up.
        steps: number of all steps; `finetuning.tokens` over the batch size, rounded up, are added where there is a
            fine-tuning. Evaluations, checkpoints and progress are laid out over this number.
        held_out_rows: rows of the cache's first contexts that are kept for evaluation.
        evaluate_every_tokens: tokens between evaluations; None for every tenth of the steps.
        evaluate_model_every_tokens: tokens between evaluations of the language model; None for none but the last.
        checkpoint_every_tokens: tokens between checkpoints, or None.
        checkpoint_every_seconds: seconds between checkpoints, or None.
        log_every_steps: steps between lines of metrics.
        gradient_clip_norm: largest norm of an SAE's gradient, or None.
        dead_after_tokens: tokens without firing after which a latent counts as dead.
        normalization: how SAEs see activations, beside their scale.
        settings: `spec.training`, for what needs no resolving: optimiser, precision, fine-tuning method.
        saes: the SAEs, in the order of the spec.
    """

    batch_size: int
    training_steps: int
    steps: int
    held_out_rows: int
    evaluate_every_tokens: int | None
    evaluate_model_every_tokens: int | None
    checkpoint_every_tokens: int | None
    checkpoint_every_seconds: float | None
    log_every_steps: int
    gradient_clip_norm: float | None
    dead_after_tokens: int
    normalization: Normalization
    settings: Training
    saes: tuple[SaePlan, ...]

    @property
    def tokens(self) -> int:
        """Rows that are trained on: at least as many as asked for, and whole batches."""
        return self.steps * self.batch_size

    @property
    def hooks(self) -> tuple[str, ...]:
        """Hooks that at least one SAE trains on or reconstructs, in the SAEs' order."""
        return tuple(dict.fromkeys(hook for sae in self.saes for hook in (sae.hook, sae.target_hook)))

    @property
    def scales(self) -> dict[str, float]:
        """Hook -> factor that its activations are multiplied by: one for all SAEs."""
        return {sae.hook: sae.scale for sae in self.saes} | {sae.target_hook: sae.target_scale for sae in self.saes}

    def is_finetuning(self, step: int) -> bool:
        """Whether step `step` (from 0) is one of the fine-tuning phase."""
        return step >= self.training_steps

    @property
    def tenth_step(self) -> int:
        """Number of steps after which a tenth of the training is done."""
        return -(-self.steps // EVALUATIONS)

    def logs_after(self, steps_done: int) -> bool:
        """Whether metrics are logged after so many steps; always after the last."""
        return steps_done % self.log_every_steps == 0 or steps_done == self.steps

    def evaluates_after(self, steps_done: int) -> bool:
        """Whether held-out rows are evaluated after so many steps; always after the first tenth and after the last, and
        before a fine-tuning begins, which then shows what it was good for."""
        if steps_done in (self.steps, self.tenth_step, self.training_steps):
            return True
        if self.evaluate_every_tokens is None:
            return steps_done in {-(-self.steps * part // EVALUATIONS) for part in range(1, EVALUATIONS)}
        return self._crosses(self.evaluate_every_tokens, steps_done)

    def evaluates_model_after(self, steps_done: int) -> bool:
        """Whether the language model is evaluated after so many steps; not after the last, when the results need it
        anyway."""
        every = self.evaluate_model_every_tokens
        return every is not None and steps_done < self.steps and self._crosses(every, steps_done)

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
        scales = {hook: activation_scale(statistics[hook], self.normalization) for hook in self.hooks}
        saes = (replace(sae, scale=scales[sae.hook], target_scale=scales[sae.target_hook]) for sae in self.saes)
        return replace(self, saes=tuple(saes))

    def with_scales_of(self, record: Mapping[str, Any]) -> TrainingPlan:
        """The same plan with the scales of an earlier `record`: what is measured anew may differ, but a training that
        goes on must see its activations as before."""
        saes = (
            replace(
                sae,
                scale=record["saes"][sae.name]["scale"],
                target_scale=record["saes"][sae.name]["target_scale"],
            )
            for sae in self.saes
        )
        return replace(self, saes=tuple(saes))

    def record(self) -> dict[str, Any]:
        """The resolved values as they are told in results.json."""
        return {
            "batch_size": self.batch_size,
            "steps": self.steps,
            "training_steps": self.training_steps,
            "tokens": self.tokens,
            "held_out_rows": self.held_out_rows,
            "normalization": self.normalization,
            "optimizer": self.settings.optimizer,
            "precision": self.settings.precision,
            "finetuning": None if self.settings.finetuning is None else self.settings.finetuning.method,
            "saes": {
                sae.name: {
                    "architecture": sae.spec.architecture.type,
                    "hook": sae.hook,
                    "target_hook": sae.target_hook,
                    "d_in": sae.d_in,
                    "d_out": sae.d_out,
                    "d_sae": sae.d_sae,
                    "scale": sae.scale,
                    "target_scale": sae.target_scale,
                    "learning_rate": sae.learning_rate.peak,
                    "warm_up_steps": sae.learning_rate.warm_up_steps,
                    "decay_steps": sae.learning_rate.decay_steps,
                    "finetuning_learning_rate": None if sae.finetuning_rate is None else sae.finetuning_rate.peak,
                    "adam_betas": list(sae.betas),
                }
                for sae in self.saes
            },
        }


def default_dead_after_tokens(tokens: int, batch_size: int) -> int:
    """A fiftieth of the training, at most a million tokens, at least ten batches.

    Latents have to be revived while there is time to train them. On residual activations, TopK SAEs of 4,608 latents (k
    32) ended with so many dead, and explained variance, where those counted that had not fired for a share of the
    training: of 356k tokens, a twelfth 2.2 % (0.8433), a 36th 0.8 % (0.8436), a 71st 1.1 % (0.8437); of 1.5M tokens, a
    twelfth 7.8 % (0.8672), a 37th 2.1 % (0.8689), a 73rd 1.3 % (0.8689).
    """
    return min(MOST_DEAD_AFTER_TOKENS, max(tokens // 50, 10 * batch_size))


def default_batch_size(tokens: int) -> int:
    """The power of two from 256 to 4096 that leaves at least 1,000 steps; 256 when none does."""
    size = MINIMUM_BATCH_SIZE
    while size < MAXIMUM_BATCH_SIZE and tokens // (2 * size) >= MINIMUM_STEPS:
        size *= 2
    return size


def default_learning_rate(batch_size: int, steps: int, architecture: str) -> float:
    """Peak rate where the user names none: 1e-3 · sqrt(batch / 256) · sqrt(1390 / steps), 1.7 times that for standard
    SAEs, at most 4e-3 (2.3e-3 for standard SAEs).

    Through the best points of a search on residual activations with 356k tokens: 1e-3 at batch 256 (1,390 steps) and
    2e-3 at 512 (695); at 2,048 (174 steps) 4e-3 was best, where the cap holds. The square roots are the usual laws
    for Adam: rates rise with the root of the batch, and fall with the root of the number of steps; at 73,000 steps of
    4,096 rows they give 5.5e-4.
    """
    rate = REFERENCE_RATE * math.sqrt(batch_size / REFERENCE_BATCH) * math.sqrt(REFERENCE_STEPS / steps)
    return min(rate * RATE_FACTORS.get(architecture, 1.0), HIGHEST_RATES.get(architecture, HIGHEST_DEFAULT_RATE))


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


def resolve_plan(
    spec: SAETrainingJobSpec, *, cache_rows: int, widths: Mapping[str, int], ranks: int = 1
) -> TrainingPlan:
    """Resolve every default but the scales, which `TrainingPlan.scaled_by` adds.

    Args:
        spec: the job's spec.
        cache_rows: rows of the cache, or of one pass of a live source, that the job uses, held-out ones included.
        widths: key of every hook that SAEs can be trained on -> width of its activations.
        ranks: processes that share every batch.

    Raises:
        InvalidInput: the spec does not fit the activations; the message names the field.
    """
    training = spec.training
    tokens = _tokens(spec, cache_rows)
    batch_size = training.batch_size or default_batch_size(tokens)
    check_ranks(batch_size, ranks)
    training_steps = -(-tokens // batch_size)
    finetuning_steps = 0 if training.finetuning is None else -(-training.finetuning.tokens // batch_size)
    seconds = spec.checkpoints.every_seconds
    if seconds is None and spec.checkpoints.every_tokens is None:
        seconds = DEFAULT_CHECKPOINT_SECONDS
    return TrainingPlan(
        batch_size=batch_size,
        training_steps=training_steps,
        steps=training_steps + finetuning_steps,
        held_out_rows=held_out_rows(spec, cache_rows),
        evaluate_every_tokens=spec.evaluation.every_tokens,
        evaluate_model_every_tokens=spec.evaluation.model_every_tokens,
        checkpoint_every_tokens=spec.checkpoints.every_tokens,
        checkpoint_every_seconds=seconds,
        log_every_steps=training.log_every_steps,
        gradient_clip_norm=training.gradient_clip_norm,
        dead_after_tokens=training.dead_after_tokens or default_dead_after_tokens(tokens, batch_size),
        normalization=spec.normalization,
        settings=training,
        saes=tuple(
            _sae_plan(
                spec,
                index,
                batch_size=batch_size,
                training_steps=training_steps,
                finetuning_steps=finetuning_steps,
                widths=widths,
            )
            for index in range(len(spec.saes))
        ),
    )


def tokens_asked_for(spec: SAETrainingJobSpec) -> int:
    """Tokens that the spec alone asks to train on; 0 where the length of somebody else's cache decides."""
    source = spec.activations.cache or spec.activations.live
    tokens = spec.training.tokens or (0 if source is None else _tokens(spec, source.tokens))
    return tokens + (0 if spec.training.finetuning is None else spec.training.finetuning.tokens)


def _tokens(spec: SAETrainingJobSpec, cache_rows: int) -> int:
    """Tokens asked for; all but the held-out rows when none are."""
    available = cache_rows - held_out_rows(spec, cache_rows)
    return spec.training.tokens or available


def _sae_plan(
    spec: SAETrainingJobSpec,
    index: int,
    *,
    batch_size: int,
    training_steps: int,
    finetuning_steps: int,
    widths: Mapping[str, int],
) -> SaePlan:
    sae = spec.saes[index]
    hook = resolve_hook(spec, index, list(widths))
    target_hook = resolve_target_hook(spec, index, list(widths))
    d_in, d_out = widths[hook], widths[target_hook]
    check_normalization(spec, index, d_in)
    d_sae = sae.latents(d_in)
    check_architecture(spec, index, d_sae=d_sae)
    rate = (
        sae.training.learning_rate
        or spec.training.learning_rate
        or default_learning_rate(batch_size, training_steps, sae.architecture.type)
    )
    beta1, beta2 = sae.training.adam_beta1, sae.training.adam_beta2
    return SaePlan(
        spec=sae.model_copy(update={"d_sae": d_sae, "expansion_factor": None}),
        hook=hook,
        target_hook=target_hook,
        d_in=d_in,
        d_out=d_out,
        d_sae=d_sae,
        scale=1.0,
        target_scale=1.0,
        learning_rate=training_schedule(spec.training, rate, training_steps),
        finetuning_rate=finetuning_schedule(spec.training, rate, finetuning_steps),
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
    _check_hook(spec, sae.hook, hooks, field)
    return sae.hook


def resolve_target_hook(spec: SAETrainingJobSpec, index: int, hooks: list[str]) -> str:
    """The key of the hook that an SAE reconstructs: its target, or the one that it trains on.

    Raises:
        InvalidInput: it is not there.
    """
    target = spec.saes[index].target_hook
    if target is None:
        return resolve_hook(spec, index, hooks)
    _check_hook(spec, target, hooks, f"spec.saes[{index}].targetHook")
    return target


def _check_hook(spec: SAETrainingJobSpec, hook: str, hooks: list[str], field: str) -> None:
    if hook not in hooks:
        reference = spec.activations.cache_ref
        add = "" if reference is None else f"add it to spec.hooks of ActivationCache {reference.name!r}, or "
        raise InvalidInput(
            "HookNotFound",
            f"there are no activations of {hook!r}, but of {', '.join(hooks)}: {add}name one of these",
            field=field,
        )
