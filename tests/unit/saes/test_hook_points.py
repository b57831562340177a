"""Hook points, the error term, and inputs with an axis of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_job import SAE
from sae_job.saes.hook_points import HOOK_POINTS
from tests.small_saes import AUTOENCODERS, KINDS, TRANSCODERS, random_sae, rows

WITHOUT_ERROR = [name for name in HOOK_POINTS if name != "hook_sae_error"]
# An SAE on three heads of four dimensions each.
HEADS: dict[str, Any] = {"hook_name": "blocks.3.attn.hook_z"}


def target_of(sae: SAE, x: Tensor) -> Tensor | None:
    if not sae.cfg.is_transcoder:
        return None
    return torch.randn(*x.shape[:-1], sae.cfg.width_out, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_all_hook_points_fire_in_order(kind: str) -> None:
    sae = random_sae(kind)
    x = rows(sae)
    output, cache = sae.run_with_cache(x)
    assert list(cache) == WITHOUT_ERROR
    assert torch.equal(cache["hook_sae_input"], x)
    assert torch.equal(cache["hook_sae_acts_pre"], sae.pre_activations(x))
    assert torch.equal(cache["hook_sae_acts_post"], sae.encode(x))
    assert torch.allclose(cache["hook_sae_recons"], sae.decode(sae.encode(x)), atol=1e-6)
    assert torch.equal(cache["hook_sae_output"], output)
    assert torch.allclose(output, sae(x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_error_term_the_output_is_the_truth(kind: str) -> None:
    sae = random_sae(kind)
    x = rows(sae)
    target = target_of(sae, x)
    sae.use_error_term = True
    output, cache = sae.run_with_cache(x, target=target)
    truth = x if target is None else target
    assert list(cache) == list(HOOK_POINTS)
    assert float(cache["hook_sae_error"].abs().max()) > 0.1
    if not sae.cfg.skip_connection:
        assert torch.allclose(cache["hook_sae_recons"] + cache["hook_sae_error"], output, atol=1e-5)
    assert torch.allclose(output, truth, atol=1e-5)
    assert torch.allclose(sae(x, target), truth, atol=1e-5)


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_an_intervention_changes_the_output_but_not_the_error(kind: str) -> None:
    sae = random_sae(kind)
    x = rows(sae)
    sae.use_error_term = True
    error = sae.run_with_cache(x)[1]["hook_sae_error"]
    seen: dict[str, Tensor] = {}

    def ablate(features: Tensor, *, hook: Any) -> Tensor:
        return torch.zeros_like(features)

    def keep(tensor: Tensor, *, hook: Any) -> None:
        seen[hook.name] = tensor

    output = sae.run_with_hooks(x, [("hook_sae_acts_post", ablate), ("hook_sae_error", keep)])
    assert torch.allclose(seen["hook_sae_error"], error, atol=1e-6)
    assert torch.allclose(output, sae.b_dec + error, atol=1e-5)
    assert float((output - x).abs().max()) > 0.1


def test_the_error_term_of_a_transcoder_needs_the_target() -> None:
    sae = random_sae("standard_transcoder")
    sae.use_error_term = True
    with pytest.raises(ValueError, match="needs the target"):
        sae(rows(sae))


@pytest.mark.parametrize("kind", [*AUTOENCODERS, *TRANSCODERS])
@pytest.mark.parametrize("error_term", [False, True])
def test_gradients_flow_through_the_reconstruction_alone(kind: str, error_term: bool) -> None:
    sae = random_sae(kind)
    x = rows(sae)
    sae.use_error_term = error_term
    found: list[Tensor] = []

    def trace(features: Tensor, *, hook: Any) -> Tensor:
        found.append(features.clone().requires_grad_())
        return found[0]

    output = sae.run_with_hooks(x, [("hook_sae_acts_post", trace)], target=target_of(sae, x))
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    (output * weight).sum().backward()
    assert found[0].grad is not None
    assert torch.allclose(found[0].grad, weight @ sae.W_dec.T, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_input_are_those_of_finite_differences(kind: str) -> None:
    sae = random_sae(kind, dtype="float64")
    x = rows(sae, count=3).double().requires_grad_()
    assert torch.autograd.gradcheck(sae, (x,))


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_what_a_hook_saw_is_not_written_over(kind: str) -> None:
    sae = random_sae(kind)
    x = rows(sae)
    _, cache = sae.run_with_cache(x)
    assert bool((cache["hook_sae_acts_pre"] < 0).any())
    assert torch.equal(cache["hook_sae_acts_pre"], sae.pre_activations(x))


def test_hooks_of_pytorch_work_and_are_gone_when_removed() -> None:
    sae = random_sae("topk")
    x = rows(sae)
    plain = sae(x)
    handle = sae.get_submodule("hook_sae_acts_post").register_forward_hook(lambda *_: torch.zeros(24, sae.cfg.d_sae))
    assert torch.allclose(sae(x), sae.b_dec.expand_as(x))
    handle.remove()
    assert torch.equal(sae(x), plain)


def test_a_replaced_pre_activation_is_what_activates() -> None:
    sae = random_sae("topk")
    x = rows(sae)

    def first_latents(pre: Tensor, *, hook: Any) -> Tensor:
        return torch.arange(sae.cfg.d_sae, 0.0, -1).expand_as(pre).contiguous()

    output = sae.run_with_hooks(x, [("hook_sae_acts_pre", first_latents)])
    expected = torch.arange(sae.cfg.d_sae, sae.cfg.d_sae - sae.cfg.k, -1.0) @ sae.W_dec[: sae.cfg.k] + sae.b_dec
    assert torch.allclose(output, expected.expand_as(output), atol=1e-4)


def test_a_hook_point_that_is_not_there_is_named_and_others_are_not_left_behind() -> None:
    sae = random_sae("standard")
    with pytest.raises(ValueError, match="no hook point 'hook_sae_acts'; there are hook_sae_input"):
        sae.run_with_hooks(rows(sae), [("hook_sae_input", lambda x, hook: x), ("hook_sae_acts", lambda x, hook: x)])
    assert not any(sae.get_submodule(name)._forward_hooks for name in HOOK_POINTS)


@pytest.mark.parametrize("kind", AUTOENCODERS)
@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("mode", ["none", "layer_norm"])
def test_heads_are_flattened_and_given_back(kind: str, error_term: bool, mode: str) -> None:
    sae = random_sae(kind, **HEADS, normalize_activations=mode)
    assert sae.hook_z_reshaping_mode
    x = rows(sae)
    by_head = x.view(2, 12, 3, 4)
    sae.use_error_term = error_term
    assert torch.equal(sae.encode(by_head).view(24, -1), sae.encode(x))
    output, cache = sae.run_with_cache(by_head)
    assert cache["hook_sae_input"].shape == (2, 12, 12)
    assert output.shape == by_head.shape
    assert torch.allclose(output.reshape(24, 12), sae(x), atol=1e-5)
    features, context = sae.encode_with_context(by_head)
    sae.use_error_term = False
    assert torch.allclose(sae.decode(features, context), sae(by_head), atol=1e-5)


def test_the_number_of_heads_is_taken_from_each_input() -> None:
    sae = random_sae("standard", **HEADS)
    x = rows(sae)
    assert sae(x.view(24, 3, 4)).shape == (24, 3, 4)
    assert sae(x.view(24, 6, 2)).shape == (24, 6, 2)
    assert sae.decode(sae.encode(x)).shape == (24, 12)
    with pytest.raises(ValueError, match="must multiply to 12"):
        sae(x.view(24, 4, 3)[..., :2])


def test_reshaping_is_turned_off_and_on() -> None:
    sae = random_sae("standard", **HEADS)
    x = rows(sae)
    sae.turn_off_forward_pass_hook_z_reshaping()
    assert not sae.hook_z_reshaping_mode
    assert sae(x).shape == (24, 12)
    with pytest.raises(RuntimeError):
        sae(x.view(24, 3, 4))
    sae.turn_on_forward_pass_hook_z_reshaping()
    assert sae(x.view(24, 3, 4)).shape == (24, 3, 4)
    with pytest.raises(ValueError, match="only SAEs on hook_z"):
        random_sae("standard").turn_on_forward_pass_hook_z_reshaping()
