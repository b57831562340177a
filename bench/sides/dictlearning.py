"""dictionary_learning: the `update` of its trainers."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor

from bench.sides.setting import Setting, TrainedSae, matryoshka_widths

# Rows that its scale is estimated from: its own 100 batches.
NORM_BATCHES = 100


def _trainer(setting: Setting) -> Any:
    size = {
        "steps": setting.total_steps,
        "activation_dim": setting.d_in,
        "dict_size": setting.d_sae,
        "layer": 0,
        "lm_name": "none",
        "device": "cpu",
        "lr": setting.learning_rate,
        "warmup_steps": setting.warm_up_steps,
        "seed": setting.seed,
        "decay_start": setting.total_steps - setting.decay_steps if setting.decay_steps else None,
    }
    penalty = {"l1_penalty": setting.coefficient, "sparsity_warmup_steps": setting.warm_up_steps}
    # It begins to follow the threshold of batches after 1,000 steps, which a short training may not have.
    threshold = {"k": setting.k, "threshold_start_step": min(1000, setting.total_steps // 2)}
    match setting.architecture:
        case "topk":
            return TopKTrainer(**size, **threshold)
        case "batchtopk":
            return BatchTopKTrainer(**size, **threshold)
        case "matryoshka_batchtopk":
            widths = matryoshka_widths(setting.d_sae)
            sizes = [after - before for before, after in zip([0, *widths[:-1]], widths, strict=True)]
            return MatryoshkaBatchTopKTrainer(
                **size, **threshold, group_fractions=[part / setting.d_sae for part in sizes]
            )
        case "standard":
            return StandardTrainer(**size, **penalty)
        case "gated":
            return GatedSAETrainer(**size, **penalty)
        case "jumprelu":
            torch.manual_seed(setting.seed)  # it does not use its seed
            target = setting.k / setting.coefficient
            return JumpReluTrainer(**size, target_l0=target, sparsity_warmup_steps=setting.warm_up_steps)
        case other:
            raise ValueError(f"no {other}")


class DictionaryLearning:
    """See `Side`."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._trainer = _trainer(setting)
        self._norm = 1.0
        self._steps = 0

    @property
    def coefficient(self) -> float:
        return self._trainer.l1_penalty

    def set_coefficient(self, value: float) -> None:
        self._trainer.l1_penalty = value

    @property
    def _weights(self) -> dict[str, Tensor]:
        """Its parameters by the product's names, and those of gated under theirs; transposed where theirs are."""
        ae = self._trainer.ae
        match self._setting.architecture:
            case "topk" | "batchtopk":
                names = {"W_enc": ae.encoder.weight, "b_enc": ae.encoder.bias, "W_dec": ae.decoder.weight}
                return names | {"b_dec": ae.b_dec}
            case "standard":
                names = {"W_enc": ae.encoder.weight, "b_enc": ae.encoder.bias, "W_dec": ae.decoder.weight}
                return names | {"b_dec": ae.bias}
            case "gated":
                names = {"W_enc": ae.encoder.weight, "W_dec": ae.decoder.weight, "b_dec": ae.decoder_bias}
                return names | {"b_gate": ae.gate_bias, "r_mag": ae.r_mag, "b_mag": ae.mag_bias}
            case "jumprelu":
                names = {"W_enc": ae.W_enc, "b_enc": ae.b_enc, "W_dec": ae.W_dec, "b_dec": ae.b_dec}
                return names | {"threshold": ae.threshold}
            case _:
                return {"W_enc": ae.W_enc, "b_enc": ae.b_enc, "W_dec": ae.W_dec, "b_dec": ae.b_dec}

    def _is_transposed(self, name: str) -> bool:
        """Whether a weight is kept the other way round: in its linear layers."""
        return name in ("W_enc", "W_dec") and self._setting.architecture in ("topk", "batchtopk", "standard", "gated")

    def load(self, start: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(start[name].T if self._is_transposed(name) else start[name])

    def begin(self, first: Callable[[int], Tensor]) -> None:
        if self._setting.quality:
            rows = first(NORM_BATCHES * self._setting.batch)
            self._norm = float(rows.square().sum(dim=1).mean().sqrt())
            self._trainer.ae.scale_biases(1.0)
        else:
            self._steps = 1  # in its first step it sets `b_dec`, which would undo equal weights

    def step(self, x: Tensor) -> float | None:
        if self._setting.quality:
            x = x / self._norm
        self._trainer.update(self._steps, x)
        self._steps += 1
        if self._setting.quality and self._setting.architecture in ("standard", "gated"):
            with torch.no_grad():
                return float((self._trainer.ae.encode(x) > 0).sum()) / len(x)
        return None

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        self._trainer.optimizer.zero_grad()  # some of its trainers leave the last step's
        loss = self._trainer.loss(x, step=1)
        loss.backward()
        found = {"loss": loss.detach()}
        for name, weight in self._weights.items():
            if weight.grad is not None:
                found[name] = weight.grad.T if self._is_transposed(name) else weight.grad
        # Its accounts of what fired are of no matter.
        self._trainer.optimizer.zero_grad()
        return found

    def trained(self) -> TrainedSae:
        ae, architecture = self._trainer.ae, self._setting.architecture
        ae.scale_biases(self._norm)
        tensors = {
            name: (weight.T if self._is_transposed(name) else weight).detach() for name, weight in self._weights.items()
        }
        if architecture in ("batchtopk", "matryoshka_batchtopk"):
            tensors["threshold"] = ae.threshold.expand(self._setting.d_sae)
        activation = {"topk": "topk", "standard": "relu"}.get(architecture, "jumprelu")
        return TrainedSae(tensors, activation, subtracts_b_dec=architecture != "jumprelu")
