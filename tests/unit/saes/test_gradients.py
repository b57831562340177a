"""The written-out gradients of SAEs that select their latents are those of the loss: as traced in float64, and by
finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_job.saes.matryoshka import matryoshka_widths
from sae_job.saes.trainable import StepInput
from sae_job.saes.weights import TrainableWeights
from tests.unit.saes.conftest import BATCH, BATCHTOPK, D_SAE, MATRYOSHKA, TOPK, batch, trainable, transcoded

REVIVE = {"auxKCoefficient": 0.25, "auxK": 3}
TRANSCODER = {"hook": "in", "targetHook": "out"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
for name, kind in {"topk": TOPK, "batchtopk": BATCHTOPK, "matryoshka": MATRYOSHKA}.items():
    plain = {**kind, "auxKCoefficient": 0}
    CASES |= {
        name: (plain, {}),
        f"{name} without centring": (plain, {"applyBDecToInput": False}),
        f"{name} with errors relative to distances": (plain, {"mse_loss_normalization": "dense_batch"}),
        f"{name} as a transcoder": (plain, TRANSCODER),
        f"{name} as a transcoder with a skip connection": (plain, {**TRANSCODER, "skipConnection": True}),
        f"{name}, few dead latents of many revived": ({**kind, **REVIVE}, {}),
        f"{name}, most dead latents revived": ({**kind, **REVIVE, "auxK": 12}, {}),
        f"{name}, all dead latents revived": ({**kind, **REVIVE, "auxK": 16}, {}),
        f"{name}, one dead latent revived, with sparse products": ({**kind, **REVIVE, "auxK": 1}, {}),
        f"{name}, dead latents revived in SAELens's form": ({**kind, **REVIVE, "auxKForm": "saelens"}, {}),
        f"{name}, dead latents revived in SAELens's form, sparsely": (
            {**kind, "auxKForm": "saelens", "auxK": 1, "auxKCoefficient": 0.5},
            {},
        ),
        f"{name}, dead latents of a transcoder revived": ({**kind, **REVIVE}, {**TRANSCODER, "skipConnection": True}),
    }
DEAD = torch.arange(D_SAE) % 4 == 0


def built(case: str) -> tuple[TrainableWeights, StepInput]:
    architecture, fields = CASES[case]
    x = batch()
    sae = trainable(architecture, **fields)
    return sae, StepInput(x, x if sae.spec.target_hook is None else transcoded(x), 0, DEAD)


def features_of(sae: TrainableWeights, pre: Tensor) -> Tensor:
    """Activations, as the types' definitions read."""
    k = sae.spec.architecture.k
    assert k is not None
    if sae.spec.architecture.type == "topk":
        values, places = pre.topk(k, dim=1)
        return torch.zeros_like(pre).scatter(1, places, values.relu())
    values, places = pre.relu().flatten().topk(k * pre.shape[0])
    return torch.zeros_like(pre).flatten().scatter(0, places, values).view_as(pre)


