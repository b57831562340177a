"""Optimisers: a parameter's own rate, and their state in checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_job.training.optimizers import (
    OPTIMIZERS,
    RATE_FACTORS,
    build_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_rate,
)


def parameters() -> dict[str, Tensor]:
    """As a JumpReLU SAE's: the one with a rate of its own stands among the others."""
    shapes = {"W_enc_T": (4, 3), "b_enc": (4,), "threshold": (4,), "W_dec": (4, 3)}
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}
    for number, parameter in enumerate(made.values()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    return made


def values(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def test_thresholds_move_at_their_own_rate() -> None:
    named = parameters()
    optimizer = build_optimizer("adam", named, rate=1.0, betas=(0.9, 0.999))
    set_rate(optimizer, 1e-3)
    before = values(named)
    optimizer.step()
    # Adam's first step is the rate, whatever the gradient.
    for name, parameter in named.items():
        expected = 1e-3 * RATE_FACTORS.get(name, 1.0)
        assert torch.allclose(before[name] - parameter.detach(), torch.full_like(parameter, expected), rtol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_takes_the_steps_of_the_undisturbed_one(name: str) -> None:
    first, second = parameters(), parameters()
    undisturbed = build_optimizer(name, first, rate=1e-2, betas=(0.9, 0.999))
    undisturbed.step()
    resumed = build_optimizer(name, second, rate=1e-2, betas=(0.9, 0.999))
    restore_optimizer(resumed, second, optimizer_tensors(undisturbed, first))
    for target, tensor in zip(second.values(), values(first).values(), strict=True):
        target.data.copy_(tensor)
    for optimizer in (undisturbed, resumed):
        set_rate(optimizer, 5e-3)
        optimizer.step()
    for key, tensor in values(first).items():
        assert torch.equal(tensor, values(second)[key]), key
