"""JumpReLU SAEs: the straight-through gradients, the penalties, and the thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_job.saes.jumprelu import JumpReLUSAE
from sae_job.saes.trainable import ONE_PROCESS, StepInput
from tests.unit.saes.conftest import D_SAE, batch, sae_spec, trainable
from tests.unit.saes.written_gradients import (
    DEAD,
    FREE_NORMS,
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

# Wide enough that a fifth of all pre-activations are within a window, half of these below the threshold.
STEP: dict[str, Any] = {"type": "jumprelu", "l0Coefficient": 0.3, "bandwidth": 0.5, "initialThreshold": 0.4}
TANH = {**STEP, "sparsityPenalty": "tanh"}
TARGET = {**STEP, "sparsityPenalty": "target_l0", "targetL0": 7.0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "step": (STEP, {}),
    "step without centring": (STEP, {"applyBDecToInput": False}),
    "tanh": (TANH, FREE_NORMS),
    "tanh of another scale": ({**TANH, "tanhScale": 1.5}, FREE_NORMS),
    "target": (TARGET, {}),
    "window below zero": ({**STEP, "initialThreshold": 0.05}, {}),
    "dead latents pulled up": ({**STEP, "preActivationCoefficient": 0.7}, FREE_NORMS),
    "transcoder": (TARGET, TRANSCODER),
}


class Jump(torch.autograd.Function):
    """pre 1[pre > threshold], and 1[pre > threshold] where `of_value` is false."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, of_value: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.of_value = bandwidth, of_value
        on = (pre > threshold).to(pre.dtype)
        return pre * on if of_value else on

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (gradient,) = gradients
        pre, threshold = ctx.saved_tensors
        distance = (pre - threshold) / ctx.bandwidth
        window = ((distance > -0.5) & (distance < 0.5)).to(pre.dtype)
        height = threshold if ctx.of_value else torch.ones_like(threshold)
        by_threshold = -(height / ctx.bandwidth * window * gradient).sum(dim=0)
        return ((pre > threshold) * gradient if ctx.of_value else None), by_threshold, None, None


def jump(pre: Tensor, threshold: Tensor, bandwidth: float, *, of_value: bool) -> Tensor:
    result = Jump.apply(pre, threshold, bandwidth, of_value)
    assert isinstance(result, Tensor)
    return result


def jumprelu(architecture: dict[str, Any], **options: Any) -> JumpReLUSAE:
    """With thresholds that differ."""
    sae = trainable(architecture, **options)
    assert isinstance(sae, JumpReLUSAE)
    sae.threshold.data.mul_(torch.linspace(0.8, 1.2, D_SAE))
    return sae


