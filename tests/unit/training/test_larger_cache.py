"""Jobs on parts of a cache: the hooks and the rows that they ask for, whatever else others have added."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.activations.manifest import CacheManifest, read_manifest
from sae_job.errors import InvalidInput
from sae_job.saes.base import SAE
from sae_job.steps.cache import write_shards
from sae_job.steps.finalize import run_finalize
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_job.text.plan import HookGroup
from sae_operator.api.identity import cache_location
from tests.caches import LookupModel, cache_spec, cache_step, prepare_tokens, step_context
from tests.small_training import STANDARD, TOPK, Job, train_step

A, B = {"layer.0": 16}, {"layer.1": 12}
# 15 tokens of a context are rows; of 76 bytes a row, a shard has 215: four, and 40 rows.
ROWS = 900


@dataclass
class Caches:
    """One cache in its states, and jobs on it."""

    root: Path

    @property
    def folder(self) -> Path:
        return path_of_file_uri(cache_location(cache_spec(self.root / "caches", dtype="float32"), "team").uri)

    def state(self, hooks: dict[str, int], tokens: int) -> CacheManifest:
        """Build the cache, or extend it; each hook is a group."""
        spec = cache_spec(self.root / "caches", hooks=hooks, tokens=tokens, dtype="float32")
        prepare_tokens(FileStore(self.folder), spec, hooks, groups=[HookGroup(hooks=[hook]) for hook in hooks])
        step, context = cache_step(spec), step_context()
        write_shards(step, context, lambda _: LookupModel(hooks, dtype=torch.float32), device="cpu")
        run_finalize(step, context)
        return read_manifest(FileStore(self.folder))

    def job(self, name: str, hooks: dict[str, int], tokens: int, **parts: Any) -> Job:
        """A job that asks for these hooks and rows."""
        asked = cache_spec(self.root / "caches", hooks=hooks, tokens=tokens, dtype="float32")
        step = train_step(**parts).model_copy(update={"cache": asked})
        return Job(self.folder, self.root / name, step)


@pytest.fixture
def caches(tmp_path: Path) -> Caches:
    return Caches(tmp_path)


def results_of(job: Job) -> dict[str, Any]:
    return json.loads((job.output / "results.json").read_text())


def scale_of(job: Job) -> float:
    return results_of(job)["provenance"]["resolved"]["saes"]["topk"]["scale"]


def test_rows_and_hooks_that_others_add_change_no_bit_of_a_job(caches: Caches) -> None:
    caches.state(A, ROWS)
    before = caches.job("before", A, ROWS)
    before.run()
    caches.state(A, 2000)
    longer = caches.job("longer", A, ROWS)
    longer.run()
    assert longer.left() == before.left()
    assert scale_of(longer) == scale_of(before)
    manifest = caches.state(A | B, 2000)
    wider = caches.job("wider", A, ROWS)
    wider.run()
    assert wider.left() == before.left()
    assert scale_of(wider) == scale_of(before)
    facts = results_of(wider)["provenance"]["cache"]
    assert (facts["rows"], facts["tokens"]) == (ROWS, 2000)
    assert facts["hooks"] == ["layer.0", "layer.1"]
    assert facts["identity"] == manifest.identity
    assert facts["manifest_sha256"] == manifest.sha256


def test_all_rows_of_the_longer_cache_are_another_job(caches: Caches) -> None:
    caches.state(A, ROWS)
    short = caches.job("short", A, ROWS)
    short.run()
    caches.state(A, 2000)
    long = caches.job("long", A, 2000)
    long.run()
    assert long.left() != short.left()
    assert scale_of(long) != scale_of(short)


def test_a_job_is_trained_on_a_hook_that_was_added(caches: Caches) -> None:
    caches.state(A, ROWS)
    manifest = caches.state(A | B, ROWS)
    job = caches.job("out", B, ROWS)
    job.run()
    assert SAE.load(job.output / "topk").cfg.d_in == 12
    assert SAE.load(job.output / "topk").cfg.hook_name == "layer.1"
    statistics = manifest.hook("layer.1")
    variance = statistics.mean_squared_norm - sum(value**2 for value in statistics.mean)
    assert scale_of(job) == pytest.approx((12 / variance) ** 0.5, rel=1e-9)


def test_a_job_by_uri_names_the_hook_among_all_of_the_cache(caches: Caches) -> None:
    caches.state(A | B, ROWS)

    def job(name: str, saes: list[dict[str, Any]]) -> Job:
        return Job(caches.folder, caches.root / name, train_step(saes=saes))

    with pytest.raises(InvalidInput) as caught:
        job("unnamed", [TOPK]).run()
    assert (caught.value.reason, caught.value.field) == ("HookMissing", "spec.saes[0].hook")
    both = job("both", [{**TOPK, "hook": "layer.1"}, {**STANDARD, "hook": "layer.0"}])
    both.run()
    alone = job("alone", [{**TOPK, "hook": "layer.1"}])
    alone.run()
    name = "topk/sae_weights.safetensors"
    assert both.left()[name] == alone.left()[name]
    assert results_of(both)["provenance"]["cache"]["rows"] == ROWS


def test_statistics_fall_back_to_the_whole_cache_where_sidecars_are_gone(caches: Caches) -> None:
    caches.state(A, ROWS)
    caches.state(A, 2000)
    with_sidecars = caches.job("with", A, ROWS)
    with_sidecars.run()
    for sidecar in caches.folder.glob("shards/000001.json"):
        sidecar.unlink()
    without = caches.job("without", A, ROWS)
    without.run()
    whole = caches.job("whole", A, 2000)
    whole.run()
    assert scale_of(without) == scale_of(whole) != scale_of(with_sidecars)
