"""The table of optimisers, and their state as tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Parameters = Mapping[str, Tensor]
_Groups = list[dict[str, Any]]
_Build = Callable[[_Groups, float, tuple[float, float]], Optimizer]
# What the learning rate is multiplied by for a parameter of this name. Adam moves a number by about the rate in a
# step, and a JumpReLU threshold has to go from 0.01 to about 1 before one latent in a hundred is active, which at the
# rate that suits the weights is most of a short training (SmolLM2 layer 15, 1152 latents, 250 steps of 512 rows at
# 1e-3: L0 went from 476 to 773 with 1, as other weights moved faster, and to 60 with 10).
RATE_FACTORS = {"threshold": 10.0}


def _adam(parameters: _Groups, rate: float, betas: tuple[float, float]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=rate, betas=betas, fused=True)


def _adamw(parameters: _Groups, rate: float, betas: tuple[float, float]) -> Optimizer:
    """Without decay, which would shrink decoder rows that are kept at unit norm."""
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=0.0, fused=True)


def _adafactor(parameters: _Groups, rate: float, betas: tuple[float, float]) -> Optimizer:
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
    by_factor: dict[float, list[Tensor]] = {}
    for parameter_name, parameter in parameters.items():
        by_factor.setdefault(RATE_FACTORS.get(parameter_name, 1.0), []).append(parameter)
    groups = [{"params": members, "rate_factor": factor} for factor, members in by_factor.items()]
    optimizer = OPTIMIZERS[name](groups, rate, betas)
    set_rate(optimizer, rate)
    return optimizer


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """The rate of the next step, times each parameter's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


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
    names = {id(parameter): name for name, parameter in parameters.items()}
    # The optimiser numbers parameters group by group.
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(members):
        prefix = f"{names[id(parameter)]}."
        parts = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if parts:
            # Cloned: the optimiser would go on in the very tensors that it is given.
            state[number] = {part: tensor.clone() for part, tensor in parts.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
