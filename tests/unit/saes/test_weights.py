"""What all architectures share: export, starting from a saved SAE, transcoders, noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_job.saes.initialization import initial_weights, unit_rows
from sae_job.saes.topk import TopKSAE
from sae_job.saes.trainable import StepInput
from tests.unit.saes.conftest import (
    BATCHTOPK,
    D_IN,
    D_OUT,
    D_SAE,
    MATRYOSHKA,
    STANDARD,
    TOPK,
    batch,
    sae_spec,
    trainable,
    transcoded,
)

TYPES: dict[str, dict[str, Any]] = {
    "topk": TOPK,
    "batchtopk": BATCHTOPK,
    "matryoshka": MATRYOSHKA,
    "standard": {"type": "standard", "l1Coefficient": 0.3},
    "gated": {"type": "gated", "l1Coefficient": 0.3},
    "jumprelu": {"type": "jumprelu", "l0Coefficient": 0.3},
}
KINDS: dict[str, dict[str, Any]] = {
    "autoencoder": {},
    "autoencoder without centring": {"applyBDecToInput": False},
    "transcoder": {"targetHook": "out"},
    "transcoder with a skip connection": {"targetHook": "out", "skipConnection": True},
}
SCALE, TARGET_SCALE = 0.25, 4.0


def scales(fields: dict[str, Any]) -> tuple[float, float]:
    return SCALE, TARGET_SCALE if "targetHook" in fields else SCALE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", TYPES)
def test_the_copy_for_use_takes_raw_activations_and_gives_raw_targets(architecture: str, kind: str) -> None:
    fields = KINDS[kind]
    sae = trainable(TYPES[architecture], **fields)
    x = batch()
    sae.step_gradients(StepInput(x, transcoded(x) if "targetHook" in fields else x, 0, None))
    scale, target_scale = scales(fields)
    active = sae.active_latents(x)
    expected = sae.add_bias_and_skip_(active.decode(sae.W_dec), x) / target_scale
    saved = sae.to_inference(scale=scale, target_scale=target_scale)
    assert torch.allclose(saved.encode(x / scale), active.dense(), atol=1e-5)
    found = saved(x / scale)
    assert found.shape == (x.shape[0], D_OUT if "targetHook" in fields else D_IN)
    assert torch.allclose(found, expected, atol=1e-5)
    assert float(found.std()) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", TYPES)
def test_starting_from_the_copy_for_use_gives_the_weights_back(architecture: str, kind: str) -> None:
    fields = KINDS[kind]
    first, second = trainable(TYPES[architecture], **fields), trainable(TYPES[architecture], seed=5, **fields)
    x = batch()
    first.step_gradients(StepInput(x, transcoded(x) if "targetHook" in fields else x, 0, None))
    scale, target_scale = scales(fields)
    second.start_from(
        first.to_inference(scale=scale, target_scale=target_scale), scale=scale, target_scale=target_scale
    )
    for name, parameter in first.parameters_by_name.items():
        assert torch.allclose(second.parameters_by_name[name], parameter, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("normalization", ["constant_norm_rescale", "layer_norm"])
def test_an_sae_that_normalises_by_itself_is_started_from_without_a_scale(normalization: str) -> None:
    first, second = trainable(TOPK), trainable(TOPK, seed=5)
    second.start_from(first.to_inference(scale=3.0, normalization=normalization), scale=3.0, target_scale=3.0)
    for name, parameter in first.parameters_by_name.items():
        assert torch.equal(second.parameters_by_name[name], parameter), name


@pytest.mark.parametrize("architecture", TYPES)
def test_norms_of_decoder_rows_go_into_the_encoder_where_rows_have_unit_norm(architecture: str) -> None:
    selects = TYPES[architecture].get("k") is not None
    saved = trainable(TYPES[architecture], normalizeDecoder=True).to_inference(scale=1.0)
    norms = torch.full((D_SAE,), 2.5) if selects else torch.linspace(0.5, 2.0, D_SAE)
    saved.W_dec *= norms.unsqueeze(1)
    if hasattr(saved, "threshold"):
        saved.threshold.fill_(0.7)
    sae = trainable(TYPES[architecture], seed=5, normalizeDecoder=True)
    sae.start_from(saved, scale=0.5, target_scale=0.5)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)
    x = batch()
    again = sae.to_inference(scale=0.5)
    assert float(saved(x).std()) > 0
    assert torch.allclose(again(x), saved(x), atol=1e-4)
    assert torch.allclose(again.encode(x), saved.encode(x) * norms * 0.5, atol=1e-4)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_unequal_norms_that_would_change_what_is_selected_are_refused(architecture: str) -> None:
    saved = trainable(TYPES[architecture]).to_inference(scale=1.0)
    saved.W_dec *= torch.linspace(0.5, 2.0, D_SAE).unsqueeze(1)
    with pytest.raises(ValueError, match="normalizeDecoder: false"):
        trainable(TYPES[architecture]).start_from(saved, scale=1.0, target_scale=1.0)
    free = trainable(TYPES[architecture], normalizeDecoder=False)
    free.start_from(saved, scale=1.0, target_scale=1.0)
    assert torch.allclose(free.W_dec, saved.W_dec)


def test_norms_that_tanh_does_not_commute_with_are_refused() -> None:
    tanh = {**STANDARD, "activation": "tanh-relu"}
    saved = trainable(tanh, normalizeDecoder=True).to_inference(scale=1.0)
    with pytest.raises(ValueError, match="normalizeDecoder: false"):
        trainable(tanh, seed=5, normalizeDecoder=True).start_from(saved, scale=2.0, target_scale=2.0)
    free, same = (trainable(tanh, seed=5, normalizeDecoder=normalized) for normalized in (False, True))
    free.start_from(saved, scale=2.0, target_scale=2.0)
    same.start_from(saved, scale=1.0, target_scale=1.0)
    for again in (free.to_inference(scale=2.0), same.to_inference(scale=1.0)):
        assert torch.allclose(again(batch()), saved(batch()), atol=1e-5)


def test_starting_from_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"W_enc is of shape \(64, 12\), not \(32, 12\)"):
        trainable(TOPK, dSae=32).start_from(trainable(TOPK).to_inference(scale=1.0), scale=1.0, target_scale=1.0)


def test_starting_from_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="it has no threshold"):
        trainable(BATCHTOPK).start_from(trainable(TOPK).to_inference(scale=1.0), scale=1.0, target_scale=1.0)


def test_factors_of_fine_tuning_go_into_a_decoder_whose_norms_are_free() -> None:
    saved = trainable(TOPK).to_inference(scale=1.0)
    factors = torch.linspace(0.5, 2.0, D_SAE)
    saved.finetuning_scaling_factor = torch.nn.Parameter(factors, requires_grad=False)
    free = trainable(TOPK, normalizeDecoder=False)
    free.start_from(saved, scale=1.0, target_scale=1.0)
    assert torch.allclose(free.W_dec, saved.W_dec * factors.unsqueeze(1))
    with pytest.raises(ValueError, match="normalizeDecoder: false"):
        trainable(TOPK).start_from(saved, scale=1.0, target_scale=1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", TYPES)
def test_saved_weights_are_of_the_specs_dtype(architecture: str, dtype: str) -> None:
    sae = trainable(TYPES[architecture], dtype=dtype)
    saved = sae.to_inference(scale=1.0)
    assert saved.cfg.dtype == dtype
    assert {str(tensor.dtype) for tensor in saved.state_dict().values()} == {f"torch.{dtype}"}
    assert sae.W_dec.dtype == torch.float32


def test_the_copy_for_use_shares_no_memory_with_the_training() -> None:
    sae = trainable(TOPK)
    saved = sae.to_inference(scale=1.0)
    before = {name: tensor.clone() for name, tensor in saved.state_dict().items()}
    for parameter in sae.parameters_by_name.values():
        parameter.data.fill_(7.0)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_candidates_in_bfloat16_are_settled_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_job.saes.sparse_step.is_faster_in_bfloat16", lambda device: True)
    exact, rounded = trainable(TOPK), trainable(TOPK)
    assert isinstance(rounded, TopKSAE)
    rounded.selection = "bfloat16"
    x = batch(0, 200)
    dead = torch.arange(D_SAE) % 4 == 0
    for sae in (exact, rounded):
        sae.step_gradients(StepInput(x, x, 0, dead))
    for name, parameter in exact.parameters_by_name.items():
        other = rounded.parameters_by_name[name].grad
        assert parameter.grad is not None
        assert other is not None
        assert torch.allclose(parameter.grad, other, atol=1e-5), name
    assert torch.equal(exact.active_latents(x).dense(), rounded.active_latents(x).dense())


SAMPLE = torch.randn(500, D_IN, generator=torch.Generator().manual_seed(3)) + 2.0
TARGET = transcoded(SAMPLE) + 5.0


def start(**settings: Any) -> Any:
    return initial_weights(
        sae_spec(TOPK, targetHook="out", initialization=settings),
        SAMPLE,
        TARGET,
        d_sae=300,
        activation=torch.relu,
        generator=torch.Generator().manual_seed(0),
    )


def test_a_transcoder_begins_with_the_mean_of_its_target() -> None:
    assert torch.allclose(start().b_dec, TARGET.mean(dim=0), atol=1e-5)


def test_a_transcoders_encoder_takes_the_centre_of_its_input_off() -> None:
    weights = start()
    pre = SAMPLE @ weights.W_enc + weights.encoder_bias
    assert torch.allclose(pre.mean(dim=0), torch.zeros(300), atol=1e-4)
    assert not torch.allclose((SAMPLE @ weights.W_enc).mean(dim=0), torch.zeros(300), atol=1e-1)


def test_both_sides_of_a_transcoders_latent_are_of_one_token() -> None:
    """Each latent's rows point from the two centres to the same row of the sample, more than to any other."""
    weights = start()
    inputs = unit_rows(SAMPLE - SAMPLE.mean(dim=0))
    targets = unit_rows(TARGET - TARGET.mean(dim=0))
    both = inputs @ unit_rows(weights.W_enc.T).T + targets @ weights.W_dec.T
    # A direction of the sample plus a random one are at cosine 0.7: both sides together stand out.
    assert float(both.max(dim=0).values.mean()) > 1.3
    apart = inputs @ unit_rows(weights.W_enc.T).T + targets @ weights.W_dec.T.roll(1, dims=1)
    assert float(both.max(dim=0).values.mean() - apart.max(dim=0).values.mean()) > 0.1