def dense_loss(sae: TrainableWeights, weights: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
    """The loss as its definition reads, in dense operations that autograd traces."""
    architecture = sae.spec.architecture
    centred = x - weights["b_dec"] if sae.spec.subtracts_b_dec else x
    pre = centred @ weights["W_enc_T"].T + weights["b_enc"]
    features = features_of(sae, pre)
    affine = weights["b_dec"] + (x @ weights["W_skip"].T if sae.spec.skip_connection else 0)
    row_weights = torch.ones(x.shape[0], dtype=x.dtype)
    if sae.mse_loss_normalization == "dense_batch":
        row_weights = 1 / ((target - target.mean(dim=0)).norm(dim=1) + 1e-6)
    widths = (D_SAE,)
    if architecture.type == "matryoshka_batchtopk":
        widths = matryoshka_widths(architecture, D_SAE)
    loss = torch.zeros((), dtype=x.dtype)
    for width in widths:
        reconstruction = features[:, :width] @ weights["W_dec"][:width] + affine
        loss = loss + (row_weights * (reconstruction - target).square().sum(dim=1)).mean()
    if architecture.aux_k_coefficient:
        residual = (target - (features @ weights["W_dec"] + affine)).detach()
        loss = loss + auxiliary(sae, weights, target, pre, residual)
    return loss


def auxiliary(
    sae: TrainableWeights, weights: dict[str, Tensor], target: Tensor, pre: Tensor, residual: Tensor
) -> Tensor:
    architecture = sae.spec.architecture
    assert architecture.aux_k is not None
    assert architecture.aux_k_coefficient is not None
    saelens = architecture.aux_k_form == "saelens"
    values, places = pre.masked_fill(~DEAD, -torch.inf).topk(min(architecture.aux_k, int(DEAD.sum())), dim=1)
    predicted = torch.zeros_like(pre).scatter(1, places, values if saelens else values.relu()) @ weights["W_dec"]
    squared = (predicted - residual).square().sum(dim=1).mean()

    def variance(rows: Tensor) -> Tensor:
        return (rows - rows.mean(dim=0)).square().sum(dim=1).mean()

    if saelens:
        return architecture.aux_k_coefficient * min(int(DEAD.sum()) / architecture.aux_k, 1.0) * squared
    return architecture.aux_k_coefficient * variance(target) * squared / variance(residual)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_that_autograd_traces_in_float64(case: str) -> None:
    sae, step = built(case)
    weights = {
        name: tensor.detach().to(torch.float64).requires_grad_() for name, tensor in sae.parameters_by_name.items()
    }
    expected = dense_loss(sae, weights, step.x.to(torch.float64), step.target.to(torch.float64))
    expected.backward()
    statistics = sae.step_gradients(step)
    assert float(statistics.loss) == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in sae.parameters_by_name.items():
        assert parameter.grad is not None
        traced = weights[name].grad
        assert traced is not None
        assert torch.allclose(parameter.grad.to(torch.float64), traced, rtol=1e-4, atol=2e-6), name


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("topk")])
def test_one_pass_over_the_rows_gives_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that a step takes where a kernel reconstructs in one pass, with PyTorch's operators in its place."""
    sae, step = built(case)
    expected = sae.step_gradients(step)
    gradients = {name: parameter.grad for name, parameter in sae.parameters_by_name.items()}
    monkeypatch.setattr("sae_job.saes.sparse_step.kernel_name", lambda device: "triton")
    found = sae.step_gradients(step)
    for name, loss in expected.losses.items():
        assert float(found.losses[name]) == pytest.approx(float(loss), rel=1e-6), name
    for name, parameter in sae.parameters_by_name.items():
        before = gradients[name]
        assert before is not None
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, before, rtol=1e-5, atol=1e-6), name


# The auxiliary loss takes the residual for a constant, so differences of the loss are not its gradient.
@pytest.mark.parametrize("case", [case for case in CASES if "dead" not in case])
def test_gradients_agree_with_finite_differences(case: str) -> None:
    sae, step = built(case)
    sae.step_gradients(step)
    x, target = step.x.to(torch.float64), step.target.to(torch.float64)
    weights = {name: tensor.detach().to(torch.float64) for name, tensor in sae.parameters_by_name.items()}
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sae.parameters_by_name.items():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        size = 1e-6
        above = dense_loss(sae, {**weights, name: weights[name] + size * direction}, x, target)
        below = dense_loss(sae, {**weights, name: weights[name] - size * direction}, x, target)
        slope = ((above - below) / (2 * size)).item()
        assert float((parameter.grad.to(torch.float64) * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("architecture", [TOPK, BATCHTOPK, MATRYOSHKA])
def test_the_batch_size_may_change_between_steps(architecture: dict[str, Any]) -> None:
    sae = trainable(architecture)
    first = sae.step_gradients(StepInput(batch(), batch(), 0, None))
    sae.step_gradients(StepInput(batch(rows=BATCH // 2), batch(rows=BATCH // 2), 1, None))
    again = sae.step_gradients(StepInput(batch(), batch(), 2, None))
    assert torch.equal(first.loss, again.loss)
