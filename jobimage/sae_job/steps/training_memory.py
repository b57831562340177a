"""Memory that a training pod needs, part by part, and whether its limit allows it."""

from __future__ import annotations

from dataclasses import dataclass

from sae_job.errors import InvalidInput
from sae_job.steps.memory import PROCESS_BYTES, has_gpu, mebibytes, memory_limit
from sae_job.training.plan import SaePlan, TrainingPlan
from sae_operator.api.sae import Architecture
from sae_operator.api.training_job import SAETrainingJobSpec

_FLOAT32 = 4
# Vectors of d_sae beside the two matrices: biases, thresholds, gates.
_VECTORS = {"gated": 3, "jumprelu": 2}
# Arrays of [batch, d_sae] that a step holds at most: pre-activations; with a penalty, what a sparse step holds of its
# entries while nearly a tenth of all are active, more than a dense step's blocks of rows.
_LATENT_ARRAYS = {"standard": 2, "gated": 3, "jumprelu": 3}
# Numbers of the optimiser for each weight. Adafactor keeps one per row and one per column.
_MOMENTS = {"adam": 2, "adamw": 2, "adafactor": 0}
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def parameters_of(sae: SaePlan, *, finetuning: bool = False) -> int:
    """Trainable numbers of an SAE."""
    vectors = _VECTORS.get(sae.spec.architecture.type, 1) + finetuning
    skip = sae.d_in * sae.d_out if sae.spec.skip_connection else 0
    return sae.d_sae * (sae.d_in + sae.d_out + vectors) + sae.d_out + skip


def _latent_arrays(architecture: Architecture) -> int:
    """Arrays of [batch, d_sae] of a step; noise is one more."""
    return _LATENT_ARRAYS.get(architecture.type, 1) + bool(architecture.noise_scale)


@dataclass(frozen=True)
class TrainingMemory:
    """What a training pod needs, in bytes; on a GPU all but checkpoint, rows and process lie there.

    Attributes:
        weights: of all SAEs, in float32.
        gradients: of all SAEs.
        optimizer: its moments.
        step: arrays of [batch, d_sae] of the SAE with most of them, and the batch.
        checkpoint: copies that are being written, in host memory.
        rows: activations that are read or computed ahead, in host memory.
        model: a language model that runs beside the training, with its forward pass.
        scored_model: a language model for ce_loss_score and kl_divergence_score.
        scored_beside: whether that one is there during the training, too.
        processes: how many train in the pod, one on each GPU: each holds SAEs, rows and a live source's model of its
            own, which are counted in the figures above; one of them writes checkpoints and scores.
    """

    weights: int
    gradients: int
    optimizer: int
    step: int
    checkpoint: int
    rows: int
    model: int
    scored_model: int
    scored_beside: bool = False
    processes: int = 1

    @classmethod
    def of(
        cls,
        plan: TrainingPlan,
        *,
        rows: int,
        model: int = 0,
        scored_model: int = 0,
        scored_beside: bool = False,
        processes: int = 1,
    ) -> TrainingMemory:
        """Of a resolved plan, with what its activations and its evaluation take."""
        finetuning = plan.settings.finetuning is not None
        parameters = {sae.name: parameters_of(sae, finetuning=finetuning) for sae in plan.saes}
        total = sum(parameters.values())
        moments = _FLOAT32 * _MOMENTS[plan.settings.optimizer] * total
        latents = max(sae.d_sae * _latent_arrays(sae.spec.architecture) for sae in plan.saes)
        widths = {sae.hook: sae.d_in for sae in plan.saes} | {sae.target_hook: sae.d_out for sae in plan.saes}
        saved = sum(parameters[sae.name] * _DTYPE_BYTES[sae.spec.dtype] for sae in plan.saes)
        return cls(
            weights=_FLOAT32 * total * processes,
            gradients=_FLOAT32 * total * processes,
            optimizer=moments * processes,
            step=_FLOAT32 * plan.batch_size * (latents + sum(widths.values())),
            checkpoint=_FLOAT32 * total + moments + saved,
            rows=rows * processes,
            model=model * processes,
            scored_model=scored_model,
            scored_beside=scored_beside,
            processes=processes,
        )

    @property
    def training(self) -> int:
        """What the SAEs take, without what they are trained on."""
        return self.weights + self.gradients + self.optimizer + self.step

    @property
    def activations(self) -> int:
        """What SAEs are trained on, and the model that scores them. At the end it comes when the rows are gone."""
        beside = self.rows + self.model
        return beside + self.scored_model if self.scored_beside else max(beside, self.scored_model)

    @property
    def total(self) -> int:
        """Device and host together."""
        return PROCESS_BYTES * self.processes + self.training + self.checkpoint + self.activations

    def lines(self, *, gpu: bool) -> list[str]:
        """One line for each part, for people."""
        place = " (on the GPU)" if gpu else ""
        parts = [
            ("weights", self.weights, place),
            ("gradients", self.gradients, place),
            ("optimizer", self.optimizer, place),
            ("one step", self.step, place),
            ("language model", self.model, place),
            ("model for evaluation", self.scored_model, place),
            ("activations", self.rows, ""),
            ("checkpoint", self.checkpoint, ""),
            ("process", PROCESS_BYTES * self.processes, ""),
            ("total", self.total, " (GPU and host)" if gpu else ""),
        ]
        return [f"{name:<21}{mebibytes(size)}{where}" for name, size, where in parts if size > 0]

    def check(self, spec: SAETrainingJobSpec) -> None:
        """Raises InvalidInput when a pod without a GPU cannot even hold the weights, one step and its activations, or
        one with a GPU the rows that wait in its host memory."""
        limit, field = memory_limit(spec.run), "spec.run.resources.limits.memory"
        if limit is None:
            return
        live = spec.activations.live is not None
        if has_gpu(spec.run):
            # A reader takes what is there; rows of a live source have to fit.
            if live and limit < self.rows:
                raise InvalidInput(
                    "NotEnoughMemory",
                    f"rows of the live source alone take {mebibytes(self.rows).strip()}, the limit is "
                    f"{mebibytes(limit).strip()}; raise it, or lower bufferBytes",
                    field=field,
                )
            return
        if limit < self.training + self.activations:
            lower = "bufferBytes of the live source" if live else "the cache's shardBytes"
            raise InvalidInput(
                "NotEnoughMemory",
                f"weights, optimiser and one step alone take {mebibytes(self.training).strip()} and the activations in "
                f"use {mebibytes(self.activations).strip()}, the limit is {mebibytes(limit).strip()}; raise it, or "
                f"lower batchSize, dSae, the number of SAEs or {lower}",
                field=field,
            )
