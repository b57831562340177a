"""What was trained computes the same on raw activations once it is saved and loaded, in either layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job import SAE
from sae_job.saes.config import Layout, Provenance
from sae_job.storage.file_store import FileStore
from tests.unit.saes.conftest import BATCHTOPK, D_SAE, MATRYOSHKA, STANDARD, TOPK, batch, trainable

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": TOPK,
    "batchtopk": BATCHTOPK,
    "matryoshka": MATRYOSHKA,
    "standard": STANDARD,
    "tanh": {**STANDARD, "activation": "tanh-relu"},
    "gated": {"type": "gated", "l1Coefficient": 0.3},
    "jumprelu": {"type": "jumprelu", "l0Coefficient": 0.3},
}
SHAPES: dict[str, dict[str, Any]] = {
    "autoencoder": {},
    "transcoder": {"targetHook": "other"},
    "skip transcoder": {"targetHook": "other", "skipConnection": True},
}
SCALE, TARGET_SCALE = 0.25, 8.0


@pytest.mark.parametrize("layout", ["saelens5", "saelens6"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_saved_sae_computes_what_training_did(kind: str, shape: str, layout: Layout, tmp_path: Path) -> None:
    training = trainable(ARCHITECTURES[kind], **SHAPES[shape])
    threshold = (training.buffers_by_name | training.parameters_by_name).get("threshold")
    if threshold is not None:
        threshold.data.fill_(0.25)
    provenance = Provenance(hook_name="layers.3", hook_name_out="layers.3.mlp", hook_head_index_out=1)
    target_scale = SCALE if shape == "autoencoder" else TARGET_SCALE
    training.to_inference(scale=SCALE, target_scale=target_scale, provenance=provenance).save(
        FileStore(tmp_path), "", layout=layout
    )
    sae = SAE.load(tmp_path)

    x = batch()
    active = training.active_latents(x)
    features, reconstruction = sae.reconstruct(x / SCALE)
    assert bool((features > 0).any())
    assert bool((features.count_nonzero(dim=1) < D_SAE).all())
    assert torch.allclose(features, active.dense(), atol=1e-5)
    trained = training.add_bias_and_skip_(active.decode(training.W_dec), x)
    assert torch.allclose(reconstruction * target_scale, trained, atol=1e-4)
    assert sae.cfg.skip_connection == (shape == "skip transcoder")
    if shape != "autoencoder":
        assert (sae.cfg.hook_name_out, sae.cfg.hook_head_index_out) == ("layers.3.mlp", 1)
    if "metadata" in json.loads((tmp_path / "cfg.json").read_text()):
        assert sae.cfg.training_architecture == ARCHITECTURES[kind]["type"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once_after_the_scale_is_folded(dtype: str, tmp_path: Path) -> None:
    training = trainable(STANDARD, dtype=dtype)
    training.to_inference(scale=SCALE).save(FileStore(tmp_path), "")
    sae = SAE.load(tmp_path)
    assert sae.W_dec.dtype == getattr(torch, dtype)
    assert torch.equal(sae.W_dec, (training.W_dec / SCALE).to(sae.dtype))
