"""Standard SAEs: what their loss is, and that dense and sparse steps have its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_job.saes.standard import StandardSAE
from sae_job.saes.trainable import StepInput
from sae_operator.api.sae import Architecture
from tests.unit.saes.conftest import BATCH, D_SAE, batch, trainable
from tests.unit.saes.written_gradients import (
    FREE_NORMS,
    KERNELS,
    TRANSCODER,
    Definition,
    assert_gradients_are_of,
    assert_two_ranks_are_one,
    float64_weights,
    gradients_of,
    reconstruction,
    small_blocks,  # noqa: F401 - a fixture for every test here
    squared_error,
    step_input,
    take_step,
)

PLAIN = {"type": "standard", "l1Coefficient": 0.3}
UNWEIGHTED = {**PLAIN, "scaleSparsityPenaltyByDecoderNorm": False}
UNIT_NORM = {"normalizeDecoder": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "weighted by decoder norms": (PLAIN, FREE_NORMS),
    "weighted, p = 2": ({**PLAIN, "lpNorm": 2.0}, FREE_NORMS),
    "decoder rows of unit norm": (PLAIN, UNIT_NORM),
    "without weights": (UNWEIGHTED, FREE_NORMS),
    "without centring": (PLAIN, {"applyBDecToInput": False}),
    "p = 1.5": ({**PLAIN, "lpNorm": 1.5}, UNIT_NORM),
    "p = 0.9": ({**PLAIN, "lpNorm": 0.9}, UNIT_NORM),
    "tanh-relu": ({**PLAIN, "activation": "tanh-relu"}, FREE_NORMS),
    "tanh-relu, p = 2": ({**PLAIN, "activation": "tanh-relu", "lpNorm": 2.0}, UNIT_NORM),
    "transcoder": (PLAIN, TRANSCODER),
}


def definition(architecture: Architecture, *, centres: bool, weighted: bool, normalization: str = "none") -> Definition:
    def loss(weights: Mapping[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        pre = (x - weights["b_dec"] if centres else x) @ weights["W_enc_T"].T + weights["b_enc"]
        features = pre.relu().tanh() if architecture.activation == "tanh-relu" else pre.relu()
        penalized = features * weights["W_dec"].norm(dim=1) if weighted else features
        p = architecture.lp_norm or 1.0
        # A power of zero below 1 has no slope that autograd could give.
        powers = torch.where(penalized > 0, penalized.clamp_min(1e-30).pow(p), 0.0)
        norms = powers.sum(dim=1).pow(1 / p)
        assert architecture.l1_coefficient is not None
        mse = squared_error(reconstruction(weights, features, x) - target, target, normalization)
        return mse + architecture.l1_coefficient * norms.mean()

    return loss


def defined_by(sae: Any, normalization: str = "none") -> Definition:
    assert isinstance(sae, StandardSAE)
    weighted = not sae.spec.normalize_decoder and sae.spec.architecture.scale_sparsity_penalty_by_decoder_norm is None
    return definition(
        sae.spec.architecture, centres=sae.spec.subtracts_b_dec, weighted=weighted, normalization=normalization
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_that_autograd_traces_in_float64(case: str, kernel: str) -> None:
    architecture, fields = CASES[case]
    sae = trainable(architecture, **fields)
    assert_gradients_are_of(defined_by(sae), sae, step_input(fields), kernel)


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree_with_finite_differences(case: str) -> None:
    architecture, fields = CASES[case]
    sae, inputs = trainable(architecture, **fields), step_input(fields, seed=2)
    loss = defined_by(sae)
    take_step(sae, inputs, "dense")
    weights = {name: weight.detach() for name, weight in float64_weights(sae).items()}
    generator = torch.Generator().manual_seed(3)
    x, target = inputs.x.to(torch.float64), inputs.target.to(torch.float64)
    for name, gradient in gradients_of(sae).items():
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        above = loss({**weights, name: weights[name] + 1e-6 * direction}, x, target)
        below = loss({**weights, name: weights[name] - 1e-6 * direction}, x, target)
        slope = (above - below).item() / 2e-6
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_mse_may_be_relative_to_a_rows_distance_from_the_mean(kernel: str) -> None:
    sae = trainable(PLAIN, mse_loss_normalization="dense_batch")
    assert_gradients_are_of(defined_by(sae, "dense_batch"), sae, step_input({}), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("normalization", ["none", "dense_batch"])
def test_two_ranks_are_one_process(kernel: str, normalization: Any) -> None:
    assert_two_ranks_are_one({**PLAIN, "lpNorm": 1.5}, TRANSCODER, kernel, normalization)


@pytest.mark.parametrize("kernel", KERNELS)
def test_firing_is_counted_above_zero(kernel: str) -> None:
    sae = trainable(PLAIN)
    statistics = take_step(sae, step_input({}), kernel)
    pre = (batch() - sae.b_dec) @ sae.W_enc_T.T + sae.b_enc
    assert torch.equal(statistics.fire_counts, (pre > 0).sum(dim=0))


def test_the_regime_follows_the_share_of_active_entries() -> None:
    sae = trainable({"type": "standard", "l1Coefficient": 0.0})
    assert isinstance(sae, StandardSAE)
    kernels = []
    for bias in (0.0, -100.0, -100.0, 0.0, 0.0):
        with torch.no_grad():
            sae.b_enc.fill_(bias)
        kernels.append(sae.step_gradients(step_input({})).kernel)
    # Each step goes by the one before it.
    assert kernels == ["dense", "dense", "sparse", "sparse", "dense"]


def test_what_the_regime_goes_by_is_kept_in_a_buffer() -> None:
    before, resumed = trainable(PLAIN), trainable(PLAIN)
    assert isinstance(before, StandardSAE)
    assert isinstance(resumed, StandardSAE)
    before.b_enc.data.fill_(-100.0)
    before.step_gradients(step_input({}))
    for name, tensor in before.buffers_by_name.items():
        resumed.buffers_by_name[name].copy_(tensor)
    assert before.regime.is_sparse
    assert resumed.regime.is_sparse


@pytest.mark.parametrize("bias", [0.0, -0.2])
def test_a_resumed_sae_takes_the_step_of_the_undisturbed_one_bit_for_bit(bias: float) -> None:
    """By dense and, with the lower bias, by sparse steps."""
    undisturbed, resumed = trainable(PLAIN), trainable(PLAIN, seed=1)
    assert isinstance(undisturbed, StandardSAE)
    assert isinstance(resumed, StandardSAE)
    undisturbed.b_enc.data.fill_(bias)
    undisturbed.step_gradients(step_input({}))
    for named, others in (
        (undisturbed.parameters_by_name, resumed.parameters_by_name),
        (undisturbed.buffers_by_name, resumed.buffers_by_name),
    ):
        for name, tensor in named.items():
            others[name].data.copy_(tensor)
    ours = undisturbed.step_gradients(step_input({}, seed=5, step=1))
    theirs = resumed.step_gradients(step_input({}, seed=5, step=1))
    assert ours.kernel == theirs.kernel == ("sparse" if bias else "dense")
    assert ours.fire_counts.any()
    assert torch.equal(ours.loss, theirs.loss)
    for name, gradient in gradients_of(undisturbed).items():
        assert torch.equal(gradient, gradients_of(resumed)[name]), name


def test_a_step_without_active_latents_has_the_gradient_of_the_bias_alone() -> None:
    sae = trainable(PLAIN, applyBDecToInput=False)
    sae.b_enc.data.fill_(-100.0)
    take_step(sae, step_input({}), "sparse")
    gradients = gradients_of(sae)
    expected = 2 * (sae.b_dec.detach() - batch()).mean(dim=0)
    assert torch.allclose(gradients.pop("b_dec").float(), expected, atol=1e-6)
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("kernel", KERNELS)
def test_noise_moves_the_step_but_not_the_latents_of_use(kernel: str) -> None:
    quiet, noisy = trainable({**PLAIN, "noiseScale": 0.0}), trainable({**PLAIN, "noiseScale": 100.0})
    assert isinstance(noisy, StandardSAE)

    def loss(sae: Any, seed: int) -> float:
        inputs = StepInput(batch(), batch(), 0, None, torch.Generator().manual_seed(seed))
        return float(take_step(sae, inputs, kernel).loss)

    assert loss(quiet, 0) == loss(quiet, 1)
    assert loss(noisy, 0) != loss(noisy, 1)
    assert loss(noisy, 0) == loss(noisy, 0)
    first, second = (noisy.active_latents(batch()).dense() for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("activation", ["relu", "tanh-relu"])
def test_active_latents_are_those_of_the_saved_sae(activation: str) -> None:
    sae = trainable({**PLAIN, "activation": activation})
    assert isinstance(sae, StandardSAE)
    features = sae.to_inference(scale=1.0).encode(batch())
    assert torch.allclose(sae.active_latents(batch()).dense(), features, atol=1e-6)
    assert features.shape == (BATCH, D_SAE)


def test_the_penalty_warms_up_linearly() -> None:
    sae = trainable({"type": "standard", "l1Coefficient": 5.0, "l1WarmUpSteps": 10})
    assert isinstance(sae, StandardSAE)
    told = [sae.step_gradients(step_input({}, step=step)).coefficient for step in (0, 1, 5, 10, 20)]
    assert told == [0.0, 0.5, 2.5, 5.0, 5.0]