@pytest.mark.parametrize("encoder", ["scaled_transpose", "transpose", "kaiming_uniform"])
@pytest.mark.parametrize("decoder", ["mixed", "kaiming_uniform", "orthogonal"])
def test_every_start_has_the_shapes_of_a_transcoder(decoder: str, encoder: str) -> None:
    weights = start(decoder=decoder, encoder=encoder)
    assert weights.W_enc.shape == (D_IN, 300)
    assert weights.W_dec.shape == (300, D_OUT)
    assert torch.allclose(weights.W_dec.norm(dim=1), torch.ones(300), atol=1e-5)


def test_a_transcoders_encoder_has_the_scale_that_reconstructs_best() -> None:
    weights = start()

    def error(factor: float) -> float:
        pre = SAMPLE @ (weights.W_enc * factor) + weights.encoder_bias * factor
        return float((pre.relu() @ weights.W_dec + weights.b_dec - TARGET).square().sum())

    assert error(1.0) < error(0.97)
    assert error(1.0) < error(1.03)


def test_a_skip_connection_begins_at_zero() -> None:
    sae = trainable(TOPK, targetHook="out", skipConnection=True)
    sae.initialize(SAMPLE, TARGET, torch.Generator().manual_seed(0))
    assert sae.W_skip is not None
    assert torch.equal(sae.W_skip, torch.zeros(D_OUT, D_IN))


