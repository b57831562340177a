"""A live source: the batches of a cache of the same spec, bit for bit, without the cache."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from sae_job.activations.contexts import ContextReader
from sae_job.activations.live import LiveActivations, LiveSource
from sae_job.activations.manifest import CacheManifest
from sae_job.activations.reader import CachedActivations, held_out_contexts_for
from sae_job.errors import InvalidInput
from sae_job.storage.file_store import FileStore
from tests.caches import BOS, LookupModel, cache_spec, finished_cache, prepare_tokens

HOOKS = {"layer.0": 16, "layer.1": 8}
TOKENS = 1200
# Drops about a fiftieth of the rows.
RATIO = 1.35


def live_source(
    folder: Path, *, tokens: int = TOKENS, max_norm_ratio: float = RATIO, model: LookupModel | None = None
) -> LiveSource:
    """What a job finds after preflight: contexts, and a plan."""
    spec = cache_spec(folder, hooks=HOOKS, tokens=tokens, dtype="float32", max_norm_ratio=max_norm_ratio)
    store = FileStore(folder)
    prepare_tokens(store, spec, HOOKS)
    return LiveSource(store, spec, model or LookupModel(HOOKS, dtype=torch.float32))


def open_live(source: LiveSource, **changes: object) -> LiveActivations:
    arguments: dict[str, object] = {
        "hooks": ["layer.1", "layer.0"],
        "batch_size": 64,
        "seed": 1,
        "held_out_contexts": 0,
        "mix_shards": 3,
    }
    return LiveActivations.open(source, **{**arguments, **changes})  # pyright: ignore[reportArgumentType]


def cache_like(folder: Path, *, tokens: int = TOKENS, max_norm_ratio: float = RATIO) -> tuple[FileStore, CacheManifest]:
    return finished_cache(folder, hooks=HOOKS, tokens=tokens, dtype="float32", max_norm_ratio=max_norm_ratio)


def open_cached(store: FileStore, **changes: object) -> CachedActivations:
    arguments: dict[str, object] = {
        "hooks": ["layer.1", "layer.0"],
        "batch_size": 64,
        "seed": 1,
        "held_out_contexts": 0,
        "mix_shards": 3,
    }
    return CachedActivations.open(store, **{**arguments, **changes})  # pyright: ignore[reportArgumentType]


def take(stream: LiveActivations, batches: int) -> None:
    for _ in range(batches):
        stream.next_batch()


def same(live: LiveActivations, cached: CachedActivations, batches: int) -> bool:
    """Whether the next batches are equal, bit for bit."""
    for _ in range(batches):
        one, other = live.next_batch(), cached.next_batch()
        if list(one) != list(other) or any(not torch.equal(one[hook], other[hook]) for hook in one):
            return False
    return live.state() == cached.state() and live.epoch == cached.epoch


@pytest.mark.parametrize("mix", [1, 3, 100])
@pytest.mark.parametrize("held_out", [0, 130, 300])
@pytest.mark.parametrize("ratio", [0.0, RATIO])
def test_batches_are_those_of_a_cache(tmp_path: Path, mix: int, held_out: int, ratio: float) -> None:
    """Over three epochs; so are the held-out rows, and the contexts that hold them."""
    store, manifest = cache_like(tmp_path / "cache", max_norm_ratio=ratio)
    source = live_source(tmp_path / "live", max_norm_ratio=ratio)
    assert source.tokens == manifest.tokens == TOKENS
    contexts = held_out_contexts_for(store, manifest, held_out)
    assert source.held_out_contexts(held_out) == contexts
    live = open_live(source, mix_shards=mix, held_out_contexts=contexts)
    cached = open_cached(store, mix_shards=mix, held_out_contexts=contexts)
    assert live.training_rows == cached.training_rows
    assert same(live, cached, 10)
    mine, theirs = live.held_out(10_000), cached.held_out(10_000)
    assert len(mine.sequence) >= held_out
    for hook in HOOKS:
        assert torch.equal(mine.activations[hook], theirs.activations[hook])
    for name in ("token_ids", "sequence", "position"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name))
    assert same(live, cached, 3 * TOKENS // 64 - 10)
    live.close()
    cached.close()


@pytest.mark.parametrize("before", [0, 1, 9, 20, 45])
def test_a_live_stream_goes_on_from_the_state_of_a_cached_one(tmp_path: Path, before: int) -> None:
    store, _ = cache_like(tmp_path / "cache")
    cached = open_cached(store, held_out_contexts=5)
    for _ in range(before):
        cached.next_batch()
    live = open_live(live_source(tmp_path / "live"), held_out_contexts=5)
    live.next_batch()
    live.restore(json.loads(json.dumps(cached.state())))
    assert same(live, cached, 25)
    live.close()
    cached.close()


def test_a_pass_that_was_begun_ends_as_planned_when_tokens_are_raised(tmp_path: Path) -> None:
    """As it does when a cache is extended: the shard that was the last, partial one is computed as it was."""
    store, manifest = cache_like(tmp_path / "cache")
    assert manifest.shards[-1].rows < manifest.rows_per_shard
    cached = open_cached(store)
    live = open_live(live_source(tmp_path / "live"))
    assert same(live, cached, 7)
    live.close()
    longer = open_live(live_source(tmp_path / "live", tokens=2 * TOKENS))
    longer.restore(cached.state())
    assert same(longer, cached, TOKENS // 64 - 7)
    longer.next_batch()
    assert longer.state()["rows"] == 2 * TOKENS
    longer.close()
    # Whoever asks for as many rows as before, reads as before.
    fewer = open_live(live_source(tmp_path / "live", tokens=2 * TOKENS), total_rows=TOKENS, held_out_contexts=3)
    again = open_cached(store, held_out_contexts=3)
    assert same(fewer, again, 2 * TOKENS // 64)
    for stream in (fewer, again, cached):
        stream.close()


def test_statistics_are_measured_on_the_first_contexts(tmp_path: Path) -> None:
    """In batches of four contexts, until there are rows enough; dropped rows do not count."""
    source = live_source(tmp_path, max_norm_ratio=0.0)
    contexts = ContextReader(FileStore(tmp_path), source.index).read(0, 8)
    model = LookupModel(HOOKS, dtype=torch.float32)
    found = {statistics.name: statistics for statistics in source.statistics(rows=100)}
    for hook, values in model.activations(contexts).items():
        rows = values[contexts != BOS].double()
        assert len(rows) == 8 * 15
        assert found[hook].rows == len(rows)
        assert torch.tensor(found[hook].mean, dtype=torch.float64).allclose(rows.mean(dim=0), rtol=1e-12, atol=0)
        assert found[hook].mean_norm == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-12)
        assert found[hook].mean_squared_norm == pytest.approx(float(rows.square().sum(dim=1).mean()), rel=1e-12)
    assert live_source(tmp_path, max_norm_ratio=0.0).statistics(rows=100) == source.statistics(rows=100)


def test_statistics_leave_out_what_the_norm_filter_drops(tmp_path: Path) -> None:
    plain, filtered = (
        live_source(tmp_path / str(ratio), max_norm_ratio=ratio).statistics()[0] for ratio in (0.0, RATIO)
    )
    assert filtered.rows < plain.rows
    assert filtered.calibration_median_norm is not None
    assert filtered.mean_squared_norm < plain.mean_squared_norm


class FailingModel(LookupModel):
    """Fails at its 16th batch: in the middle of an epoch."""

    def activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.calls == 15:
            raise RuntimeError("CUDA error: out of memory")
        return super().activations(tokens)


def test_what_goes_wrong_in_the_background_is_raised_where_batches_are_taken(tmp_path: Path) -> None:
    live = open_live(live_source(tmp_path, model=FailingModel(HOOKS, dtype=torch.float32)))
    with pytest.raises(RuntimeError, match="out of memory"):
        take(live, TOKENS // 64)
    live.close()


def test_a_filter_that_leaves_too_few_rows_is_told(tmp_path: Path) -> None:
    live = open_live(live_source(tmp_path, max_norm_ratio=0.9))
    with pytest.raises(InvalidInput, match="raise maxNormRatio, or set it to 0") as caught:
        live.next_batch()
    assert caught.value.reason == "TooFewRows"
    live.close()


def test_closing_ends_the_thread(tmp_path: Path) -> None:
    live = open_live(live_source(tmp_path))
    live.next_batch()
    assert [thread for thread in threading.enumerate() if thread.name.startswith("live")]
    live.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("live")]


class GatedModel(LookupModel):
    """Tells when it has computed so many batches."""

    def __init__(self, batches: int) -> None:
        super().__init__(HOOKS, dtype=torch.float32)
        self.reached = threading.Event()
        self._batches = batches

    def activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        found = super().activations(tokens)
        if self.calls == self._batches:
            self.reached.set()
        return found


def test_shards_are_computed_ahead_within_the_bound(tmp_path: Path) -> None:
    """Beside those that are mixed, two; not the whole pass."""
    source = live_source(tmp_path, max_norm_ratio=0.0)
    per_shard = [-(-(plan.stop - plan.start) // 4) for plan in source.index.shards]
    assert len(set(per_shard[:-1])) == 1
    model = GatedModel(5 * per_shard[0])
    live = open_live(live_source(tmp_path, max_norm_ratio=0.0, model=model), mix_shards=3)
    live.next_batch()
    assert model.reached.wait(60), "nobody asked for the last two shards"
    live.close()
    assert model.calls == 5 * per_shard[0]
    assert len(per_shard) > 6


def test_an_unknown_hook_and_missing_contexts_are_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no activations of 'layer\.9' are computed; there are layer\.0, layer\.1"):
        open_live(live_source(tmp_path), hooks=["layer.9"])
    spec = cache_spec(tmp_path, hooks=HOOKS)
    with pytest.raises(InvalidInput, match="holds no contexts") as caught:
        LiveSource(FileStore(tmp_path / "nothing"), spec, LookupModel(HOOKS))
    assert caught.value.reason == "NotPrepared"
    with pytest.raises(InvalidInput, match=f"has {TOKENS} rows, fewer than the {TOKENS + 1} to hold out"):
        live_source(tmp_path).held_out_contexts(TOKENS + 1)


def test_processes_share_the_rows_of_a_live_source(tmp_path: Path) -> None:
    one = open_live(live_source(tmp_path), batch_size=64)
    two = [open_live(live_source(tmp_path), batch_size=32, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(10):
        whole = one.next_batch()["layer.0"]
        for rank, stream in enumerate(two):
            assert torch.equal(stream.next_batch()["layer.0"], whole[rank::2])
    for stream in (one, *two):
        stream.close()
