"""Both layouts of SAELens's cfg.json: what is written, what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_job import SAE
from sae_job.errors import InvalidInput
from sae_job.saes import saelens6
from sae_job.saes.config import Layout
from sae_job.storage.file_store import FileStore
from tests.small_saes import AUTOENCODERS, KINDS, TRANSCODERS, random_sae, rows

BOTH: list[tuple[str, Layout]] = [
    *((kind, "saelens5") for kind in AUTOENCODERS),
    *((kind, "saelens6") for kind in KINDS),
]
LAYOUTS = pytest.mark.parametrize(("kind", "layout"), BOTH, ids=[f"{kind}-{layout}" for kind, layout in BOTH])
BASE_KEYS = {
    "architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "metadata",
}  # fmt: skip


def saved(sae: SAE, folder: Path, layout: Layout = "saelens5") -> dict[str, Any]:
    """The cfg.json that saving an SAE writes."""
    sae.save(FileStore(folder), "", layout=layout)
    return json.loads((folder / "cfg.json").read_text())


def change(folder: Path, **values: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@LAYOUTS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_saved_sae_is_loaded_equal(kind: str, layout: Layout, dtype: str, tmp_path: Path) -> None:
    sae = random_sae(kind, dtype=dtype)
    saved(sae, tmp_path, layout)
    loaded = SAE.load(tmp_path)
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.cfg.dtype == dtype
    x = rows(sae)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(loaded(x), sae(x))
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    if kind != "topk_activation" or layout == "saelens5":
        assert loaded.cfg == sae.cfg


@LAYOUTS
def test_a_file_is_the_same_after_loading_and_saving_it(kind: str, layout: Layout, tmp_path: Path) -> None:
    first = saved(random_sae(kind), tmp_path / "first", layout)
    assert saved(SAE.load(tmp_path / "first"), tmp_path / "second", layout) == first


def test_another_number_format_may_be_asked_for(tmp_path: Path) -> None:
    saved(random_sae("standard", dtype="bfloat16"), tmp_path)
    loaded = SAE.load(tmp_path, dtype="float32")
    assert (loaded.dtype, loaded.cfg.dtype) == (torch.float32, "float32")
    with pytest.raises(InvalidInput, match="dtype 'int8' cannot be loaded"):
        SAE.load(tmp_path, dtype="int8")


@pytest.mark.parametrize(
    ("kind", "name", "keys"),
    [
        ("standard", "standard", set()),
        ("gated", "gated", set()),
        ("jumprelu", "jumprelu", set()),
        ("topk", "topk", {"k", "rescale_acts_by_decoder_norm"}),
        ("topk_activation", "topk", {"k", "rescale_acts_by_decoder_norm"}),
        ("tanh", "tanh_relu", set()),
        ("standard_transcoder", "transcoder", {"d_out"}),
        ("standard_skip_transcoder", "skip_transcoder", {"d_out"}),
        ("jumprelu_transcoder", "jumprelu_transcoder", {"d_out"}),
        ("jumprelu_skip_transcoder", "jumprelu_skip_transcoder", {"d_out"}),
        ("topk_transcoder", "topk_transcoder", {"d_out", "k", "rescale_acts_by_decoder_norm"}),
        ("gated_skip_transcoder", "gated_skip_transcoder", {"d_out"}),
    ],
)
def test_the_newest_layout_has_the_keys_of_the_architecture(
    kind: str, name: str, keys: set[str], tmp_path: Path
) -> None:
    config = saved(random_sae(kind), tmp_path, "saelens6")
    assert set(config) == BASE_KEYS | keys
    assert config["architecture"] == name
    assert config["metadata"]["sae_lens_version"] == saelens6.VERSION
    assert config["metadata"]["hook_name"] == "blocks.7.hook_resid_pre"
    assert config["metadata"]["seqpos_slice"] == [None]
    assert config["metadata"].get("hook_name_out") == ("blocks.7.hook_mlp_out" if kind in TRANSCODERS else None)


def test_every_name_of_the_newest_layout_is_of_one_kind() -> None:
    assert len(set(saelens6.NAMES.values())) == len(saelens6.NAMES)


def test_the_newest_layout_tells_what_an_sae_was_trained_as_and_keeps_what_it_does_not_know(tmp_path: Path) -> None:
    sae = random_sae("jumprelu", training_architecture="batchtopk", metadata={"l0": 31.5})
    config = saved(sae, tmp_path, "saelens6")
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["training_architecture"] == "batchtopk"
    assert config["metadata"]["l0"] == 31.5
    assert SAE.load(tmp_path).cfg == sae.cfg


def test_a_transcoder_is_always_written_in_the_newest_layout(tmp_path: Path) -> None:
    sae = random_sae("standard_transcoder")
    assert saved(sae, tmp_path / "5", "saelens5") == saved(sae, tmp_path / "6", "saelens6")


def test_heads_are_told_where_inputs_have_them(tmp_path: Path) -> None:
    hook = "blocks.3.attn.hook_z"
    assert saved(random_sae("standard", hook_name=hook), tmp_path, "saelens6")["reshape_activations"] == "hook_z"
    one = random_sae("standard", hook_name=hook, hook_head_index=2)
    assert saved(one, tmp_path, "saelens6")["reshape_activations"] == "none"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"architecture": "temporal"},
            "architecture 'temporal' cannot be loaded; these can: standard, gated, jumprelu",
        ),
        ({"architecture": "batchtopk"}, "save_inference_model"),
        ({"l1_coefficient": 1.0, "lp_norm": 1.0}, "unknown keys l1_coefficient, lp_norm, which may change"),
        ({"k": 3}, "unknown keys k"),
        ({"architecture": "topk"}, "cfg.json has no k"),
        ({"reshape_activations": "hook_q"}, "reshape_activations 'hook_q' cannot be loaded; these can: none, hook_z"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening' cannot be loaded"),
        ({"architecture": "transcoder", "d_out": 12}, "apply_b_dec_to_input on, but a transcoder's"),
        ({"d_in": "12"}, "d_in '12'; it must be a number"),
        ({"architecture": ["standard"]}, r"architecture \['standard'\]; it must be a text"),
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input 'false'; it must be true or false"),
        ({"metadata": {"sae_lens_version": "6.0", "hook_name": 3}}, "hook_name 3; it must be a text"),
        (
            {"metadata": {"sae_lens_version": "6.0", "model_from_pretrained_kwargs": ["fold_ln"]}},
            r"model_from_pretrained_kwargs \['fold_ln'\]; it must be an object",
        ),
    ],
)
def test_what_is_not_known_in_the_newest_layout_is_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(random_sae("standard"), tmp_path, "saelens6")
    change(tmp_path, **values)
    with pytest.raises(InvalidInput, match=message):
        SAE.load(tmp_path)


def test_what_metadata_holds_nothing_of_has_its_default(tmp_path: Path) -> None:
    saved(random_sae("standard"), tmp_path, "saelens6")
    nothing = dict.fromkeys(("hook_name", "model_from_pretrained_kwargs", "seqpos_slice"))
    change(tmp_path, metadata={"sae_lens_version": "6.0", **nothing})
    config = SAE.load(tmp_path).cfg
    assert (config.hook_name, config.model_from_pretrained_kwargs, config.seqpos_slice) == ("", {}, (None,))


@pytest.mark.parametrize("key", ["k", "d_out", "rescale_acts_by_decoder_norm", "reshape_activations"])
def test_a_file_of_two_layouts_at_once_is_refused(key: str, tmp_path: Path) -> None:
    saved(random_sae("standard"), tmp_path)
    change(tmp_path, **{key: True})
    with pytest.raises(InvalidInput, match=rf"key {key} of SAELens 6, but no metadata\.sae_lens_version"):
        SAE.load(tmp_path)


def test_a_whole_run_s_settings_in_an_older_file_are_left_out(tmp_path: Path) -> None:
    sae = random_sae("gated")
    saved(sae, tmp_path)
    change(tmp_path, l1_coefficient=5, lr=3e-4, from_pretrained_path=None, hook_point_layer=7)
    assert SAE.load(tmp_path).cfg == sae.cfg


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_fine_tuning_is_saved_where_the_layout_has_it(kind: str, tmp_path: Path) -> None:
    sae = random_sae(kind, finetuning_scaling_factor=True)
    x = rows(sae)
    for layout in ("saelens5", "saelens6"):
        if layout == "saelens5" and sae.cfg.is_transcoder:
            continue
        saved(sae, tmp_path / layout, layout)
        loaded = SAE.load(tmp_path / layout)
        # SAELens 5 looks for it under this name, and has none in gated SAEs.
        kept = layout == "saelens5" and sae.cfg.architecture != "gated"
        assert ("scaling_factor" in load_file(tmp_path / layout / "sae_weights.safetensors")) == kept
        assert loaded.cfg.finetuning_scaling_factor == kept
        assert torch.equal(loaded.encode(x), sae.encode(x))
        assert torch.allclose(loaded(x), sae(x), atol=1e-5)


def test_sparsity_stays_in_float32_whatever_the_format_of_the_weights(tmp_path: Path) -> None:
    sae = random_sae("standard", dtype="bfloat16")
    sae.save(FileStore(tmp_path), "", log_sparsity=torch.full((40,), -2.0, dtype=torch.float64))
    assert load_file(tmp_path / "sparsity.safetensors")["sparsity"].dtype == torch.float32


@pytest.mark.parametrize("missing", ["cfg.json", "sae_weights.safetensors"])
def test_the_file_that_is_missing_is_named(missing: str, tmp_path: Path) -> None:
    saved(random_sae("standard"), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(InvalidInput, match=rf"holds no SAE: {missing} is not there, though \S+ is"):
        SAE.load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\xff", b"[" * 100_000], ids=["cut off", "no object", "no text", "nested without end"]
)
def test_a_damaged_configuration_says_so(content: bytes, tmp_path: Path) -> None:
    saved(random_sae("standard"), tmp_path)
    (tmp_path / "cfg.json").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"cfg\.json is damaged"):
        SAE.load(tmp_path)


def test_all_that_is_wrong_with_tensors_is_told_at_once(tmp_path: Path) -> None:
    saved(random_sae("jumprelu"), tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    del tensors["threshold"]
    save_file(tensors | {"b_dec": torch.zeros(3), "b_gate": torch.zeros(40)}, path)
    with pytest.raises(
        InvalidInput,
        match=r"jumprelu SAE: threshold is not there; b_dec is \[3\] instead of \[12\]; b_gate is not one of them",
    ):
        SAE.load(tmp_path)


@pytest.mark.parametrize("layout", ["saelens5", "saelens6"])
def test_how_to_load_the_model_is_told(layout: Layout, tmp_path: Path) -> None:
    sae = random_sae("standard", model_from_pretrained_kwargs={"fold_ln": True})
    saved(sae, tmp_path, layout)
    with pytest.warns(UserWarning, match=r"from_pretrained_no_processing\(\.\.\., fold_ln=True\)"):
        assert SAE.load(tmp_path).cfg == sae.cfg
