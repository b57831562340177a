"""The steps of a cache with models of every kind and from everywhere: rows are the model's own activations."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.activations.contexts import ContextReader
from sae_job.activations.manifest import CacheManifest, read_manifest
from sae_job.activations.reader import CachedActivations, held_out_contexts_for
from sae_job.models import mirror as mirror_module
from sae_job.models.load import load_hooked_model
from sae_job.models.mirror import MIRROR_PREFIX
from sae_job.steps.cache import run_cache
from sae_job.steps.finalize import run_finalize
from sae_job.steps.prepare import run_prepare
from sae_job.storage.base import ObjectStore
from sae_job.storage.open import open_store
from sae_job.text.plan import CacheIndex
from sae_operator.api.activation_cache import ActivationCacheSpec, ModelSource
from sae_operator.api.steps import CacheStep
from tests.caches import cache_step, step_context
from tests.testbed.data import ensure_sentence_encoder
from tests.tiny_model import WIDTH, write_tiny_model, write_tiny_text

LAYER = "model.layers.1"
HUB_NAME, COMMIT = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"
S3_NAME = "s3://bucket/models/tiny"


@pytest.fixture(autouse=True)
def _temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    yield
    # Another test's folder of the same name would stand for these files.
    shutil.rmtree(tmp_path / "tmp")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text(tmp_path_factory.mktemp("text"), documents=40)


def step_for(root: Path, text: Path, model: dict[str, Any], hooks: list[dict[str, Any]]) -> CacheStep:
    spec = {
        "model": {"dtype": "float32", "batchSize": 8, **model},
        "dataset": {"path": str(text)},
        "hooks": hooks,
        "contextSize": 32,
        "tokens": 600,
        "storage": {"uri": f"file://{root / 'caches'}", "dtype": "float32", "shardBytes": 2**16},
    }
    return cache_step(ActivationCacheSpec.model_validate(spec))


def run_steps(step: CacheStep, root: Path) -> ObjectStore:
    """Run all steps; `s3://` is a folder below `root`. Returns the cache's folder."""
    context = step_context(open_store=partial(open_store, local_root=root / "s3"))
    run_prepare(step.model_copy(update={"step": "prepare"}), context)
    run_cache(step, context)
    run_finalize(step.model_copy(update={"step": "finalize"}), context)
    return context.open_store(step.location)


def check_rows(store: ObjectStore, model: ModelSource) -> CacheManifest:
    """Rows of a cache are what this model gives at their places."""
    manifest = read_manifest(store)
    index = CacheIndex.load(store)
    assert index is not None
    hooks = [hook.name for hook in manifest.hooks]
    contexts = held_out_contexts_for(store, manifest, 100)
    reader = CachedActivations.open(store, hooks=hooks, batch_size=50, seed=0, held_out_contexts=contexts)
    held = reader.held_out(100)
    reader.close()
    tokens = ContextReader(store, index).read(0, int(held.sequence.max()) + 1)
    expected = load_hooked_model(model, hooks, device="cpu").activations(tokens)
    for hook in hooks:
        values = expected[hook][held.sequence.long(), held.position.long()]
        torch.testing.assert_close(held.activations[hook], values, rtol=1e-4, atol=1e-4)
    return manifest


def test_a_model_in_a_bucket(tmp_path: Path, tiny: Path, text: Path) -> None:
    shutil.copytree(tiny, tmp_path / "s3/bucket/models/tiny")
    store = run_steps(step_for(tmp_path, text, {"name": S3_NAME}, [{"name": LAYER}]), tmp_path)
    manifest = check_rows(store, ModelSource(name=str(tiny), dtype="float32"))
    assert manifest.model["name"] == S3_NAME
    assert len(manifest.model["revision"]) == 40


def test_a_mirrored_hub_model_is_needed_on_the_hub_once(
    tmp_path: Path, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def snapshot(name: str, commit: str) -> Path:
        asked.append(f"{name}@{commit}")
        return tiny

    monkeypatch.setattr(mirror_module, "resolve_commit", lambda *_, **__: COMMIT)
    monkeypatch.setattr(mirror_module, "_snapshot", snapshot)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    step = step_for(tmp_path, text, {"name": HUB_NAME, "mirror": True}, [{"name": LAYER}])
    store = run_steps(step, tmp_path)
    assert asked == [f"{HUB_NAME}@{COMMIT}"]
    assert store.head(f"{MIRROR_PREFIX}model.safetensors") is not None
    manifest = check_rows(store, ModelSource(name=str(tiny), dtype="float32"))
    assert (manifest.model["name"], manifest.model["revision"]) == (HUB_NAME, COMMIT)


def test_a_head_and_a_layer_by_transformer_lens(tmp_path: Path, tiny: Path, text: Path) -> None:
    model = {"name": str(tiny), "loader": "TransformerLens"}
    heads = "blocks.1.attn.hook_z"
    hooks = [{"name": heads, "headIndex": 2}, {"name": heads}, {"name": "blocks.1.hook_resid_post"}]
    store = run_steps(step_for(tmp_path, text, model, hooks), tmp_path)
    manifest = check_rows(store, ModelSource(name=str(tiny), dtype="float32", loader="TransformerLens"))
    assert {hook.name: hook.d_in for hook in manifest.hooks} == {
        f"{heads}:2": WIDTH // 4,
        heads: WIDTH,
        "blocks.1.hook_resid_post": WIDTH,
    }


def test_a_sentence_encoder_whose_tokenizer_has_no_bos(tmp_path: Path, text: Path) -> None:
    model = {"name": str(ensure_sentence_encoder())}
    store = run_steps(step_for(tmp_path, text, model, [{"name": "encoder.layer.2"}]), tmp_path)
    manifest = check_rows(store, ModelSource(name=model["name"], dtype="float32"))
    assert [hook.d_in for hook in manifest.hooks] == [384]
    assert manifest.tokens == 600
