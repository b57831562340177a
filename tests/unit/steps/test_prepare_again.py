"""The step `prepare` where a cache is finished: what other resources have in its folder stays, and what is missing is
written again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sae_job.activations.format import MANIFEST_KEY, sidecar_key
from sae_job.activations.manifest import CacheManifest, read_manifest
from sae_job.activations.writer import shards_in_memory
from sae_job.models.facts import ModelFacts
from sae_job.models.mirror import LocalModel
from sae_job.steps import cache, memory
from sae_job.steps.cache import run_cache
from sae_job.steps.finalize import run_finalize
from sae_operator.api.activation_cache import ActivationCacheSpec
from tests.caches import cache_step, step_context
from tests.faults import folder_bytes
from tests.preparing import Bench, index_of
from tests.tiny_model import write_tiny_model, write_tiny_text

FIRST, SECOND = "model.layers.0", "model.layers.1"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder and a text's folder."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("inputs")
    write_tiny_text(root / "text", documents=60, words=(5, 20))
    return write_tiny_model(root / "model"), root / "text"


@pytest.fixture
def bench(tmp_path: Path, inputs: tuple[Path, Path]) -> Bench:
    return Bench(tmp_path, inputs)


def of_hooks(bench: Bench, *hooks: str, tokens: int = 1000) -> ActivationCacheSpec:
    return bench.spec(tokens=tokens, hooks=[{"name": hook} for hook in hooks])


def build(bench: Bench, spec: ActivationCacheSpec) -> CacheManifest:
    bench.prepare(spec)
    run_cache(cache_step(spec), step_context())
    run_finalize(cache_step(spec), step_context())
    return read_manifest(bench.store(spec))


def test_what_another_resource_has_stays_when_the_manifest_is_deleted(bench: Bench) -> None:
    build(bench, of_hooks(bench, FIRST))
    manifest = build(bench, of_hooks(bench, FIRST, SECOND))
    spec = of_hooks(bench, FIRST, tokens=500)
    bench.store(spec).delete(MANIFEST_KEY)
    assert build(bench, spec) == manifest


@pytest.mark.parametrize("group", [0, 1])
def test_a_part_that_was_deleted_is_written_again_for_whoever_asks(bench: Bench, group: int) -> None:
    build(bench, of_hooks(bench, FIRST))
    manifest = build(bench, of_hooks(bench, FIRST, SECOND))
    spec = of_hooks(bench, FIRST, tokens=500)
    store = bench.store(spec)
    before = folder_bytes(store.root)
    key = manifest.shards[1].parts[group].key
    store.delete(key)
    store.delete(sidecar_key(key))
    result = bench.prepare(spec)
    assert (result.adopted, result.shards_complete) == (False, len(manifest.shards) - 1)
    run_cache(cache_step(spec), step_context())
    run_finalize(cache_step(spec), step_context())
    assert folder_bytes(store.root) == before
    assert bench.prepare(spec).adopted


def test_the_memory_of_a_worker_is_that_of_the_hooks_it_writes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those that another resource has asked for."""
    asked: list[list[str]] = []
    inspect = LocalModel.inspect

    def noted(self: LocalModel, hooks: Sequence[str]) -> ModelFacts:
        asked.append(list(hooks))
        return inspect(self, hooks)

    build(bench, of_hooks(bench, FIRST))
    build(bench, of_hooks(bench, FIRST, SECOND))
    monkeypatch.setattr(LocalModel, "inspect", noted)
    longer = bench.prepare(of_hooks(bench, FIRST, tokens=1200))
    assert asked == [[FIRST], [FIRST, SECOND]]
    of_both = bench.prepare(of_hooks(bench, FIRST, SECOND, tokens=1200))
    assert longer.plan is not None
    assert longer.plan == of_both.plan
    assert [group.hooks for group in index_of(bench.store(bench.spec())).groups] == [[FIRST], [SECOND]]


def test_a_worker_holds_as_many_shards_as_are_planned(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cache that is smaller than one shard, too."""
    counts: list[int] = []

    def noted(buffer_bytes: int | None, shard_bytes: int) -> int:
        counts.append(shards_in_memory(buffer_bytes, shard_bytes))
        return counts[-1]

    for user in (memory, cache):
        monkeypatch.setattr(user, "shards_in_memory", noted)
    build(bench, bench.spec(tokens=100, storage={"bufferBytes": 64_000}))
    row = 32 * 2 + 12
    assert counts == [min(64_000 // (100 * row), 5)] * 2
    assert counts[0] > 64_000 // 32_000
