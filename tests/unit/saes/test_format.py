"""SAEs are saved as the field's tools read them, and what cannot be loaded rightly is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sae_job import SAE
from sae_job.errors import InvalidInput
from sae_job.saes.config import Provenance, SAEConfig
from sae_job.storage.file_store import FileStore
from sae_job.storage.open import open_store
from sae_operator.api.store import StoreLocation
from tests.unit.saes.conftest import D_IN, D_SAE, STANDARD, TOPK, batch, trainable

# What SAELens 5 writes into cfg.json.
KEYS = {
    "architecture", "d_in", "d_sae", "activation_fn_str", "activation_fn_kwargs", "apply_b_dec_to_input",
    "finetuning_scaling_factor", "context_size", "model_name", "hook_name", "hook_layer", "hook_head_index",
    "prepend_bos", "dataset_path", "dataset_trust_remote_code", "normalize_activations", "dtype", "device",
    "sae_lens_training_version", "neuronpedia_id", "model_from_pretrained_kwargs", "seqpos_slice",
}  # fmt: skip
PROVENANCE = Provenance(model_name="gpt2", hook_name="transformer.h.7", dataset_path="text", context_size=64)


@pytest.fixture(params=[TOPK, STANDARD], ids=["topk", "standard"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[SAE, Path]:
    sae = trainable(request.param).to_inference(scale=0.25, provenance=PROVENANCE)
    folder = tmp_path / "sae"
    sae.save(open_store(StoreLocation(uri=f"file://{tmp_path}")), "sae", log_sparsity=torch.full((D_SAE,), -2.0))
    return sae, folder


def as_stored(sae: SAE) -> SAEConfig:
    """The 22 keys have no place for what an SAE was trained as."""
    return dataclasses.replace(sae.cfg, training_architecture=None)


def change(folder: Path, **values: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_configuration_has_the_keys_of_the_format(saved: tuple[SAE, Path]) -> None:
    config = json.loads((saved[1] / "cfg.json").read_text())
    assert set(config) == KEYS
    assert config["hook_layer"] == 7
    assert config["normalize_activations"] == "none"
    assert config["activation_fn_kwargs"] == ({"k": 5} if config["architecture"] == "topk" else {})


def test_head_positions_and_processing_are_told_apart_from_the_hook(tmp_path: Path) -> None:
    provenance = Provenance(
        hook_name="blocks.3.attn.hook_z",
        hook_head_index=2,
        seqpos_slice=(1, -2),
        model_from_pretrained_kwargs={"fold_ln": True},
    )
    sae = trainable(TOPK).to_inference(scale=1.0, provenance=provenance)
    sae.save(FileStore(tmp_path), "sae")
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    assert set(config) == KEYS
    assert (config["hook_name"], config["hook_head_index"], config["hook_layer"]) == ("blocks.3.attn.hook_z", 2, 3)
    assert (config["seqpos_slice"], config["model_from_pretrained_kwargs"]) == ([1, -2], {"fold_ln": True})
    assert SAE.load(tmp_path / "sae").cfg == as_stored(sae)


def test_tensors_have_the_names_and_shapes_of_the_format(saved: tuple[SAE, Path]) -> None:
    tensors = load_file(saved[1] / "sae_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    assert load_file(saved[1] / "sparsity.safetensors")["sparsity"].shape == (D_SAE,)


def test_a_saved_sae_is_loaded_equal(saved: tuple[SAE, Path]) -> None:
    sae, folder = saved
    for location in (folder, str(folder), f"file://{folder}"):
        loaded = SAE.load(location)
        assert loaded.cfg == as_stored(sae)
        assert torch.equal(loaded(batch()), sae(batch()))


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_a_scaling_factor_is_taken_under_both_of_its_names(saved: tuple[SAE, Path], name: str) -> None:
    sae, folder = saved
    factor = torch.linspace(0.5, 2, D_SAE)
    save_file({**load_file(folder / "sae_weights.safetensors"), name: factor}, folder / "sae_weights.safetensors")
    with pytest.raises(InvalidInput, match="finetuning_scaling_factor off"):
        SAE.load(folder)
    change(folder, finetuning_scaling_factor=True)
    loaded = SAE.load(folder)
    features = sae.encode(batch())
    assert torch.allclose(loaded.decode(features), sae.decode(features * factor), atol=1e-6)


def test_a_scaling_factor_of_ones_is_left_out(saved: tuple[SAE, Path]) -> None:
    sae, folder = saved
    tensors = load_file(folder / "sae_weights.safetensors") | {"scaling_factor": torch.ones(D_SAE)}
    save_file(tensors, folder / "sae_weights.safetensors")
    loaded = SAE.load(folder)
    assert not loaded.cfg.finetuning_scaling_factor
    assert torch.equal(loaded(batch()), sae(batch()))


def test_older_names_of_keys_are_understood() -> None:
    config = SAEConfig.from_dict(
        {
            "d_in": 4,
            "d_sae": 8,
            "hook_point": "blocks.3.hook_mlp_out",
            "hook_point_layer": 3,
            "activation_fn": "relu",
            "normalize_activations": False,
            "dtype": "torch.float32",
            "l1_coefficient": 5,
        }
    )
    assert (config.hook_name, config.hook_layer, config.activation_fn_str) == ("blocks.3.hook_mlp_out", 3, "relu")
    assert (config.architecture, config.normalize_activations, config.dtype) == ("standard", "none", "float32")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"architecture": "vanilla"},
            "architecture 'vanilla' cannot be loaded; these can: standard, gated, jumprelu, topk",
        ),
        ({"architecture": "gated", "activation_fn_str": "relu"}, "b_gate is not there; .* b_enc is not one of them"),
        ({"architecture": "jumprelu", "activation_fn_str": "tanh-relu"}, "'tanh-relu' cannot be loaded; .*: relu"),
        ({"activation_fn_str": "gelu"}, "activation function of architecture .* 'gelu' cannot be loaded"),
        (
            {"normalize_activations": "covariance_whitening"},
            "normalize_activations 'covariance_whitening' cannot be loaded; these can: none, expected_average_only_in, "
            "constant_norm_rescale, layer_norm",
        ),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {}}, "activation_fn_kwargs.k"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 0}}, "k 0; it must be"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 65}}, "k 65, but only 64 latents"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 1, "postact_fn": "tanh"}}, "kwargs.postact_fn"),
        ({"d_sae": 70}, r"W_enc is \[12, 64\] instead of \[12, 70\]"),
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input 'false'; it must be true or false"),
        ({"hook_name": None}, "hook_name None; it must be a text"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": [3]}, r"kwargs \[3\]; it must be an object"),
        ({"dtype": "float8"}, "dtype 'float8' cannot be loaded; these can: float32"),
    ],
)
def test_what_cannot_be_loaded_rightly_is_refused(
    saved: tuple[SAE, Path], values: dict[str, Any], message: str
) -> None:
    change(saved[1], **values)
    with pytest.raises(InvalidInput, match=message):
        SAE.load(saved[1])


def test_a_folder_without_an_sae_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no SAE"):
        SAE.load(tmp_path)


def test_damaged_weights_say_so(saved: tuple[SAE, Path]) -> None:
    (saved[1] / "sae_weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(InvalidInput, match="is damaged"):
        SAE.load(saved[1])


def test_a_flag_without_its_scaling_factor_is_switched_off(saved: tuple[SAE, Path]) -> None:
    sae, folder = saved
    change(folder, finetuning_scaling_factor=True)
    loaded = SAE.load(folder)
    assert not loaded.cfg.finetuning_scaling_factor
    assert torch.equal(loaded(batch()), sae(batch()))


@pytest.mark.parametrize("k", [16, 32])
def test_exactly_k_latents_are_active_where_enough_are_positive(k: int) -> None:
    config = SAEConfig.from_dict({"architecture": "topk", "d_in": 512, "d_sae": 512, "activation_fn_kwargs": {"k": k}})
    identity, zeros = torch.eye(512), torch.zeros(512)
    sae = SAE.from_tensors(config, {"W_enc": identity, "W_dec": identity, "b_enc": zeros, "b_dec": zeros})
    noise = torch.randn(10, 4, 512, generator=torch.Generator().manual_seed(0))
    features = sae.encode(noise)
    assert features.shape == noise.shape
    assert int((features != 0).sum()) == k * 40
    assert int((sae.encode(-noise.abs()) != 0).sum()) == 0, "negative ones among the largest are not active"


@pytest.mark.parametrize("architecture", [TOPK, STANDARD], ids=["topk", "standard"])
@given(exponent=st.integers(-10, 10), seed=st.integers(0, 1000))
def test_folding_a_power_of_two_changes_no_bit(architecture: dict[str, Any], exponent: int, seed: int) -> None:
    training, scale = trainable(architecture, seed=seed), 2.0**exponent
    unfolded, folded = training.to_inference(scale=1.0), training.to_inference(scale=scale)
    x = batch(seed)
    features = unfolded.encode(x)
    assert bool((features > 0).any())
    assert torch.equal(folded.encode(x / scale), features)
    assert torch.equal(folded(x / scale) * scale, unfolded(x))


# Rounding may swap latents that tie for the last place among the k, so both sides are given the same features.
@pytest.mark.parametrize("architecture", [TOPK, STANDARD], ids=["topk", "standard"])
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_folding_a_scale_changes_nothing_but_rounding(architecture: dict[str, Any], scale: float, seed: int) -> None:
    training = trainable(architecture, seed=seed)
    unfolded, folded = training.to_inference(scale=1.0), training.to_inference(scale=scale)
    x = batch(seed)
    assert torch.allclose(folded.pre_activations(x / scale), unfolded.pre_activations(x), rtol=1e-4, atol=1e-5)
    features = unfolded.encode(x)
    assert torch.allclose(folded.decode(features) * scale, unfolded.decode(features), rtol=1e-4, atol=1e-5)