def test_a_skip_connection_learns_what_is_linear() -> None:
    sae = trainable({**TOPK, "k": 1}, targetHook="out", skipConnection=True)
    sae.initialize(SAMPLE, TARGET, torch.Generator().manual_seed(0))
    assert sae.W_skip is not None
    optimizer = torch.optim.Adam(sae.parameters_by_name.values(), lr=0.05)
    linear = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(40):
        x = batch(seed=step, rows=64)
        losses.append(float(sae.step_gradients(StepInput(x, x @ linear.T, step, None)).loss))
        optimizer.step()
        sae.after_optimizer_step()
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka"])
def test_noise_changes_steps_and_not_the_sae_in_use(architecture: str) -> None:
    sae = trainable({**TYPES[architecture], "noiseScale": 100.0})
    quiet = trainable({**TYPES[architecture], "noiseScale": 0.0})
    x = batch()

    def loss(trained: Any, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return float(trained.step_gradients(StepInput(x, x, 0, None, generator)).loss)

    assert loss(sae, 0) == loss(sae, 0)
    assert loss(sae, 0) != loss(sae, 1)
    assert loss(quiet, 0) == loss(quiet, 1)
    if architecture == "topk":
        assert torch.equal(sae.active_latents(x).dense(), quiet.active_latents(x).dense())


def test_noise_has_the_specs_deviation() -> None:
    sae = trainable({"type": "topk", "k": 1, "noiseScale": 0.5, "auxKCoefficient": 0}, dSae=1)
    with torch.no_grad():
        for name, value in {"W_enc_T": 0.0, "b_enc": 3.0, "W_dec": 0.0, "b_dec": 0.0}.items():
            sae.parameters_by_name[name].fill_(value)
        sae.W_dec[0, 0], sae.b_dec[0] = 1.0, -3.0
    # The reconstruction is the noise itself.
    x = torch.zeros(10_000, D_IN)
    loss = sae.step_gradients(StepInput(x, x, 0, None, torch.Generator().manual_seed(0))).loss
    assert float(loss) == pytest.approx(0.5**2, rel=0.05)


@pytest.mark.parametrize("architecture", [TOPK, STANDARD, {"type": "jumprelu", "l0Coefficient": 0.3}])
def test_noise_without_a_source_is_refused(architecture: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="source of noise"):
        trainable({**architecture, "noiseScale": 1.0}).step_gradients(StepInput(batch(), batch(), 0, None))
