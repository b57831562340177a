"""The written-out gradients are those of the loss: as traced in float64, and by finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_job.saes.trainable import StepInput
from sae_job.saes.weights import TrainableWeights
from tests.unit.saes.conftest import BATCH, D_SAE, STANDARD, TOPK, batch, trainable

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "topk": (TOPK, {}),
    "topk without centring": (TOPK, {"applyBDecToInput": False}),
    "topk with dead latents revived": ({**TOPK, "auxKCoefficient": 0.25, "auxK": 3}, {}),
    "standard": (STANDARD, {}),
    "standard without centring": (STANDARD, {"applyBDecToInput": False}),
    "standard with p = 1.5": ({**STANDARD, "lpNorm": 1.5}, {}),
    "standard weighted by decoder norms": (
        {**STANDARD, "scaleSparsityPenaltyByDecoderNorm": True},
        {"normalizeDecoder": False, "initialization": {"decoder": "kaiming_uniform"}},
    ),
    "standard weighted, p = 2": (
        {**STANDARD, "scaleSparsityPenaltyByDecoderNorm": True, "lpNorm": 2.0},
        {"normalizeDecoder": False, "initialization": {"decoder": "kaiming_uniform"}},
    ),
}
DEAD = torch.arange(D_SAE) % 4 == 0


def dense_loss(sae: TrainableWeights, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The loss as its definition reads, in dense operations that autograd traces."""
    architecture = sae.spec.architecture
    centred = x - weights["b_dec"] if sae.spec.subtracts_b_dec else x
    pre = centred @ weights["W_enc_T"].T + weights["b_enc"]
    if architecture.type == "topk":
        assert architecture.k is not None
        values, places = pre.topk(architecture.k, dim=1)
        features = torch.zeros_like(pre).scatter(1, places, values.relu())
    else:
        features = pre.relu()
    reconstruction = features @ weights["W_dec"] + weights["b_dec"]
    loss = (reconstruction - x).square().sum(dim=1).mean()
    if architecture.l1_coefficient is not None:
        weighted = features
        if architecture.scale_sparsity_penalty_by_decoder_norm:
            weighted = features * weights["W_dec"].norm(dim=1)
        loss = loss + architecture.l1_coefficient * weighted.norm(p=architecture.lp_norm or 1.0, dim=1).mean()
    if architecture.aux_k_coefficient is not None:
        loss = loss + auxiliary(sae, weights, x, pre, (x - reconstruction).detach())
    return loss


def auxiliary(sae: TrainableWeights, weights: dict[str, Tensor], x: Tensor, pre: Tensor, residual: Tensor) -> Tensor:
    architecture = sae.spec.architecture
    assert architecture.aux_k is not None
    assert architecture.aux_k_coefficient is not None
    values, places = pre.masked_fill(~DEAD, -torch.inf).topk(architecture.aux_k, dim=1)
    predicted = torch.zeros_like(pre).scatter(1, places, values.relu()) @ weights["W_dec"]

    def variance(rows: Tensor) -> Tensor:
        return (rows - rows.mean(dim=0)).square().sum(dim=1).mean()

    relative = (predicted - residual).square().sum(dim=1).mean() / variance(residual)
    return architecture.aux_k_coefficient * variance(x) * relative


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_that_autograd_traces_in_float64(case: str) -> None:
    architecture, fields = CASES[case]
    sae, x = trainable(architecture, **fields), batch()
    weights = {
        name: tensor.detach().to(torch.float64).requires_grad_() for name, tensor in sae.parameters_by_name.items()
    }
    expected = dense_loss(sae, weights, x.to(torch.float64))
    expected.backward()
    statistics = sae.step_gradients(StepInput(x, x, 0, DEAD))
    assert float(statistics.loss) == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in sae.parameters_by_name.items():
        assert parameter.grad is not None
        traced = weights[name].grad
        assert traced is not None
        assert torch.allclose(parameter.grad.to(torch.float64), traced, rtol=1e-4, atol=1e-6), name


# The auxiliary loss takes the residual for a constant, so differences of the loss are not its gradient.
@pytest.mark.parametrize("case", [case for case in CASES if "dead" not in case])
def test_gradients_agree_with_finite_differences(case: str) -> None:
    architecture, fields = CASES[case]
    sae, x = trainable(architecture, **fields), batch(seed=2)
    sae.step_gradients(StepInput(x, x, 0, DEAD))
    weights = {name: tensor.detach().to(torch.float64) for name, tensor in sae.parameters_by_name.items()}
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sae.parameters_by_name.items():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        above = dense_loss(sae, {**weights, name: weights[name] + step * direction}, x.to(torch.float64))
        below = dense_loss(sae, {**weights, name: weights[name] - step * direction}, x.to(torch.float64))
        slope = ((above - below) / (2 * step)).item()
        assert float((parameter.grad.to(torch.float64) * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_the_batch_size_may_change_between_steps() -> None:
    sae = trainable(TOPK)
    first = sae.step_gradients(StepInput(batch(), batch(), 0, None))
    sae.step_gradients(StepInput(batch(rows=BATCH // 2), batch(rows=BATCH // 2), 1, None))
    again = sae.step_gradients(StepInput(batch(), batch(), 2, None))
    assert torch.equal(first.loss, again.loss)


def test_no_dead_latents_make_the_auxiliary_loss_zero() -> None:
    sae = trainable({**TOPK, "auxKCoefficient": 0.25})
    none_dead = torch.zeros(D_SAE, dtype=torch.bool)
    statistics = sae.step_gradients(StepInput(batch(), batch(), 0, none_dead))
    assert float(statistics.losses["auxiliary_reconstruction_loss"]) == 0.0
    assert torch.equal(statistics.loss, statistics.losses["mse_loss"])


def test_the_auxiliary_loss_does_not_touch_live_latents_nor_the_bias() -> None:
    plain, revived = trainable(TOPK), trainable({**TOPK, "auxKCoefficient": 10.0, "auxK": 3})
    with torch.no_grad():
        for sae in (plain, revived):
            sae.b_enc[DEAD] = -0.5  # below every live latent's chance, above the ReLU's reach for some
    for sae in (plain, revived):
        sae.step_gradients(StepInput(batch(), batch(), 0, DEAD))
    assert plain.W_dec.grad is not None
    assert revived.W_dec.grad is not None
    assert torch.equal(plain.W_dec.grad[~DEAD], revived.W_dec.grad[~DEAD])


def test_the_sparsity_penalty_warms_up_linearly() -> None:
    sae = trainable({"type": "standard", "l1Coefficient": 5.0, "l1WarmUpSteps": 10})
    losses = [
        float(sae.step_gradients(StepInput(batch(), batch(), step, None)).losses["l1_loss"])
        for step in (0, 1, 5, 10, 20)
    ]
    assert losses[0] == 0.0
    assert losses[1] == pytest.approx(losses[3] / 10)
    assert losses[2] == pytest.approx(losses[3] / 2)
    assert losses[4] == losses[3]
