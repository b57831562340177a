"""Initial weights: the options of decoder, encoder and bias, and their constraints."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sae_job.saes.initialization import decoder_bias, encoder_scale, geometric_median, kaiming_uniform, starting_rows
from sae_job.saes.trainable import StepInput
from tests.unit.saes.conftest import D_IN, D_SAE, STANDARD, TOPK, sae_spec, trainable


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SAMPLE = torch.randn(300, D_IN, generator=torch.Generator().manual_seed(9)) + 2.0


@pytest.mark.parametrize("decoder", ["mixed", "kaiming_uniform", "orthogonal"])
def test_decoder_rows_have_unit_norm_by_default(decoder: str) -> None:
    sae = trainable(TOPK, initialization={"decoder": decoder})
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)


def test_heuristic_rows_have_norm_a_tenth_and_point_everywhere() -> None:
    sae = trainable(STANDARD)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.full((D_SAE,), 0.1), atol=1e-6)
    cosines = torch.nn.functional.cosine_similarity(sae.W_dec.detach()[None], sae.W_dec.detach()[:, None], dim=2)
    assert abs(float(cosines[~torch.eye(D_SAE, dtype=torch.bool)].mean())) < 0.05


def test_an_encoder_begins_as_the_transpose_of_heuristic_rows() -> None:
    assert sae_spec(STANDARD).decoder_start == "heuristic"
    sae = trainable(STANDARD)
    assert torch.equal(sae.W_enc_T, sae.W_dec)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        (TOPK, {}),
        (TOPK, {"normalizeDecoder": False}),
        (STANDARD, {"normalizeDecoder": True}),
        (STANDARD, {"targetHook": "out"}),
    ],
    ids=["topk", "topk with free rows", "standard with unit norm", "standard transcoder"],
)
def test_all_others_begin_mixed(architecture: dict[str, Any], fields: dict[str, Any]) -> None:
    spec = sae_spec(architecture, **fields)
    assert (spec.decoder_start, spec.encoder_start) == ("mixed", "scaled_transpose")


def test_orthogonal_columns_are_orthonormal() -> None:
    rows = starting_rows("orthogonal", SAMPLE, SAMPLE.mean(dim=0), None, generator(), d_sae=D_SAE)
    assert torch.allclose(rows.T @ rows, torch.eye(D_IN), atol=1e-5)


def test_an_orthogonal_decoder_may_be_narrower_than_the_activations() -> None:
    rows = starting_rows("orthogonal", SAMPLE, SAMPLE.mean(dim=0), None, generator(), d_sae=D_IN // 2)
    assert torch.allclose(rows @ rows.T, torch.eye(D_IN // 2), atol=1e-5)


def test_kaiming_uniform_is_bounded_by_its_second_axis() -> None:
    weights = kaiming_uniform(500, 24, generator())
    bound = math.sqrt(6 / 24)
    assert float(weights.abs().max()) <= bound
    assert float(weights.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_the_transpose_is_taken_before_the_decoder_is_normalised() -> None:
    options = {"decoder": "kaiming_uniform", "encoder": "transpose"}
    free = trainable(STANDARD, normalizeDecoder=False, initialization=options)
    assert torch.equal(free.W_enc_T, free.W_dec)
    unit = trainable(STANDARD, normalizeDecoder=True, initialization=options)
    assert not torch.allclose(unit.W_enc_T, unit.W_dec, atol=1e-3)
    directions = unit.W_enc_T / unit.W_enc_T.norm(dim=1, keepdim=True)
    assert torch.allclose(directions, unit.W_dec, atol=1e-5)


def test_the_scaled_transpose_is_the_best_multiple_of_the_decoder() -> None:
    sae = trainable(TOPK)
    sae.b_enc.data.zero_()
    ratio = sae.W_enc_T / sae.W_dec
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-3)

    def error(factor: float) -> float:
        inference = sae.to_inference(scale=1.0)
        inference.W_enc *= factor
        rows = torch.randn(200, D_IN, generator=generator()) + 0.5  # the sample that `trainable` initialises from
        return float((inference(rows) - rows).square().sum())

    assert error(1.0) < error(0.97)
    assert error(1.0) < error(1.03)


def test_the_scale_is_fitted_to_some_rows_at_a_time() -> None:
    """Latents of the whole sample can take more memory than the training."""
    inputs = torch.randn(1300, D_IN, generator=generator())
    rows = starting_rows("heuristic", SAMPLE, SAMPLE[0], None, generator(), d_sae=D_SAE)
    seen: list[int] = []

    def activation(latents: torch.Tensor) -> torch.Tensor:
        seen.append(len(latents))
        return latents.relu()

    scale = encoder_scale(inputs, inputs, rows, rows, activation)
    found = ((inputs @ rows.T).relu() @ rows).double()
    assert scale == pytest.approx(float((inputs * found).sum() / (found * found).sum()))
    assert sum(seen) == 1300
    assert max(seen) <= 512


def test_biases_from_data() -> None:
    assert torch.equal(decoder_bias("zeros", SAMPLE), torch.zeros(D_IN))
    assert torch.allclose(decoder_bias("mean", SAMPLE), SAMPLE.mean(dim=0), atol=1e-6)
    outliers = torch.cat([torch.zeros(90, 2), torch.full((10, 2), 1000.0)])
    assert float(decoder_bias("geometric_median", outliers).norm()) < 1.0
    assert float(decoder_bias("mean", outliers).norm()) > 100.0


def test_the_geometric_median_of_a_symmetric_cross_is_its_centre() -> None:
    cross = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]) + 3.0
    assert torch.allclose(geometric_median(cross).float(), torch.full((2,), 3.0), atol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = trainable(TOPK, seed=1), trainable(TOPK, seed=1), trainable(TOPK, seed=2)
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_projected_gradients_are_orthogonal_to_rows_and_steps_keep_them_at_unit_norm() -> None:
    sae = trainable(TOPK)
    x = torch.randn(32, D_IN, generator=generator(4))
    optimizer = torch.optim.Adam(list(sae.parameters_by_name.values()), lr=0.1)
    sae.step_gradients(StepInput(x, x, 0, None))
    sae.project_gradients()
    assert sae.W_dec.grad is not None
    assert float((sae.W_dec.grad * sae.W_dec).sum(dim=1).abs().max()) < 1e-4
    optimizer.step()
    sae.after_optimizer_step()
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-6)
