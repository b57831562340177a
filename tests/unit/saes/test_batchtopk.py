"""BatchTopK: the running threshold, and the SAE that is saved with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_job.saes.base import SAE
from sae_job.saes.batchtopk import BatchTopKSAE
from sae_job.saes.trainable import StepInput
from tests.unit.saes.conftest import BATCHTOPK, D_IN, D_SAE, MATRYOSHKA, batch, trainable

ROWS = 32


def step(sae: Any, seed: int, rows: int = ROWS) -> None:
    x = batch(seed, rows)
    sae.step_gradients(StepInput(x, x, 0, None))


def smallest_active(sae: Any, seed: int) -> float:
    """By the definition: the k x batch-th largest pre-activation, in float64."""
    x = batch(seed, ROWS).double()
    pre = (x - sae.b_dec.double()) @ sae.W_enc_T.double().T + sae.b_enc.double()
    return float(pre.flatten().topk(5 * ROWS).values.min().detach())


@pytest.mark.parametrize("architecture", [BATCHTOPK, MATRYOSHKA])
def test_the_threshold_is_a_moving_average_that_the_first_batch_sets(architecture: dict[str, Any]) -> None:
    sae = trainable({**architecture, "thresholdMomentum": 0.75})
    threshold = sae.buffers_by_name["threshold"]
    assert float(threshold) == 0.0
    expected = smallest_active(sae, 0)
    step(sae, 0)
    assert threshold.shape == ()
    assert float(threshold) == pytest.approx(expected, rel=1e-6)
    for seed in (1, 2, 3):
        step(sae, seed)
        expected = 0.75 * expected + 0.25 * smallest_active(sae, seed)
        assert float(threshold) == pytest.approx(expected, rel=1e-6)


def test_the_momentum_is_0_99_by_default() -> None:
    default, given = trainable(BATCHTOPK), trainable({**BATCHTOPK, "thresholdMomentum": 0.99})
    for seed in range(3):
        step(default, seed)
        step(given, seed)
    assert torch.equal(default.buffers_by_name["threshold"], given.buffers_by_name["threshold"])


def test_a_batch_without_an_active_latent_leaves_the_threshold() -> None:
    sae = trainable(BATCHTOPK)
    step(sae, 0)
    before = float(sae.buffers_by_name["threshold"])
    sae.parameters_by_name["b_enc"].data.fill_(-100.0)
    x = batch(1, ROWS)
    statistics = sae.step_gradients(StepInput(x, x, 1, None))
    assert float(sae.buffers_by_name["threshold"]) == before > 0
    assert int(statistics.fire_counts.sum()) == 0
    for parameter in sae.parameters_by_name.values():
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())
    step(sae, 2)  # and the next goes on


def test_k_latents_per_row_are_active_on_average() -> None:
    sae = trainable(BATCHTOPK)
    x = batch(0, ROWS)
    counts = sae.step_gradients(StepInput(x, x, 0, None)).fire_counts
    assert int(counts.sum()) == 5 * ROWS


def test_a_threshold_from_a_checkpoint_is_gone_on_from() -> None:
    first, again = trainable(BATCHTOPK), trainable(BATCHTOPK)
    for seed in range(3):
        step(first, seed)
    again.buffers_by_name["threshold"].copy_(first.buffers_by_name["threshold"])
    step(first, 3)
    step(again, 3)
    assert torch.equal(first.buffers_by_name["threshold"], again.buffers_by_name["threshold"])
    for name, parameter in first.parameters_by_name.items():
        other = again.parameters_by_name[name].grad
        assert parameter.grad is not None
        assert other is not None
        assert torch.equal(parameter.grad, other)


@pytest.mark.parametrize("architecture", [BATCHTOPK, MATRYOSHKA])
def test_it_is_saved_as_a_jumprelu_sae_that_fires_as_it_does(architecture: dict[str, Any]) -> None:
    sae = trainable(architecture)
    for seed in range(5):
        step(sae, seed)
    scale = 0.5
    saved = sae.to_inference(scale=scale)
    assert saved.cfg.architecture == "jumprelu"
    assert saved.cfg.training_architecture == architecture["type"]
    assert torch.equal(saved.threshold, sae.buffers_by_name["threshold"].expand(D_SAE))
    x = batch(9, 50)
    active = sae.active_latents(x)
    features = saved.encode(x / scale)
    assert torch.allclose(active.dense(), features, atol=1e-5)
    assert 3 < float((features > 0).sum(dim=1).float().mean()) < 8
    assert torch.allclose(saved(x / scale) * scale, active.decode(sae.W_dec) + sae.b_dec, atol=1e-5)


def test_candidates_in_bfloat16_are_settled_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_job.saes.sparse_step.is_faster_in_bfloat16", lambda device: True)
    exact, rounded = trainable(BATCHTOPK), trainable(BATCHTOPK)
    assert isinstance(rounded, BatchTopKSAE)
    rounded.selection = "bfloat16"
    x = batch(0, 200)
    for sae in (exact, rounded):
        sae.step_gradients(StepInput(x, x, 0, None))
    assert float(rounded.threshold) == pytest.approx(float(exact.buffers_by_name["threshold"]), rel=1e-5)
    assert rounded.W_dec.grad is not None
    assert exact.W_dec.grad is not None
    assert torch.allclose(rounded.W_dec.grad, exact.W_dec.grad, atol=1e-5)
    rounded.threshold.copy_(exact.buffers_by_name["threshold"])
    assert torch.equal(exact.active_latents(x).dense(), rounded.active_latents(x).dense())


def test_start_from_takes_the_threshold() -> None:
    sae, other = trainable(BATCHTOPK), trainable(BATCHTOPK, seed=1)
    step(sae, 0)
    saved: SAE = sae.to_inference(scale=2.0)
    other.start_from(saved, scale=2.0, target_scale=2.0)
    assert torch.allclose(other.buffers_by_name["threshold"], sae.buffers_by_name["threshold"], rtol=1e-6)
    assert other.d_in == D_IN
