"""The three steps on a real (tiny, random) language model and real tokenizer: rows are its hidden states, bit for
bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from sae_job.activations.contexts import ContextReader
from sae_job.activations.manifest import read_manifest
from sae_job.activations.reader import CachedActivations, held_out_contexts_for
from sae_job.models.load import load_hooked_model
from sae_job.steps.cache import run_cache
from sae_job.steps.finalize import run_finalize
from sae_job.steps.prepare import run_prepare
from sae_job.storage.base import ObjectStore
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_job.text.plan import CacheIndex
from sae_operator.api.activation_cache import ActivationCacheSpec, CacheStorage, DatasetSource, Hook, ModelSource
from sae_operator.api.steps import CacheStep
from sae_operator.api.store import StoreLocation
from tests.caches import cache_step, step_context
from tests.faults import KILLED, FaultPlan, count_calls, folder_bytes, kill, run_in_child
from tests.tiny_model import SPECIAL_TOKENS, WIDTH, write_tiny_model, write_tiny_text

HOOKS = ("model.layers.0", "model.layers.1")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return write_tiny_model(folder / "model"), write_tiny_text(folder / "text", documents=40)


def step_for(sources: tuple[Path, Path], root: Path, *, tokens: int = 2000) -> CacheStep:
    model, text = sources
    spec = ActivationCacheSpec(
        model=ModelSource(name=str(model), dtype="float32", batch_size=8),
        dataset=DatasetSource(path=str(text)),
        hooks=[Hook(name=name) for name in HOOKS],
        context_size=32,
        tokens=tokens,
        storage=CacheStorage(uri=f"file://{root}", shard_bytes=2**16),
    )
    return cache_step(spec)


def run_steps(step: CacheStep, wrap: Callable[[ObjectStore], ObjectStore] = lambda store: store) -> None:
    def open_store(location: StoreLocation) -> ObjectStore:
        return wrap(FileStore(path_of_file_uri(location.uri)))

    context = step_context(open_store=open_store)
    run_prepare(step.model_copy(update={"step": "prepare"}), context)
    run_cache(step, context)
    run_finalize(step.model_copy(update={"step": "finalize"}), context)


def test_rows_are_the_models_hidden_states(sources: tuple[Path, Path], tmp_path: Path) -> None:
    step = step_for(sources, tmp_path)
    run_steps(step)
    store = FileStore(path_of_file_uri(step.location.uri))
    manifest = read_manifest(store)
    assert manifest.tokens == 2000
    assert [(hook.name, hook.d_in) for hook in manifest.hooks] == [(name, WIDTH) for name in HOOKS]

    index = CacheIndex.load(store)
    assert index is not None
    model = load_hooked_model(step.spec.model, HOOKS)
    contexts = ContextReader(store, index)
    special = torch.arange(len(SPECIAL_TOKENS))
    for entry in manifest.shards:
        shard = load(store.get(entry.parts[0].key))
        assert not torch.isin(shard["token_ids"], special).any()
        # The same batches as the worker made: results hang on them in the last bits.
        found: dict[str, list[torch.Tensor]] = {name: [] for name in HOOKS}
        for start in range(entry.start, entry.stop, step.spec.model.batch_size):
            tokens = contexts.read(start, min(start + step.spec.model.batch_size, entry.stop))
            for name, values in model.activations(tokens).items():
                found[name].append(values)
        place = (shard["sequence"] - entry.start).long(), shard["position"].long()
        assert torch.equal(shard["token_ids"], contexts.read(entry.start, entry.stop)[place])
        for name in HOOKS:
            assert torch.equal(shard[name], torch.cat(found[name])[place].bfloat16())


def test_training_reads_what_was_cached_and_never_what_is_held_out(sources: tuple[Path, Path], tmp_path: Path) -> None:
    step = step_for(sources, tmp_path)
    run_steps(step)
    store = FileStore(path_of_file_uri(step.location.uri))
    manifest = read_manifest(store)
    contexts = held_out_contexts_for(store, manifest, 200)
    reader = CachedActivations.open(store, hooks=HOOKS, batch_size=64, seed=0, held_out_contexts=contexts)
    held = reader.held_out(200)
    assert len(held.sequence) == 200
    assert reader.training_rows <= 1800
    batch = reader.next_batch()
    assert {name: values.shape for name, values in batch.items()} == dict.fromkeys(HOOKS, (64, WIDTH))
    reader.close()


def test_all_steps_killed_at_any_store_call_end_in_the_same_cache(sources: tuple[Path, Path], tmp_path: Path) -> None:
    step = step_for(sources, tmp_path / "cache", tokens=1200)
    folder = path_of_file_uri(step.location.uri)
    calls = count_calls(lambda plan: run_steps(step, plan.wrap))
    undisturbed = folder_bytes(folder)
    assert calls > 20
    for number in range(1, calls + 1):
        shutil.rmtree(folder)
        assert run_in_child(lambda n=number: run_steps(step, FaultPlan(n, kill, "after").wrap)) == KILLED
        run_steps(step)
        assert folder_bytes(folder) == undisturbed, f"after a kill at call {number}"


def test_more_tokens_extend_the_cache_and_leave_full_shards(sources: tuple[Path, Path], tmp_path: Path) -> None:
    short = step_for(sources, tmp_path, tokens=1200)
    run_steps(short)
    store = FileStore(path_of_file_uri(short.location.uri))
    before = {name: data for name, data in folder_bytes(store.root).items() if name.startswith("shards/")}
    long = step_for(sources, tmp_path, tokens=3000)
    assert long.location == short.location
    run_steps(long)
    after = folder_bytes(store.root)
    assert before.items() <= after.items()
    assert read_manifest(store).tokens == 3000
    # As if it had been asked for at once.
    fresh = step_for(sources, tmp_path / "fresh", tokens=3000)
    run_steps(fresh)
    at_once = folder_bytes(path_of_file_uri(fresh.location.uri))
    shards = {name: data for name, data in at_once.items() if name.startswith("shards/")}
    assert shards.items() <= after.items()
