"""What SAEs for use compute: closed-form values of every architecture, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sae_job import SAE
from sae_job.saes.config import SAEConfig
from tests.small_saes import KINDS, random_sae, rows


def ones(architecture: str, **tensors: list[float]) -> SAE:
    """d_in 2, d_sae 3, all weights 1 and all biases 0, but for the given tensors."""
    config = SAEConfig.from_dict({"architecture": architecture, "d_in": 2, "d_sae": 3})
    biases = {"gated": ("b_gate", "r_mag", "b_mag"), "jumprelu": ("b_enc", "threshold")}.get(architecture, ("b_enc",))
    weights: dict[str, Any] = {"W_enc": torch.ones(2, 3), "W_dec": torch.ones(3, 2), "b_dec": torch.zeros(2)}
    weights |= {name: torch.zeros(3) for name in biases}
    return SAE.from_tensors(config, weights | {name: torch.tensor(values) for name, values in tensors.items()})


X = torch.tensor([0.3, 0.3])


def test_standard() -> None:
    sae = ones("standard", b_enc=[-1.0, 0.0, 1.0])
    assert torch.allclose(sae.encode(X), torch.tensor([0.0, 0.6, 1.6]))
    assert torch.allclose(sae(X), torch.tensor([2.2, 2.2]))


def test_a_gate_opens_strictly_above_zero_and_magnitudes_have_weights_of_their_own() -> None:
    sae = ones("gated", b_gate=[-2.0, 0.0, 1.0], r_mag=[1.0, 2.0, 3.0], b_mag=[1.0, 1.0, 1.0])
    # 0.6 e^r + 1, but the first gate is closed by 0.6 - 2.
    assert torch.allclose(sae.pre_activations(X), torch.tensor([2.6310, 5.4334, 13.0513]), atol=1e-4)
    assert torch.allclose(sae.encode(X), torch.tensor([0.0, 5.4334, 13.0513]), atol=1e-4)
    assert torch.allclose(sae(X), torch.tensor([18.4848, 18.4848]), atol=1e-4)
    assert torch.equal(ones("gated", b_mag=[1.0, 1.0, 1.0]).encode(torch.zeros(2)), torch.zeros(3))


def test_a_latent_of_a_jumprelu_sae_is_active_strictly_above_its_threshold() -> None:
    sae = ones("jumprelu", threshold=[1.0, 0.5, 0.25])
    assert torch.allclose(sae.encode(X), torch.tensor([0.0, 0.6, 0.6]))
    assert torch.allclose(sae(X), torch.tensor([1.2, 1.2]))
    at = ones("jumprelu", threshold=[1.0, 0.5, 2.0]).encode(torch.tensor([0.5, 0.5]))
    assert torch.equal(at, torch.tensor([0.0, 1.0, 0.0]))


def test_a_negative_threshold_lets_no_negative_activation_through() -> None:
    sae = ones("jumprelu", threshold=[-1.0, -1.0, -1.0], b_enc=[-1.0, 0.0, 0.0])
    assert torch.allclose(sae.encode(X), torch.tensor([0.0, 0.6, 0.6]))


def test_tanh_bounds_activations() -> None:
    sae = random_sae("tanh")
    pre = sae.pre_activations(rows(sae))
    assert torch.allclose(sae.encode(rows(sae)), pre.relu().tanh())


@pytest.mark.parametrize("kind", ["topk", "topk_activation", "topk_transcoder"])
@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4)])
def test_the_k_largest_are_active_whatever_the_shape(kind: str, shape: tuple[int, ...]) -> None:
    sae = random_sae(kind)
    x = rows(sae).view(*shape, sae.cfg.d_in)
    features, reconstruction = sae.reconstruct(x)
    pre = sae.pre_activations(x)
    bar = pre.topk(sae.cfg.k, dim=-1).values[..., -1:]
    assert torch.allclose(features, torch.where(pre >= bar, pre.relu(), 0.0))
    assert bool(((features > 0).sum(dim=-1) == sae.cfg.k).all())
    assert torch.equal(sae.encode(x), features)
    assert torch.allclose(reconstruction, features @ sae.W_dec + sae.b_dec, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [False, True], ids=["plain", "finetuned"])
def test_a_reconstruction_is_of_the_latents_the_bias_and_the_skip_connection(kind: str, factor: bool) -> None:
    sae = random_sae(kind, finetuning_scaling_factor=factor)
    x = rows(sae).view(4, 6, -1)
    features, reconstruction = sae.reconstruct(x)
    assert bool((features > 0).any())
    assert bool((features == 0).any())
    scaled = features * sae.finetuning_scaling_factor if factor else features
    expected = scaled @ sae.W_dec + sae.b_dec
    assert torch.allclose(sae.decode(features), expected, atol=1e-5)
    if sae.cfg.skip_connection:
        expected = expected + x @ sae.W_skip.T
    assert torch.allclose(reconstruction, expected, atol=1e-5)
    assert torch.equal(sae(x), reconstruction)
    assert reconstruction.shape == (4, 6, sae.cfg.width_out)
    found, context = sae.encode_with_context(x)
    assert torch.equal(found, features)
    assert torch.allclose(sae.decode(found, context), reconstruction, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_weights_are_left_as_they_are(kind: str) -> None:
    sae = random_sae(kind, normalize_activations="layer_norm")
    x = rows(sae)
    before, weights = x.clone(), {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.use_error_term = not sae.cfg.is_transcoder
    sae(x)
    assert torch.equal(x, before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in sae.state_dict().items())


@pytest.mark.parametrize("mode", ["constant_norm_rescale", "layer_norm"])
def test_a_transcoder_normalises_what_it_takes_alone(mode: str) -> None:
    sae = random_sae("standard_skip_transcoder", normalize_activations=mode)
    x = 7 * rows(sae)
    features, reconstruction = sae.reconstruct(x)
    assert torch.allclose(sae.encode(3 * x), features, atol=1e-4)
    assert torch.allclose(reconstruction, features @ sae.W_dec + sae.b_dec + x @ sae.W_skip.T, atol=1e-5)
    assert torch.allclose(sae.decode(features), features @ sae.W_dec + sae.b_dec, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_number_formats_give_about_the_same(kind: str, dtype: str) -> None:
    sae, other = random_sae(kind), random_sae(kind, dtype=dtype)
    x = rows(sae)
    reconstruction = other(x)
    assert reconstruction.dtype == other.dtype
    error = torch.linalg.vector_norm(reconstruction.float() - sae(x), dim=1)
    # Of most rows: on some, rounding swaps latents that tie for the last place.
    assert float((error / torch.linalg.vector_norm(sae(x), dim=1)).median()) < 0.02


def test_moving_takes_the_configuration_along() -> None:
    sae = random_sae("jumprelu")
    assert (sae.dtype, sae.cfg.dtype, sae.cfg.device) == (torch.float32, "float32", "cpu")
    assert sae.half() is sae
    assert (sae.dtype, sae.cfg.dtype) == (torch.float16, "float16")
    assert sae.to(torch.float64).cfg.dtype == "float64"
    assert sae.to(dtype=torch.bfloat16).cfg.dtype == "bfloat16"
    assert sae.to(torch.zeros(1)).cfg.dtype == "float32"
    assert sae.to("meta", torch.float64).cfg.device == "meta"
    assert (sae.device, sae.cfg.dtype) == (torch.device("meta"), "float64")


def test_moving_one_sae_leaves_the_configuration_of_another() -> None:
    config = random_sae("standard").cfg
    random_sae("standard").half()
    assert config.dtype == "float32"


def test_an_sae_has_a_name() -> None:
    sae = random_sae("standard", model_name="test_model", hook_name="test_hook_name", d_sae=128)
    assert sae.name == "sae_test_model_test_hook_name_128"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [False, True], ids=["plain", "finetuned"])
def test_few_active_latents_are_decoded_alone_and_give_the_same(kind: str, factor: bool) -> None:
    sae = random_sae(kind, d_sae=400, finetuning_scaling_factor=factor)
    for name in {"b_enc", "b_gate"}.intersection(sae.state_dict()):
        getattr(sae, name).sub_(2.5)
    x = rows(sae).view(4, 6, -1)
    with no_dense_product(sae):
        features, reconstruction = sae.reconstruct(x)
    assert bool((features != 0).any())
    expected = sae.decode(features, sae.encode_with_context(x)[1])
    assert torch.allclose(reconstruction, expected, atol=1e-5)


@contextmanager
def no_dense_product(sae: SAE) -> Iterator[None]:
    """Fails when the decoder is a dense product."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae, "_decode", lambda *_, **__: pytest.fail("decoded densely"))
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d_sae", [40, 400])
def test_what_is_not_a_number_is_not_lost(kind: str, d_sae: int) -> None:
    sae = random_sae(kind, d_sae=d_sae)
    for name in {"b_enc", "b_gate"}.intersection(sae.state_dict()):
        getattr(sae, name).sub_(2.5)
    x = rows(sae)
    x[3, 2] = torch.nan
    reconstruction = sae(x)
    assert bool(reconstruction[3].isnan().all())
    assert bool(reconstruction[[0, 1, 2, 4]].isfinite().all())


# Thresholds and gates stand in step functions, which have no gradient.
@pytest.mark.parametrize("kind", KINDS)
def test_each_parameter_may_be_trained_alone(kind: str) -> None:
    for name in dict(random_sae(kind).named_parameters()).keys() - {"threshold", "b_gate"}:
        sae, all_at_once = random_sae(kind), random_sae(kind)
        x = rows(sae)
        getattr(sae, name).requires_grad_()
        all_at_once.requires_grad_()
        for each in (sae, all_at_once):
            each(x).square().sum().backward()
        found, expected = getattr(sae, name).grad, getattr(all_at_once, name).grad
        assert found is not None
        assert float(expected.abs().max()) > 0
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())), name
