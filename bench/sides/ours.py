"""The product: `SaeTraining`, as its trainer runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.sides.setting import PENALIZED, Setting, TrainedSae
from sae_job.saes.architectures import build_trainable
from sae_job.saes.config import Provenance
from sae_job.saes.trainable import StepInput
from sae_job.training.plan import resolve_plan
from sae_job.training.sae_training import SaeTraining, sample_rows
from sae_operator.api.training_job import SAETrainingJobSpec

# Rows that the scale is estimated from where no cache tells it exactly.
STATISTICS_ROWS = 65_536
COEFFICIENTS = {"standard": "l1Coefficient", "gated": "l1Coefficient", "jumprelu": "l0Coefficient"}


class _Statistics:
    """Means over rows; see `ActivationStatistics`."""

    def __init__(self, rows: Tensor) -> None:
        rows = rows.double()
        self.d_in = rows.shape[1]
        self.mean = rows.mean(dim=0).tolist()
        self.mean_norm = float(torch.linalg.vector_norm(rows, dim=1).mean())
        self.mean_squared_norm = float(rows.square().sum(dim=1).mean())


def _spec(setting: Setting) -> SAETrainingJobSpec:
    architecture: dict[str, Any] = {"type": setting.architecture}
    if setting.architecture in PENALIZED:
        architecture[COEFFICIENTS[setting.architecture]] = setting.coefficient
    else:
        architecture["k"] = setting.k
    training: dict[str, Any] = {
        "batchSize": setting.batch,
        "tokens": setting.total_steps * setting.batch,
        "learningRate": setting.learning_rate,
    }
    if not setting.quality:
        training["decaySteps"] = 0
    sae = {"name": "sae", "architecture": architecture, "dSae": setting.d_sae, "seed": setting.seed}
    return SAETrainingJobSpec.model_validate(
        {
            "activations": {"uri": "file://unused"},
            "saes": [sae],
            "training": training,
            "normalization": "centered_rms" if setting.quality else "none",
            "output": {"uri": "file://unused"},
        }
    )


class Ours:
    """See `Side`."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.coefficient = setting.coefficient
        rows = setting.total_steps * setting.batch
        self._plan = resolve_plan(_spec(setting), cache_rows=rows, widths={"layer": setting.d_in})
        self._training: SaeTraining
        self._start: dict[str, Tensor] = {}
        self._steps = 0

    def set_coefficient(self, value: float) -> None:
        """Not possible: it is part of the job's spec."""

    def load(self, start: dict[str, Tensor]) -> None:
        self._start = {name: tensor for name, tensor in start.items() if name != "W_enc"}
        self._start["W_enc_T"] = start["W_enc"].T
        if self._steps > 0:
            self._restore()

    def _make(self) -> None:
        self._training = SaeTraining(
            self._plan.saes[0], self._plan, 0, provenance=Provenance(), device=torch.device("cpu")
        )

    def _restore(self) -> None:
        loaded = {f"weights.{name}": tensor for name, tensor in self._start.items()}
        self._training.restore(self._training.tensors() | loaded)

    def begin(self, first: Callable[[int], Tensor]) -> None:
        if not self._setting.quality:
            self._make()
            self._restore()
            return
        self._plan = self._plan.scaled_by({"layer": _Statistics(first(STATISTICS_ROWS))})
        self._make()
        sample = first(sample_rows(self._setting.d_sae)) * self._plan.saes[0].scale
        self._training.initialize(sample, sample)

    def step(self, x: Tensor) -> float | None:
        if self._setting.quality:
            x = x * self._plan.saes[0].scale
        self._training.step(x, x, self._steps)
        self._steps += 1
        if self._setting.quality and self._setting.architecture in PENALIZED:
            return float(self._training.log_line(told_kernel=None)["l0"])
        return None

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        plain = build_trainable(self._plan.saes[0].spec, self._setting.d_in, device="cpu")
        with torch.no_grad():
            for name, tensor in self._start.items():
                plain.parameters_by_name[name].copy_(tensor)
        statistics = plain.step_gradients(StepInput(x, x, 0, None))
        gradients = {name: weight.grad for name, weight in plain.parameters_by_name.items() if weight.grad is not None}
        encoder = gradients.pop("W_enc_T").T
        return {"loss": statistics.loss, "W_enc": encoder, **gradients}

    def trained(self) -> TrainedSae:
        sae = self._training.inference()
        tensors = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
        activation = {"topk": "topk", "standard": "relu"}.get(self._setting.architecture, "jumprelu")
        return TrainedSae(tensors, activation, sae.cfg.apply_b_dec_to_input)