def defined_by(sae: JumpReLUSAE, normalization: str = "none") -> Definition:
    architecture = sae.spec.architecture
    assert architecture.bandwidth is not None
    bandwidth, coefficient = architecture.bandwidth, architecture.l0_coefficient
    assert coefficient is not None

    def loss(weights: Mapping[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        centred = x - weights["b_dec"] if sae.spec.subtracts_b_dec else x
        pre = centred @ weights["W_enc_T"].T + weights["b_enc"]
        threshold, norms = weights["threshold"], weights["W_dec"].norm(dim=1)
        features = jump(pre, threshold, bandwidth, of_value=True)
        l0 = jump(pre, threshold, bandwidth, of_value=False).sum(dim=1)
        if architecture.sparsity_penalty == "tanh":
            penalty = torch.tanh((architecture.tanh_scale or 4.0) * features * norms).sum(dim=1).mean()
        elif architecture.target_l0 is not None:
            penalty = (l0.mean() / architecture.target_l0 - 1).square()
        else:
            penalty = l0.mean()
        pulled = ((threshold - pre).relu() * norms)[:, DEAD].sum(dim=1).mean()
        mse = squared_error(reconstruction(weights, features, x) - target, target, normalization)
        return mse + coefficient * penalty + (architecture.pre_activation_coefficient or 0.0) * pulled

    return loss


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_that_autograd_traces_in_float64(case: str, kernel: str) -> None:
    architecture, fields = CASES[case]
    sae = jumprelu(architecture, **fields)
    assert_gradients_are_of(defined_by(sae), sae, step_input(fields), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_mse_may_be_relative_to_a_rows_distance_from_the_mean(kernel: str) -> None:
    sae = jumprelu(STEP, mse_loss_normalization="dense_batch")
    assert_gradients_are_of(defined_by(sae, "dense_batch"), sae, step_input({}), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ["step", "tanh", "target", "dead latents pulled up"])
def test_two_ranks_are_one_process(case: str, kernel: str) -> None:
    architecture, fields = CASES[case]
    assert_two_ranks_are_one(architecture, fields, kernel)


def one_dimensional(bandwidth: float, threshold: float) -> JumpReLUSAE:
    """One latent that is its input: pre = x, reconstruction = 0, so that the step function stands alone."""
    architecture = {"type": "jumprelu", "l0Coefficient": 1.0, "bandwidth": bandwidth}
    spec = sae_spec(architecture, applyBDecToInput=False).model_copy(update={"d_sae": 1})
    sae = JumpReLUSAE(spec, 1, 1, 1, device=torch.device("cpu"), ranks=ONE_PROCESS)
    with torch.no_grad():
        sae.W_enc_T.fill_(1.0)
        sae.threshold.fill_(threshold)
    return sae


def test_what_is_at_the_threshold_or_below_is_zero() -> None:
    sae = one_dimensional(0.001, 1.0)
    x = torch.tensor([[-1.0], [0.5], [1.0], [1.5], [2.5]])
    assert sae.active_latents(x).dense().squeeze(1).tolist() == [0.0, 0.0, 0.0, 1.5, 2.5]


@pytest.mark.parametrize("kernel", KERNELS)
def test_entries_just_within_the_window_move_the_threshold_by_one_over_the_bandwidth(kernel: str) -> None:
    """Two entries and a gradient of 1 each: -(1 / 0.001) each. Just outside, none."""
    inside, outside = 1.0 + 0.00049 * torch.tensor([[-1.0], [1.0]]), 1.0 + 0.00051 * torch.tensor([[-1.0], [1.0]])
    for x, expected in ((inside, -2000.0), (outside, 0.0)):
        sae = one_dimensional(0.001, 1.0)
        take_step(sae, StepInput(x, torch.zeros_like(x), 0), kernel)
        # The loss is a mean over two rows.
        assert 2 * float(gradients_of(sae)["threshold"]) == pytest.approx(expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_activations_pass_their_gradient_to_pre_activations_only_above_the_threshold(kernel: str) -> None:
    """A reconstruction 1 x f and a target one below it: a gradient of 2 for each row that is active."""
    sae = one_dimensional(0.001, 1.0)
    sae.W_dec.data.fill_(1.0)
    x = torch.tensor([[-1.0], [0.5], [1.5], [2.5]])
    target = torch.tensor([[-1.0], [-1.0], [0.5], [1.5]])
    take_step(sae, StepInput(x, target, 0), kernel)
    assert float(gradients_of(sae)["b_enc"]) == pytest.approx((0 + 0 + 2 + 2) / 4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_dead_latents_nothing_is_pulled_up(kernel: str) -> None:
    sae = jumprelu({**STEP, "preActivationCoefficient": 0.7})
    statistics = take_step(sae, StepInput(batch(), batch(), 0, torch.zeros(D_SAE, dtype=torch.bool)), kernel)
    assert float(statistics.losses["pre_act_loss"]) == 0.0


def test_thresholds_do_not_go_below_zero_and_rise_again() -> None:
    sae = jumprelu(STEP)
    sae.threshold.data.copy_(torch.linspace(-1.0, 1.0, D_SAE))
    sae.after_optimizer_step()
    assert float(sae.threshold.detach().min()) == 0.0
    assert float(sae.threshold.detach().max()) == 1.0
    take_step(sae, step_input({}), "dense")
    assert float(gradients_of(sae)["threshold"][0]) < 0.0


def test_thresholds_are_float32_and_start_where_they_are_told() -> None:
    told = trainable(STEP).parameters_by_name["threshold"]
    default = trainable({"type": "jumprelu", "l0Coefficient": 1.0}, dtype="bfloat16").parameters_by_name["threshold"]
    assert torch.equal(told, torch.full((D_SAE,), 0.4))
    assert torch.equal(default, torch.full((D_SAE,), 0.01, dtype=torch.float32))


@pytest.mark.parametrize("case", ["step", "without centring", "transcoder"])
def test_active_latents_are_those_of_the_saved_sae_which_gives_the_weights_back(case: str) -> None:
    fields = {"step": {}, "without centring": {"applyBDecToInput": False}, "transcoder": TRANSCODER}[case]
    sae = jumprelu(STEP, **fields)
    # An autoencoder's target is its input.
    target_scale = 0.5 if fields == TRANSCODER else 4.0
    saved = sae.to_inference(scale=4.0, target_scale=target_scale)
    assert torch.allclose(saved.encode(batch() / 4.0), sae.active_latents(batch()).dense(), atol=1e-5)
    again = jumprelu(TANH, seed=1, **fields)
    again.start_from(saved, scale=4.0, target_scale=target_scale)
    for name, parameter in sae.parameters_by_name.items():
        assert torch.allclose(again.parameters_by_name[name], parameter, atol=1e-6), name


def test_thresholds_below_zero_are_zero_in_training() -> None:
    """In an SAE for use both let through what is positive; in training the one would let negative activations."""
    saved = jumprelu(STEP).to_inference(scale=1.0)
    saved.threshold[::2] = -0.3
    again = jumprelu(STEP, seed=1)
    again.start_from(saved, scale=1.0, target_scale=1.0)
    assert torch.equal(again.parameters_by_name["threshold"], saved.threshold.clamp(min=0.0))
    assert torch.allclose(again.active_latents(batch()).dense(), saved.encode(batch()), atol=1e-6)
