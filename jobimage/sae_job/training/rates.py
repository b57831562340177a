"""The learning rates that a spec asks for, of the training and of its fine-tuning."""

from __future__ import annotations

from sae_job.errors import InvalidInput
from sae_job.training.schedules import LearningRateSchedule
from sae_operator.api.training_job import Training

# Fine-tuning polishes a decoder that is trained already: its rate is this part of the training's peak.
FINETUNING_SHARE = 0.1


def training_schedule(training: Training, peak: float, steps: int) -> LearningRateSchedule:
    """The rate of each step of the training; the last fifth decays where the spec names no decay.

    Raises:
        InvalidInput: its phases do not fit into the steps.
    """
    warm_up = training.warm_up_steps
    if warm_up > steps:
        raise InvalidInput(
            "ScheduleTooLong",
            f"{warm_up} warm-up steps are more than all {steps}; lower them, or train on more tokens",
            field="spec.training.warmUpSteps",
        )
    decay = training.decay_steps
    if decay is None:
        decay = min(steps // 5, steps - warm_up)
    main = steps - warm_up - decay
    if main < 0:
        raise InvalidInput(
            "ScheduleTooLong",
            f"{warm_up} warm-up and {decay} decay steps are more than all {steps}; lower them, or train on more tokens",
            field="spec.training.decaySteps",
        )
    if training.learning_rate_schedule == "cosineannealingwarmrestarts" and training.restart_cycles > main:
        raise InvalidInput(
            "ScheduleTooLong",
            f"{training.restart_cycles} cycles do not fit into the {main} steps between warm-up and decay; lower them",
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


def finetuning_schedule(training: Training, peak: float, steps: int) -> LearningRateSchedule | None:
    """The rate of each step of the fine-tuning, which falls linearly to 0 right after the last; None without one.

    Args:
        peak: the SAE's peak rate in training, of which a tenth is taken where the spec names no rate.
    """
    finetuning = training.finetuning
    if finetuning is None:
        return None
    rate = finetuning.learning_rate or peak * FINETUNING_SHARE
    return LearningRateSchedule(
        name="constant", peak=rate, end=rate, warm_up_steps=0, decay_steps=steps, total_steps=steps
    )
