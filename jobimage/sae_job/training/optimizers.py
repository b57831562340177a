"""The table of optimisers, and their state as tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Parameters = Mapping[str, Tensor]
_Build = Callable[[list[Tensor], float, tuple[float, float]], Optimizer]


def _adam(parameters: list[Tensor], rate: float, betas: tuple[float, float]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=rate, betas=betas, fused=True)


def _adamw(parameters: list[Tensor], rate: float, betas: tuple[float, float]) -> Optimizer:
    """Without decay, which would shrink decoder rows that are kept at unit norm."""
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=0.0, fused=True)


def _adafactor(parameters: list[Tensor], rate: float, betas: tuple[float, float]) -> Optimizer:
    """Shazeer & Stern 2018: second moments by row and column alone, and no first ones, so betas say nothing.

    Steps are relative to a parameter's own size, and the rate is at most 1/sqrt(step).
    """
    return torch.optim.Adafactor(parameters, lr=rate, weight_decay=0.0)


# Adding one is one row here, and its name in `Training.optimizer`.
OPTIMIZERS: dict[str, _Build] = {"adam": _adam, "adamw": _adamw, "adafactor": _adafactor}


def build_optimizer(name: str, parameters: Parameters, *, rate: float, betas: tuple[float, float]) -> Optimizer:
    """A fresh optimiser of these parameters.

    Args:
        name: a key of `OPTIMIZERS`.
        parameters: what it changes, by name.
        rate: learning rate until `set_rate`.
        betas: decay rates of the moments, where it has them.
    """
    return OPTIMIZERS[name](list(parameters.values()), rate, betas)


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: Optimizer, parameters: Parameters) -> dict[str, Tensor]:
    """All of its state: `<parameter>.<part>` -> tensor; empty before the first step."""
    return {
        f"{name}.{part}": tensor
        for name, parameter in parameters.items()
        for part, tensor in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: Optimizer, parameters: Parameters, tensors: Mapping[str, Tensor]) -> None:
    """Take over what `optimizer_tensors` gave; each part goes where the optimiser keeps it."""
    state: dict[int, dict[str, Any]] = {}
    for number, name in enumerate(parameters):
        prefix = f"{name}."
        parts = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if parts:
            # Cloned: the optimiser would go on in the very tensors that it is given.
            state[number] = {part: tensor.clone() for part, tensor in parts.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
