"""sae-lens: the step of its `SAETrainer`."""

# pyright: reportMissingImports=false
from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from torch import Tensor

from bench.sides.setting import PENALIZED, Setting, TrainedSae, matryoshka_widths

# Rows that its scale is estimated from; its own default of 1,000 batches of 4,096 is more than these runs have.
NORM_ROWS = 65_536
# The coefficient's name in its trainer.
COEFFICIENTS = {"standard": "l1", "gated": "l1", "jumprelu": "l0"}


def _sae(setting: Setting) -> Any:
    size = {"d_in": setting.d_in, "d_sae": setting.d_sae, "dtype": "float32", "device": "cpu"}
    if setting.quality:
        size["normalize_activations"] = "expected_average_only_in"
    match setting.architecture:
        case "topk":
            return TopKTrainingSAE(TopKTrainingSAEConfig(k=setting.k, **size))
        case "batchtopk":
            return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=setting.k, **size))
        case "matryoshka_batchtopk":
            widths = matryoshka_widths(setting.d_sae)
            return MatryoshkaBatchTopKTrainingSAE(
                MatryoshkaBatchTopKTrainingSAEConfig(k=setting.k, matryoshka_widths=widths, **size)
            )
        case "standard":
            return StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=setting.coefficient, **size))
        case "gated":
            return GatedTrainingSAE(GatedTrainingSAEConfig(l1_coefficient=setting.coefficient, **size))
        case "jumprelu":
            return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(l0_coefficient=setting.coefficient, **size))
        case other:
            raise ValueError(f"no {other}")


class SaeLens:
    """See `Side`."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        torch.manual_seed(setting.seed)
        config = SAETrainerConfig(
            total_training_samples=setting.total_steps * setting.batch,
            train_batch_size_samples=setting.batch,
            lr=setting.learning_rate,
            lr_end=setting.learning_rate,
            # No warm-up, and a decay over the last fifth: as its tutorials have it.
            lr_decay_steps=setting.decay_steps,
        )
        self._trainer = SAETrainer(config, _sae(setting), data_provider=iter(()))

    @property
    def coefficient(self) -> float:
        return self._scheduler.value

    def set_coefficient(self, value: float) -> None:
        # Each step sets it to the final one.
        self._scheduler.current_value = self._scheduler.final_value = value

    @property
    def _scheduler(self) -> Any:
        return self._trainer.coefficient_schedulers[COEFFICIENTS[self._setting.architecture]]

    def load(self, start: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in start.items():
                getattr(self._trainer.sae, name).copy_(tensor)

    def begin(self, first: Callable[[int], Tensor]) -> None:
        if self._setting.quality:
            rows = first(NORM_ROWS)
            provider = iter(rows.split(self._setting.batch))
            self._trainer.activation_scaler.estimate_scaling_factor(
                d_in=self._setting.d_in,
                data_provider=provider,
                n_batches_for_norm_estimate=len(rows) // self._setting.batch,
            )

    def step(self, x: Tensor) -> float | None:
        output = self._trainer.step(x)
        self._trainer.n_training_steps += 1
        if self._setting.quality and self._setting.architecture in PENALIZED:
            return float((output.feature_acts > 0).sum()) / len(x)
        return None

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        sae = self._trainer.sae
        sae.train()
        step = TrainStepInput(
            sae_in=x,
            dead_neuron_mask=self._trainer.dead_neurons,
            coefficients=self._trainer.get_coefficients(),
            n_training_steps=0,
            is_logging_step=False,
        )
        loss = sae.training_forward_pass(step).loss
        loss.backward()
        gradients = {name: weight.grad for name, weight in sae.named_parameters() if weight.grad is not None}
        sae.zero_grad()
        return {"loss": loss.detach(), **gradients}

    def trained(self) -> TrainedSae:
        sae = self._trainer.sae
        scale = self._trainer.activation_scaler.scaling_factor
        if scale is not None:
            sae.fold_activation_norm_scaling_factor(scale)
        with tempfile.TemporaryDirectory() as folder:
            weights, _ = sae.save_inference_model(folder)
            tensors = load_file(Path(weights))
        activation = {"topk": "topk", "standard": "relu"}.get(self._setting.architecture, "jumprelu")
        return TrainedSae(tensors, activation, sae.cfg.apply_b_dec_to_input)
