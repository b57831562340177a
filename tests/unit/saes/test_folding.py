"""Folding decoder norms or the scale of activations into the weights changes no reconstruction."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_job import SAE
from tests.small_saes import AUTOENCODERS, KINDS, TRANSCODERS, random_sae, rows

SEEDS = st.integers(0, 10_000)
SCALES = st.floats(1e-3, 1e3)
# Tanh does not commute with a factor, nor does the choice of the k largest with one for each latent.
FOLDABLE = [kind for kind in KINDS if not kind.startswith(("tanh", "topk"))]
TOP_K = [kind for kind in KINDS if kind.startswith("topk")]
TANH = [kind for kind in KINDS if kind.startswith("tanh")]


def folded(sae: SAE, *scales: float) -> SAE:
    """A copy with decoder norms folded, or scales where they are given."""
    other = copy.deepcopy(sae)
    if scales:
        other.fold_activation_scale(*scales)
    else:
        other.fold_decoder_norms()
    return other


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", FOLDABLE)
@settings(max_examples=25)
@given(seed=SEEDS, factor=st.booleans())
def test_folding_decoder_norms_changes_no_reconstruction(kind: str, seed: int, factor: bool) -> None:
    # In float64, no pre-activation comes so close to a threshold that rounding decides.
    sae = random_sae(kind, seed=seed, dtype="float64", finetuning_scaling_factor=factor)
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    assert float(norms.max()) > 1.2 * float(norms.min())
    x = rows(sae, seed=seed)
    features, reconstruction = sae.reconstruct(x)
    active = (features > 0).sum(dim=1)
    assert bool((active > 0).any())
    assert bool((active < sae.cfg.d_sae).all())

    other = folded(sae)
    assert_close(torch.linalg.vector_norm(other.W_dec, dim=1), torch.ones_like(norms))
    folded_features, folded_reconstruction = other.reconstruct(x)
    assert_close(folded_features, features * norms)
    assert_close(folded_reconstruction, reconstruction)


@pytest.mark.parametrize("kind", TOP_K)
@settings(max_examples=25)
@given(seed=SEEDS, norm=st.floats(0.1, 10))
def test_equal_decoder_norms_of_a_top_k_sae_are_folded(kind: str, seed: int, norm: float) -> None:
    sae = random_sae(kind, seed=seed, dtype="float64", unit_decoder=True)
    sae.W_dec *= norm
    x = rows(sae, seed=seed)
    features, reconstruction = sae.reconstruct(x)
    assert bool((features > 0).any())
    folded_features, folded_reconstruction = folded(sae).reconstruct(x)
    assert_close(folded_features, features * norm)
    assert_close(folded_reconstruction, reconstruction)


@pytest.mark.parametrize("kind", TOP_K)
def test_unequal_decoder_norms_of_a_top_k_sae_are_refused(kind: str) -> None:
    sae = random_sae(kind)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"decoder norms of this SAE lie between 0\.\d+ and 1\.\d+: folding them would"
    ):
        sae.fold_decoder_norms()
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


@pytest.mark.parametrize("kind", TANH)
def test_decoder_norms_of_a_tanh_sae_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="tanh does not commute"):
        random_sae(kind).fold_decoder_norms()


@pytest.mark.parametrize("kind", [*FOLDABLE, "topk"])
def test_a_decoder_row_of_zeros_stays_one_and_spoils_nothing(kind: str) -> None:
    sae = random_sae(kind, unit_decoder=True)
    sae.W_dec[3] = 0
    x = rows(sae)
    other = folded(sae)
    assert bool((other.W_dec[3] == 0).all())
    assert_close(other(x), sae(x))


def test_the_exponent_of_a_gated_sae_is_not_a_scale() -> None:
    sae = random_sae("gated")
    assert bool((sae.r_mag != 0).all())
    assert torch.equal(folded(sae).r_mag, sae.r_mag)


@pytest.mark.parametrize("kind", AUTOENCODERS)
@settings(max_examples=25)
@given(seed=SEEDS, scale=SCALES)
def test_folding_a_scale_changes_no_reconstruction(kind: str, seed: int, scale: float) -> None:
    sae = random_sae(kind, seed=seed, dtype="float64")
    x = rows(sae, seed=seed)
    features = sae.encode(x)
    assert bool((features > 0).any())
    other = folded(sae, scale)
    assert other.cfg.normalize_activations == "none"
    assert_close(other.encode(x / scale), features)
    assert_close(other.decode(features) * scale, sae.decode(features))
    assert_close(other(x / scale) * scale, sae(x))


@pytest.mark.parametrize("kind", TRANSCODERS)
@settings(max_examples=25)
@given(seed=SEEDS, scale=SCALES, target_scale=SCALES)
def test_inputs_and_targets_of_a_transcoder_have_scales_of_their_own(
    kind: str, seed: int, scale: float, target_scale: float
) -> None:
    sae = random_sae(kind, seed=seed, dtype="float64")
    x = rows(sae, seed=seed)
    features = sae.encode(x)
    assert bool((features > 0).any())
    other = folded(sae, scale, target_scale)
    assert_close(other.encode(x / scale), features)
    assert_close(other(x / scale) * target_scale, sae(x))


def test_an_autoencoder_has_one_scale() -> None:
    with pytest.raises(ValueError, match="one scale"):
        random_sae("standard").fold_activation_scale(2.0, 3.0)


@pytest.mark.parametrize("kind", ["topk", "topk_transcoder"])
@settings(max_examples=25)
@given(seed=SEEDS)
def test_decoder_norms_that_count_in_the_choice_are_folded_when_an_sae_is_built(kind: str, seed: int) -> None:
    plain = random_sae(kind, seed=seed, dtype="float64")
    sae = random_sae(kind, seed=seed, dtype="float64", rescale_acts_by_decoder_norm=True)
    assert not sae.cfg.rescale_acts_by_decoder_norm
    x = rows(sae, seed=seed)
    norms = torch.linalg.vector_norm(plain.W_dec, dim=1)
    pre = plain.pre_activations(x) * norms
    bar = pre.topk(plain.cfg.k, dim=1).values[:, -1:]
    expected = torch.where(pre >= bar, pre.relu(), 0.0)
    assert_close(sae.encode(x), expected)
    assert_close(sae(x), (expected / norms) @ plain.W_dec + plain.b_dec)
