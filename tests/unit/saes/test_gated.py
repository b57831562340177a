"""Gated SAEs: what their loss is, and that dense and sparse steps have its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_job.saes.gated import GatedSAE
from tests.unit.saes.conftest import batch, trainable, transcoded
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

GATED: dict[str, Any] = {"type": "gated", "l1Coefficient": 0.3}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "without centring": {"applyBDecToInput": False},
    "decoder rows of any norm": FREE_NORMS,
    "transcoder": TRANSCODER,
}


def gated(**options: Any) -> GatedSAE:
    sae = trainable(GATED, **options)
    assert isinstance(sae, GatedSAE)
    return sae


def encode(weights: Mapping[str, Tensor], x: Tensor, *, centres: bool) -> tuple[Tensor, Tensor]:
    """Gates (through a ReLU) and activations."""
    shared = (x - weights["b_dec"] if centres else x) @ weights["W_enc_T"].T
    gates = (shared + weights["b_gate"]).relu()
    magnitudes = (shared * weights["r_mag"].exp() + weights["b_mag"]).relu()
    return gates, (gates > 0) * magnitudes


def definition(*, centres: bool, normalization: str = "none") -> Definition:
    def loss(weights: Mapping[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        gates, features = encode(weights, x, centres=centres)
        frozen = {name: weights[name].detach() for name in ("W_dec", "b_dec", "W_skip") if name in weights}
        return (
            squared_error(reconstruction(weights, features, x) - target, target, normalization)
            + 0.3 * (gates * weights["W_dec"].norm(dim=1)).sum(dim=1).mean()
            + squared_error(reconstruction(frozen, gates, x) - target, target)
        )

    return loss


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_that_autograd_traces_in_float64(case: str, kernel: str) -> None:
    sae = gated(**CASES[case])
    assert_gradients_are_of(definition(centres=sae.spec.subtracts_b_dec), sae, step_input(CASES[case]), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_mse_may_be_relative_to_a_rows_distance_from_the_mean(kernel: str) -> None:
    sae = gated(mse_loss_normalization="dense_batch")
    assert_gradients_are_of(definition(centres=True, normalization="dense_batch"), sae, step_input({}), kernel)


@pytest.mark.parametrize("name", ["r_mag", "b_mag"])
def test_gradients_of_magnitudes_agree_with_finite_differences(name: str) -> None:
    """Of the parameters that no step function and no constant stands before."""
    sae, loss = gated(), definition(centres=True)
    take_step(sae, step_input({}), "dense")
    weights = {key: weight.detach() for key, weight in float64_weights(sae).items()}
    direction = torch.randn(sae.d_sae, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = batch().to(torch.float64)
    above, below = (loss({**weights, name: weights[name] + e * direction}, x, x) for e in (1e-6, -1e-6))
    slope = (above - below).item() / 2e-6
    assert float((gradients_of(sae)[name] * direction).sum()) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_auxiliary_reconstruction_takes_the_decoder_for_a_constant(kernel: str) -> None:
    """With magnitudes all zero and no penalty, only the auxiliary reconstruction sees latents at all."""
    sae = trainable({**GATED, "l1Coefficient": 0.0})
    sae.parameters_by_name["b_mag"].data.fill_(-1e6)
    take_step(sae, step_input({}), kernel)
    gradients = gradients_of(sae)
    assert not gradients["W_dec"].any()
    assert gradients["W_enc_T"].any()
    assert gradients["b_gate"].any()


def test_the_reconstruction_gives_gates_no_gradient() -> None:
    """The step function has none; that of the gate's bias is of the two other losses."""
    sae = gated()
    take_step(sae, step_input({}), "dense")
    before = gradients_of(sae)["b_gate"]
    sae.b_mag.data.add_(1.0)  # another reconstruction, the same gates
    take_step(sae, step_input({}), "dense")
    assert torch.equal(gradients_of(sae)["b_gate"], before)


def test_parts_of_the_loss_are_told() -> None:
    losses = take_step(gated(), step_input({}), "dense").losses
    assert losses.keys() == {"mse_loss", "l1_loss", "auxiliary_reconstruction_loss"}


def test_a_worked_example() -> None:
    sae = GatedSAE(
        trainable({"type": "gated", "l1Coefficient": 0.0}, applyBDecToInput=False).spec,
        2,
        2,
        3,
        device=torch.device("cpu"),
        ranks=gated().ranks,
    )
    with torch.no_grad():
        sae.W_enc_T.fill_(1.0)
        sae.W_dec.fill_(1.0)
        sae.b_gate.copy_(torch.tensor([-2.0, 0.0, 1.0]))
        sae.r_mag.copy_(torch.tensor([1.0, 2.0, 3.0]))
        sae.b_mag.fill_(1.0)
    x = torch.tensor([[0.3, 0.3]])
    active = sae.active_latents(x)
    assert active.dense()[0].tolist() == pytest.approx([0.0, 5.4334, 13.0513], abs=1e-4)
    assert active.decode(sae.W_dec.detach())[0].tolist() == pytest.approx([18.4848, 18.4848], abs=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_ranks_are_one_process(kernel: str) -> None:
    assert_two_ranks_are_one(GATED, TRANSCODER, kernel, "dense_batch")


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_latents_with_open_gates_and_magnitude_fire(kernel: str) -> None:
    sae = gated()
    sae.b_mag.data.sub_(0.5)  # open gates without magnitude
    _, features = encode(sae.parameters_by_name, batch(), centres=True)
    statistics = take_step(sae, step_input({}), kernel)
    assert torch.equal(statistics.fire_counts, (features > 0).sum(dim=0))


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_active_latents_are_those_of_the_definition(fields: dict[str, Any]) -> None:
    sae = gated(**fields)
    _, features = encode(sae.parameters_by_name, batch(), centres=sae.spec.subtracts_b_dec)
    assert torch.allclose(sae.active_latents(batch()).dense(), features.detach(), atol=1e-6)


def test_the_saved_sae_takes_raw_activations_and_gives_its_weights_back() -> None:
    sae = gated(**TRANSCODER)
    saved = sae.to_inference(scale=4.0, target_scale=0.5)
    raw = batch() / 4.0
    assert torch.allclose(saved.encode(raw), sae.active_latents(batch()).dense(), atol=1e-5)
    again = gated(seed=1, **TRANSCODER)
    again.start_from(saved, scale=4.0, target_scale=0.5)
    for name, parameter in sae.parameters_by_name.items():
        assert torch.allclose(again.parameters_by_name[name], parameter, atol=1e-6), name
    assert transcoded(batch()).shape[1] == saved.W_dec.shape[1]


def test_the_penalty_warms_up_linearly() -> None:
    sae = trainable({"type": "gated", "l1Coefficient": 5.0, "l1WarmUpSteps": 10})
    told = [take_step(sae, step_input({}, step=step), "dense").coefficient for step in (0, 1, 5, 10, 20)]
    assert told == [0.0, 0.5, 2.5, 5.0, 5.0]
