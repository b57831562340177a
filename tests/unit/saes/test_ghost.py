"""Ghost gradients: dead latents predict what the live ones leave, and nothing else is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_job.saes.standard import StandardSAE
from sae_job.saes.trainable import MseNormalization, StepInput
from tests.unit.saes.conftest import D_SAE, batch, trainable
from tests.unit.saes.written_gradients import (
    DEAD,
    KERNELS,
    TRANSCODER,
    Definition,
    assert_gradients_are_of,
    assert_two_ranks_are_one,
    gradients_of,
    reconstruction,
    small_blocks,  # noqa: F401 - a fixture for every test here
    squared_error,
    step_input,
    take_step,
)

GHOSTLY: dict[str, Any] = {"type": "standard", "l1Coefficient": 0.0, "ghostGradients": True}
PLAIN: dict[str, Any] = {"type": "standard", "l1Coefficient": 0.0}


def definition(*, centres: bool, normalization: str = "none") -> Definition:
    def loss(weights: Mapping[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        pre = (x - weights["b_dec"] if centres else x) @ weights["W_enc_T"].T + weights["b_enc"]
        error = reconstruction(weights, pre.relu(), x) - target
        row = 1.0
        if normalization == "dense_batch":
            row = 1 / ((target - target.mean(dim=0)).norm(dim=1, keepdim=True) + 1e-6)
        residual = -error.detach()
        predicted = torch.exp(pre[:, DEAD]) @ weights["W_dec"][DEAD]
        scale = residual.norm(dim=1, keepdim=True) / (1e-6 + 2 * predicted.norm(dim=1, keepdim=True))
        squared = row * (predicted * scale.detach() - residual).square()
        factor = (row * residual.square() / (squared + 1e-6)).detach()
        return squared_error(error, target, normalization) + (factor * squared).sum(dim=1).mean()

    return loss


def ghost_loss(sae: Any, inputs: StepInput, kernel: str = "dense") -> float:
    return float(take_step(sae, inputs, kernel).losses["ghost_grad_loss"])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fields", [{}, {"applyBDecToInput": False}, TRANSCODER])
@pytest.mark.parametrize("normalization", ["none", "dense_batch"])
def test_gradients_equal_those_that_autograd_traces_in_float64(
    fields: dict[str, Any], kernel: str, normalization: MseNormalization
) -> None:
    sae = trainable(GHOSTLY, mse_loss_normalization=normalization, **fields)
    expected = definition(centres=sae.spec.subtracts_b_dec, normalization=normalization)
    assert_gradients_are_of(expected, sae, step_input(fields), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_dead_latents_get_its_gradient(kernel: str) -> None:
    found = []
    for architecture in (PLAIN, GHOSTLY):
        sae = trainable(architecture)
        take_step(sae, step_input({}), kernel)
        found.append(gradients_of(sae))
    for name in ("W_enc_T", "b_enc", "W_dec"):
        assert torch.equal(found[0][name][~DEAD], found[1][name][~DEAD])
        assert not torch.equal(found[0][name][DEAD], found[1][name][DEAD])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dead", [None, torch.zeros(D_SAE, dtype=torch.bool)])
def test_without_dead_latents_it_is_zero(dead: Tensor | None, kernel: str) -> None:
    plain, ghostly = trainable(PLAIN), trainable(GHOSTLY)
    inputs = StepInput(batch(), batch(), 0, dead)
    assert ghost_loss(ghostly, inputs, kernel) == 0.0
    take_step(plain, inputs, kernel)
    for name, gradient in gradients_of(plain).items():
        assert torch.equal(gradient, gradients_of(ghostly)[name])


@pytest.mark.parametrize("bias", [1000.0, -1000.0])
def test_extreme_pre_activations_of_dead_latents_do_not_overflow(bias: float) -> None:
    sae = trainable(GHOSTLY)
    sae.b_enc.data[DEAD] = bias
    loss = ghost_loss(sae, StepInput(batch(), batch(), 0, DEAD))
    assert math.isfinite(loss)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients_of(sae).values())


def test_pre_activations_that_all_grow_by_the_same_change_nothing() -> None:
    """The prediction's size is brought to half of the residual's."""
    sae = trainable(GHOSTLY, applyBDecToInput=False)
    sae.b_enc.data.fill_(-40.0)
    before = ghost_loss(sae, step_input({}))
    sae.b_enc.data.add_(20.0)
    assert ghost_loss(sae, step_input({})) == pytest.approx(before, rel=1e-3)


def test_it_is_a_sum_over_the_width_like_the_reconstruction_loss() -> None:
    """Factor times squared error is the squared residual, element by element, so the sums are equal."""
    sae = trainable(GHOSTLY)
    statistics = take_step(sae, step_input({}), "dense")
    assert float(statistics.losses["ghost_grad_loss"]) == pytest.approx(float(statistics.losses["mse_loss"]), rel=1e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_ranks_are_one_process(kernel: str) -> None:
    assert_two_ranks_are_one(GHOSTLY, {}, kernel)


def test_it_revives() -> None:
    """Latents that fire on no row get a gradient that makes them fire."""
    sae = trainable(GHOSTLY)
    assert isinstance(sae, StandardSAE)
    x = batch(rows=64)
    sae.b_enc.data[DEAD] = -2 * ((x - sae.b_dec) @ sae.W_enc_T.T).max().detach()
    optimizer = torch.optim.Adam(list(sae.parameters_by_name.values()), lr=0.05)
    for step in range(40):
        statistics = sae.step_gradients(StepInput(x, x, step, DEAD))
        assert step > 0 or not statistics.fire_counts[DEAD].any()
        optimizer.step()
        sae.after_optimizer_step()
    assert int((sae.step_gradients(StepInput(x, x, 40, DEAD)).fire_counts[DEAD] > 0).sum()) >= 8
