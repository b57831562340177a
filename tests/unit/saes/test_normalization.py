"""Normalisation of each activation on its own: closed-form values, its inverse, and SAEs that live behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_job import SAE
from sae_job.evaluation.metrics import HeldOutRows, reconstruction_metrics
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS, denormalize_rows, normalize_rows
from sae_job.storage.file_store import FileStore
from tests.unit.saes.conftest import D_IN, STANDARD, TOPK, batch, trainable

MODES = pytest.mark.parametrize("mode", RUN_TIME_NORMALIZATIONS)
ARCHITECTURES = pytest.mark.parametrize("architecture", [TOPK, STANDARD], ids=["topk", "standard"])


def inference(architecture: dict[str, Any], mode: str, *, seed: int = 0) -> SAE:
    return trainable(architecture, seed=seed).to_inference(scale=1.0, normalization=mode)


def plain(sae: SAE) -> SAE:
    """The same weights in an SAE that does not normalise."""
    config = {**sae.cfg.to_dict(), "normalize_activations": "none"}
    return SAE.from_tensors(type(sae.cfg).from_dict(config), sae.state_dict())


def test_constant_norm_gives_every_row_the_norm_sqrt_d_in() -> None:
    rows, statistics = normalize_rows(
        torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0]]), "constant_norm_rescale"
    )
    assert torch.equal(rows, torch.tensor([[1.2, 1.6, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]))
    assert statistics is not None
    assert torch.equal(statistics.scale, torch.tensor([[2.5], [0.25]]))
    assert statistics.offset is None


def test_layer_norm_takes_the_mean_and_the_standard_deviation_over_dimensions() -> None:
    rows, statistics = normalize_rows(torch.tensor([[1.0, 2.0, 3.0]]), "layer_norm")
    assert statistics is not None
    assert statistics.offset is not None
    # The deviations -1, 0, 1 have a sample variance of 2 / 2.
    assert float(statistics.offset) == 2
    assert float(statistics.scale) == pytest.approx(1 + 1e-5)
    assert torch.allclose(rows, torch.tensor([[-1.0, 0.0, 1.0]]) / (1 + 1e-5))


@MODES
@given(seed=st.integers(0, 1000), exponent=st.integers(-6, 6), offset=st.floats(-5, 5), rank=st.integers(1, 3))
def test_the_inverse_gives_the_rows_back(mode: str, seed: int, exponent: int, offset: float, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*(2, 3, D_IN)[-rank:], generator=generator) + offset) * 10.0**exponent
    normalized, statistics = normalize_rows(x, mode)
    largest = float(x.abs().max())
    assert torch.allclose(denormalize_rows(normalized, statistics), x, rtol=1e-5, atol=1e-5 * largest)


def test_layer_norm_is_undone_where_the_deviation_is_as_small_as_its_epsilon() -> None:
    x = 1e-5 * torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    normalized, statistics = normalize_rows(x, "layer_norm")
    assert torch.allclose(denormalize_rows(normalized, statistics), x, rtol=1e-5, atol=0)


@MODES
def test_rows_may_be_normalised_where_they_lie(mode: str) -> None:
    x = batch()
    apart, _ = normalize_rows(x.clone(), mode)
    within, _ = normalize_rows(x, mode, out=x)
    assert within.data_ptr() == x.data_ptr()
    assert torch.equal(within, apart)


@pytest.mark.parametrize("mode", ["none", "expected_average_only_in"])
def test_what_is_folded_leaves_rows_alone(mode: str) -> None:
    x = batch()
    rows, statistics = normalize_rows(x, mode)
    assert rows is x
    assert statistics is None
    assert denormalize_rows(x, statistics) is x


@MODES
@ARCHITECTURES
def test_the_sae_lives_in_the_normalised_space(architecture: dict[str, Any], mode: str) -> None:
    sae, x = inference(architecture, mode), batch()
    assert sae.cfg.normalize_activations == mode
    normalized, statistics = normalize_rows(x, mode)
    inner = plain(sae)
    features = inner.encode(normalized)
    assert bool((features > 0).any())
    assert torch.equal(sae.encode(x), features)
    assert torch.allclose(sae(x), denormalize_rows(inner.decode(features), statistics), atol=1e-5)
    found, reconstruction = sae.reconstruct(x)
    assert torch.equal(found, features)
    assert torch.equal(reconstruction, sae(x))


@MODES
def test_inputs_may_be_encoded_and_decoded_in_any_order(mode: str) -> None:
    sae, first, second = inference(TOPK, mode), batch(1), 7 * batch(2)
    features_of_first, first_context = sae.encode_with_context(first)
    features_of_second, second_context = sae.encode_with_context(second)
    for _ in range(2):
        assert torch.allclose(sae.decode(features_of_first, first_context), sae(first), atol=1e-5)
        assert torch.allclose(sae.decode(features_of_second, second_context), sae(second), atol=1e-4)


@MODES
def test_decoding_without_statistics_is_refused(mode: str) -> None:
    sae = inference(TOPK, mode)
    with pytest.raises(ValueError, match="encode_with_context"):
        sae.decode(sae.encode(batch()))


@MODES
def test_there_is_no_scale_to_fold(mode: str) -> None:
    sae = inference(TOPK, mode)
    with pytest.raises(ValueError, match="no scale to fold"):
        sae.fold_activation_scale(2.0)


@MODES
@ARCHITECTURES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_of_zeros_is_no_trouble(architecture: dict[str, Any], mode: str, dtype: str) -> None:
    sae = inference(architecture, mode)
    config = {**sae.cfg.to_dict(), "dtype": dtype}
    sae = SAE.from_tensors(type(sae.cfg).from_dict(config), sae.state_dict())
    x = batch()
    x[3] = 0
    features, reconstruction = sae.reconstruct(x)
    assert bool(torch.isfinite(features).all())
    assert bool(torch.isfinite(reconstruction).all())
    assert float(reconstruction[3].abs().max()) < 1e-4
    assert reconstruction.dtype == sae.W_dec.dtype


@ARCHITECTURES
@given(exponent=st.integers(-8, 8))
def test_constant_norm_sees_no_scale(architecture: dict[str, Any], exponent: int) -> None:
    sae, x = inference(architecture, "constant_norm_rescale"), batch()
    assert torch.equal(sae(x * 2.0**exponent), sae(x) * 2.0**exponent)


@given(offset=st.floats(-100, 100))
def test_layer_norm_sees_no_offset(offset: float) -> None:
    sae, x = inference(STANDARD, "layer_norm"), batch()
    assert torch.allclose(sae(x + offset) - offset, sae(x), atol=1e-3)


@MODES
def test_saved_and_loaded_it_is_the_same(mode: str, tmp_path: Path) -> None:
    sae = inference(TOPK, mode)
    sae.save(FileStore(tmp_path), "sae")
    assert json.loads((tmp_path / "sae/cfg.json").read_text())["normalize_activations"] == mode
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.cfg.normalize_activations == mode
    assert torch.equal(loaded(batch()), sae(batch()))


@MODES
def test_figures_are_of_raw_activations(mode: str) -> None:
    # Rows of very different norms: in the normalised space each counts alike.
    x = batch(rows=50) * torch.logspace(-1, 1, 50).unsqueeze(1)
    sae = inference(STANDARD, mode)
    metrics = reconstruction_metrics(sae, HeldOutRows(x, device="cpu"))
    squared_error = float((sae(x) - x).double().square().sum())
    variance = float((x.double() - x.double().mean(dim=0)).square().sum())
    assert metrics.mse == pytest.approx(squared_error / 50, rel=1e-5)
    assert metrics.explained_variance == pytest.approx(1 - squared_error / variance, rel=1e-5)
    assert metrics.l0 == pytest.approx(float((sae.encode(x) > 0).sum()) / 50)


def test_an_exact_autoencoder_of_the_normalised_space_is_exact_on_raw_activations() -> None:
    identity = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
    for mode in RUN_TIME_NORMALIZATIONS:
        config = inference(STANDARD, mode).cfg.to_dict() | {"d_sae": 2 * D_IN}
        tensors = {"W_enc": identity.T, "W_dec": identity, "b_enc": torch.zeros(2 * D_IN), "b_dec": torch.ones(D_IN)}
        sae = SAE.from_tensors(type(inference(STANDARD, mode).cfg).from_dict(config), tensors)
        x = 5 * batch()
        metrics = reconstruction_metrics(sae, HeldOutRows(x, device="cpu"))
        assert metrics.explained_variance == pytest.approx(1, abs=1e-10)
        assert torch.allclose(sae(x), x, atol=1e-5)
