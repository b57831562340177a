"""What the specifications of SAEs with a sparsity penalty share: gradients against their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_job.saes import penalized
from sae_job.saes.penalized import PenalizedSAE
from sae_job.saes.trainable import MseNormalization, StepInput, StepStatistics, TrainableSAE
from tests.unit.saes.conftest import D_SAE, batch, trainable, transcoded
from tests.unit.saes.simulated_ranks import SimulatedRank, on_ranks

KERNELS = ("dense", "sparse")
DEAD = torch.arange(D_SAE) % 4 == 0
TRANSCODER = {"targetHook": "out", "skipConnection": True}
# Decoder rows that are not of unit norm, so that norms matter.
FREE_NORMS = {"normalizeDecoder": False, "initialization": {"decoder": "kaiming_uniform"}}
# Of float64 weights by name, inputs and targets: the loss as its definition reads.
Definition = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of these tests are of several blocks, the last one shorter."""
    monkeypatch.setattr(penalized, "_CPU_ENTRIES", 10 * D_SAE)
    monkeypatch.setattr(penalized, "_FEWEST_ROWS", 1)


def step_input(fields: Mapping[str, Any], *, seed: int = 1, step: int = 0) -> StepInput:
    x = batch(seed)
    return StepInput(x, transcoded(x) if "targetHook" in fields else x, step, DEAD)


def take_step(sae: Any, inputs: StepInput, kernel: str) -> StepStatistics:
    """A step in the regime of this name."""
    assert isinstance(sae, PenalizedSAE)
    sae.regime.entries_per_row.fill_(0.0 if kernel == "sparse" else math.inf)
    statistics = as_trainable(sae).step_gradients(inputs)
    assert statistics.kernel == kernel
    assert float(statistics.loss) == pytest.approx(sum(float(part) for part in statistics.losses.values()), rel=1e-6)
    return statistics


def as_trainable(sae: Any) -> TrainableSAE:
    return sae


def gradients_of(sae: Any) -> dict[str, Tensor]:
    """Copies of all gradients, in float64."""
    gradients = {name: parameter.grad for name, parameter in as_trainable(sae).parameters_by_name.items()}
    return {name: gradient.to(torch.float64) for name, gradient in gradients.items() if gradient is not None}


def float64_weights(sae: Any) -> dict[str, Tensor]:
    named = as_trainable(sae).parameters_by_name
    return {name: tensor.detach().to(torch.float64).requires_grad_() for name, tensor in named.items()}


def assert_gradients_are_of(definition: Definition, sae: Any, inputs: StepInput, kernel: str) -> None:
    """The step's loss and gradients are those that autograd traces in float64."""
    weights = float64_weights(sae)
    expected = definition(weights, inputs.x.to(torch.float64), inputs.target.to(torch.float64))
    expected.backward()
    statistics = take_step(sae, inputs, kernel)
    assert float(statistics.loss) == pytest.approx(expected.item(), rel=1e-5)
    found = gradients_of(sae)
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        traced = torch.zeros_like(weight) if weight.grad is None else weight.grad
        # Of the largest entry: powers and ratios of activations near zero magnify float32's rounding.
        assert torch.allclose(found[name], traced, rtol=1e-4, atol=1e-6 + 1e-4 * float(traced.abs().max())), name


def assert_two_ranks_are_one(
    architecture: dict[str, Any], fields: dict[str, Any], kernel: str, normalization: MseNormalization = "none"
) -> None:
    """Losses, counts and gradients of two ranks, added, are those of one process."""
    inputs = step_input(fields)
    alone = trainable(architecture, mse_loss_normalization=normalization, **fields)
    whole = take_step(alone, inputs, kernel)
    half = inputs.x.shape[0] // 2

    def part(rank: SimulatedRank) -> tuple[StepStatistics, dict[str, Tensor]]:
        sae = trainable(architecture, ranks=rank, mse_loss_normalization=normalization, **fields)
        mine = slice(0, half) if rank.index == 0 else slice(half, None)
        statistics = take_step(sae, StepInput(inputs.x[mine], inputs.target[mine], inputs.step, inputs.dead), kernel)
        return statistics, gradients_of(sae)

    (first, ours), (second, theirs) = on_ranks(2, part)
    assert float(first.loss + second.loss) == pytest.approx(float(whole.loss), rel=1e-5)
    assert torch.equal(first.fire_counts + second.fire_counts, whole.fire_counts)
    for name, gradient in gradients_of(alone).items():
        assert torch.allclose(ours[name] + theirs[name], gradient, rtol=1e-4, atol=1e-6), name


def reconstruction(weights: Mapping[str, Tensor], features: Tensor, x: Tensor) -> Tensor:
    skip = x @ weights["W_skip"].T if "W_skip" in weights else 0.0
    return features @ weights["W_dec"] + weights["b_dec"] + skip


def squared_error(error: Tensor, target: Tensor, normalization: str = "none") -> Tensor:
    """Mean over rows of sums over d_out."""
    squared = error.square().sum(dim=1)
    if normalization == "dense_batch":
        squared = squared / ((target - target.mean(dim=0)).norm(dim=1) + 1e-6)
    return squared.mean()
