"""Hooks that are added to a cache: they have the rows of the first hooks, and what is there stays as it is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from sae_job.activations.codecs import CODECS
from sae_job.activations.format import KEEP, MANIFEST_KEY
from sae_job.activations.manifest import CacheManifest, read_manifest
from sae_job.activations.stored_parts import proved_groups
from sae_job.activations.verify import verify_cache
from sae_job.errors import InvalidInput
from sae_job.steps.cache import write_shards
from sae_job.steps.finalize import run_finalize
from sae_job.steps.hook_groups import shape_of
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_job.text.plan import INDEX_KEY, CacheIndex
from sae_operator.api.activation_cache import Dtype
from tests.caches import LookupModel, cache_spec, cache_step, prepare_tokens, step_context
from tests.faults import KILLED, FaultPlan, count_calls, folder_bytes, kill, run_in_child

WIDTHS = {"a": 16, "b": 16, "c": 4, "d": 16}
RATIO = 1.35
ROWS = 1000


class SparseModel(LookupModel):
    """Every hook is computed from its own name alone, whichever others there are."""

    def __init__(self, hooks: Mapping[str, int]) -> None:
        super().__init__({})
        self._parts = {hook: LookupModel({hook: hooks[hook]}, seed=ord(hook)) for hook in hooks}

    def activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {hook: model.activations(tokens)[hook] for hook, model in self._parts.items()}


@dataclass
class Cache:
    """A folder, and the steps on it: prepare's plan of groups, the worker, finalize."""

    root: Path
    dtype: Dtype = "bfloat16"
    ratio: float = RATIO
    models: list[SparseModel] = field(default_factory=list)

    def step(self, hooks: str, tokens: int = ROWS):
        spec = cache_spec(
            self.root,
            hooks={hook: WIDTHS[hook] for hook in hooks},
            tokens=tokens,
            dtype=self.dtype,
            max_norm_ratio=self.ratio,
        )
        return cache_step(spec)

    @property
    def store(self) -> FileStore:
        return FileStore(path_of_file_uri(self.step("a").location.uri))

    def prepare(self, hooks: str, tokens: int = ROWS) -> None:
        spec, store = self.step(hooks, tokens).spec, self.store
        finished = None if store.head("manifest.json") is None else read_manifest(store)
        earlier = CacheIndex.load(store)
        proved = set() if earlier is None else proved_groups(store, earlier, CODECS[self.dtype])
        shape = shape_of(spec, {hook: WIDTHS[hook] for hook in hooks}, earlier, finished, proved=proved)
        longer = spec.model_copy(update={"tokens": shape.tokens})
        prepare_tokens(store, longer, shape.d_in, contexts=1000, groups=shape.groups)

    def work(self, hooks: str, tokens: int = ROWS, plan: FaultPlan | None = None) -> None:
        def load_model(index: CacheIndex) -> SparseModel:
            self.models.append(SparseModel(index.model.d_in))
            return self.models[-1]

        step = self.step(hooks, tokens)
        context = step_context(open_store=lambda _: self.store if plan is None else plan.wrap(self.store))
        write_shards(step, context, load_model, device="cpu")
        run_finalize(step, context)

    def build(self, hooks: str, tokens: int = ROWS) -> CacheManifest:
        self.prepare(hooks, tokens)
        self.work(hooks, tokens)
        return read_manifest(self.store)

    def part(self, manifest: CacheManifest, shard: int, group: int = 0) -> dict[str, torch.Tensor]:
        return load(self.store.get(manifest.shards[shard].parts[group].key))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_what_is_there_is_left_and_listed_as_before(cache: Cache) -> None:
    before = cache.build("a")
    objects = {info.key: info.etag for info in cache.store.list("shards/")}
    after = cache.build("ab")
    assert {info.key: info.etag for info in cache.store.list("shards/")}.items() >= objects.items()
    assert [group.hooks for group in after.groups] == [["a"], ["b"]]
    assert after.hook("a") == before.hook("a")
    assert [entry.parts[0] for entry in after.shards] == [entry.parts[0] for entry in before.shards]
    assert after.shard_bytes == before.shard_bytes, "so readers mix as many shards as before"
    assert [entry.parts[1].key for entry in after.shards][:2] == [
        "shards/000000.g1.safetensors",
        "shards/000001.g1.safetensors",
    ]
    assert after.bytes == sum(len(cache.store.get(part.key)) for entry in after.shards for part in entry.parts)
    assert after.spec["hooks"] == [{"name": "a"}, {"name": "b"}]
    assert after.tokens == before.tokens == ROWS


def test_added_rows_are_those_of_a_cache_with_that_hook_alone(cache: Cache, tmp_path: Path) -> None:
    cache.build("a")
    both = cache.build("ab")
    alone = Cache(tmp_path / "alone")
    only = alone.build("b")
    compared = 0
    for shard in range(len(both.shards)):
        base, added, there = cache.part(both, shard), cache.part(both, shard, 1), alone.part(only, shard)
        places = {
            place: row
            for row, place in enumerate(zip(there["sequence"].tolist(), there["position"].tolist(), strict=True))
        }
        for row, place in enumerate(zip(base["sequence"].tolist(), base["position"].tolist(), strict=True)):
            if place in places:
                assert added[KEEP][row] == 1, "what the cache of b keeps is kept"
                assert torch.equal(added["b"][row], there["b"][places[place]])
                compared += 1
    assert compared > ROWS // 2


def test_rows_above_the_ratio_at_the_added_hook_are_marked_and_count_for_nothing(cache: Cache) -> None:
    cache.build("a")
    manifest = cache.build("ab")
    hook = manifest.hook("b")
    assert hook.calibration_median_norm is not None
    kept, dropped = [], 0
    for shard in range(len(manifest.shards)):
        part = cache.part(manifest, shard, 1)
        norms = part["b"].float().norm(dim=1)
        assert torch.equal(part[KEEP].bool(), norms <= RATIO * hook.calibration_median_norm)
        kept.append(part["b"][part[KEEP].bool()].double())
        dropped += int((part[KEEP] == 0).sum())
    rows = torch.cat(kept)
    assert dropped > 0, "or there is nothing to tell"
    assert hook.rows == len(rows) == ROWS - dropped
    assert hook.mean == pytest.approx(rows.mean(dim=0).tolist(), rel=1e-12)
    assert hook.mean_norm == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-12)
    assert hook.mean_squared_norm == pytest.approx(float(rows.norm(dim=1).square().mean()), rel=1e-12)
    assert manifest.hook("a").rows == ROWS


def test_one_after_the_other_or_more_tokens_at_once_end_in_the_same_parts(cache: Cache, tmp_path: Path) -> None:
    """Forward passes are the same whichever hooks they are for."""
    cache.build("a")
    cache.build("ab")
    cache.build("ab", 2 * ROWS)
    other = Cache(tmp_path / "other")
    other.build("a")
    manifest = other.build("ab", 2 * ROWS)
    listed = {part.key for entry in manifest.shards for part in entry.parts}
    first, second = folder_bytes(cache.store.root), folder_bytes(other.store.root)
    assert {key: first[key] for key in listed} == {key: second[key] for key in listed}
    assert read_manifest(cache.store) == manifest.model_copy(update={"spec": read_manifest(cache.store).spec})
    assert manifest.tokens == 2 * ROWS
    assert all(len(entry.parts) == 2 for entry in manifest.shards)


def test_more_hooks_are_added_for_all_rows_there_are(cache: Cache) -> None:
    cache.build("a", 2 * ROWS)
    manifest = cache.build("abc", ROWS)
    assert manifest.tokens == 2 * ROWS
    assert [group.hooks for group in manifest.groups] == [["a"], ["b", "c"]]
    assert manifest.group_of("c") == 1


def test_more_tokens_for_one_hook_extend_all(cache: Cache) -> None:
    cache.build("a")
    cache.build("ab")
    manifest = cache.build("a", 2 * ROWS)
    assert {hook.name for hook in manifest.hooks} == {"a", "b"}
    assert manifest.tokens == 2 * ROWS
    assert all(len(entry.parts) == 2 for entry in manifest.shards)


def test_a_hook_of_another_width_is_added_without_changing_the_rows_of_a_shard(cache: Cache) -> None:
    before = cache.build("a")
    after = cache.build("ac")
    assert after.rows_per_shard == before.rows_per_shard
    assert [entry.rows for entry in after.shards] == [entry.rows for entry in before.shards]
    assert cache.part(after, 0, 1)["c"].shape == (before.rows_per_shard, 4)


def test_only_missing_parts_are_computed(cache: Cache) -> None:
    cache.build("a")
    manifest = cache.build("ab")
    whole = folder_bytes(cache.store.root)
    cache.store.delete(manifest.shards[1].parts[1].key)
    cache.models.clear()
    plan = FaultPlan()
    cache.work("ab", plan=plan)
    assert folder_bytes(cache.store.root) == whole
    puts = [name.removeprefix("put ") for name in plan.names if name.startswith("put")]
    assert puts == ["shards/000001.g1.safetensors", "shards/000001.g1.json"]
    cache.models.clear()
    cache.work("ab")
    assert cache.models == []


def test_added_rows_of_other_base_rows_are_no_proof(cache: Cache, tmp_path: Path) -> None:
    """A part follows the rows of one base part; beside another one it is written again."""
    cache.build("a")
    cache.build("ab")
    expected = folder_bytes(cache.store.root)
    other = Cache(tmp_path / "other")
    other.build("d")
    manifest = other.build("db")
    for entry in manifest.shards:
        if cache.store.head(entry.parts[1].key) is not None:
            for key in (entry.parts[1].key, entry.parts[1].key.replace(".safetensors", ".json")):
                cache.store.put(key, other.store.get(key))
    cache.work("ab")
    assert folder_bytes(cache.store.root) == expected


def test_a_damaged_base_part_is_told(cache: Cache) -> None:
    manifest = cache.build("a")
    key = manifest.shards[0].parts[0].key
    data = bytearray(cache.store.get(key))
    data[manifest.layout(manifest.shards[0], 0).tensors["sequence"].offset] ^= 1
    cache.store.put(key, data)
    cache.prepare("ab")
    with pytest.raises(InvalidInput, match=r"shards/000000\.safetensors differs from its checksum .*sequence"):
        cache.work("ab")


def test_finalize_names_the_missing_parts_of_every_group(cache: Cache) -> None:
    cache.build("a")
    cache.prepare("ab")
    with pytest.raises(InvalidInput, match=r"lacks shards/000000\.g1\.safetensors, shards/000001\.g1"):
        run_finalize(cache.step("ab"), step_context())
    assert [group.hooks for group in read_manifest(cache.store).groups] == [["a"]]


def test_a_plan_that_lacks_what_is_asked_for_is_told(cache: Cache) -> None:
    cache.build("a")
    for step in (cache.step("ab"), cache.step("a", 2 * ROWS)):
        with pytest.raises(InvalidInput, match=r"planned .* anew") as caught:
            run_finalize(step, step_context())
        assert caught.value.reason == "PlanChanged"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_killed_between_parts_ends_in_the_same_bytes(tmp_path: Path, when) -> None:
    """Hooks and tokens at once: some shards get one part, some both."""

    cache = Cache(tmp_path / "cache")
    cache.build("a", 500)
    cache.prepare("ab", 800)
    folder, pristine = cache.store.root, tmp_path / "pristine"
    shutil.copytree(folder, pristine)
    calls = count_calls(lambda plan: cache.work("ab", 800, plan))
    expected = folder_bytes(folder)
    assert calls > 20
    for number in range(1, calls + 1):
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
        assert run_in_child(lambda n=number: cache.work("ab", 800, FaultPlan(n, kill, when))) == KILLED
        cache.work("ab", 800)
        assert folder_bytes(folder) == expected, f"after a kill {when} call {number}"


def test_an_unfinished_cache_keeps_groups_that_are_asked_for_and_drops_others(cache: Cache) -> None:
    cache.prepare("a")
    cache.prepare("ab")
    index = CacheIndex.load(cache.store)
    assert index is not None
    assert [group.hooks for group in index.groups] == [["a"], ["b"]]
    cache.prepare("ac")
    index = CacheIndex.load(cache.store)
    assert index is not None
    assert [group.hooks for group in index.groups] == [["a"], ["c"]]
    cache.prepare("b")
    index = CacheIndex.load(cache.store)
    assert index is not None
    assert [group.hooks for group in index.groups] == [["b"]]


def test_what_was_finished_stays_when_its_manifest_is_deleted_to_be_written_again(cache: Cache) -> None:
    cache.build("a", 2 * ROWS)
    manifest = cache.build("ab", ROWS)
    cache.store.delete(MANIFEST_KEY)
    cache.models.clear()
    assert cache.build("a", ROWS) == manifest
    assert cache.models == [], "no row is computed again"


def test_of_what_was_finished_hooks_stay_that_are_not_asked_for_and_others_come_after_them(cache: Cache) -> None:
    before = cache.build("a")
    cache.store.delete(MANIFEST_KEY)
    after = cache.build("c", ROWS // 2)
    assert [group.hooks for group in after.groups] == [["a"], ["c"]]
    assert (after.tokens, after.hook("a")) == (ROWS, before.hook("a"))


def test_a_group_that_lacks_one_part_of_many_does_not_stay_in_the_way(cache: Cache) -> None:
    manifest = cache.build("ab")
    cache.build("abc")
    for key in (MANIFEST_KEY, manifest.shards[-1].parts[0].key.replace(".safetensors", ".g1.safetensors")):
        cache.store.delete(key)
    assert [group.hooks for group in cache.build("a").groups] == [["a", "b"]]


@pytest.mark.parametrize(("begun", "first", "second"), [("", "a", "b"), ("a", "ab", "ad"), ("a", "ab", "abd")])
def test_a_worker_leaves_what_another_plan_wrote_meanwhile(cache: Cache, begun: str, first: str, second: str) -> None:
    """All of these hooks have one width: files of both plans have the same names, and may have the same sizes."""
    if begun:
        cache.build(begun)
    cache.prepare(first)

    def meanwhile(index: CacheIndex) -> SparseModel:
        cache.build(second)
        return SparseModel(index.model.d_in)

    with pytest.raises(InvalidInput, match=r"planned .* anew, for other hooks") as caught:
        write_shards(cache.step(first), step_context(), meanwhile, device="cpu")
    assert caught.value.reason == "PlanChanged"
    found = verify_cache(cache.store)
    assert (found.finished, found.problems) == (True, [])


def test_a_worker_goes_on_when_more_is_planned_meanwhile(cache: Cache) -> None:
    cache.prepare("a", 500)

    def meanwhile(index: CacheIndex) -> SparseModel:
        cache.prepare("ab", 800)
        return SparseModel(index.model.d_in)

    write_shards(cache.step("a", 500), step_context(), meanwhile, device="cpu")
    there = {info.key for info in cache.store.list("shards/")}
    assert {"shards/000000.json", "shards/000001-128.json"} <= there
    cache.work("ab", 800)
    found = verify_cache(cache.store)
    assert (found.finished, found.problems, found.rows) == (True, [], 800)


def test_a_worker_ends_when_its_cache_is_taken_away(cache: Cache) -> None:
    cache.prepare("a")

    def meanwhile(index: CacheIndex) -> SparseModel:
        cache.store.delete(INDEX_KEY)
        return SparseModel(index.model.d_in)

    with pytest.raises(InvalidInput, match="or it was removed"):
        write_shards(cache.step("a"), step_context(), meanwhile, device="cpu")
    assert list(cache.store.list("shards/")) == []


def test_memory_is_needed_for_the_parts_that_are_written_alone(cache: Cache) -> None:
    """12 bytes tell a row of group 0 apart, one whether to keep a row of a later group; bfloat16 takes two a value."""
    manifest = cache.build("ab")

    def row_bytes(hooks: str, tokens: int) -> int:
        spec = cache.step(hooks, tokens).spec
        shape = shape_of(spec, WIDTHS, CacheIndex.load(cache.store), manifest)
        return shape.missing_row_bytes("bfloat16", manifest)

    assert row_bytes("abc", ROWS) == 2 * WIDTHS["c"] + 1
    assert row_bytes("abc", 2 * ROWS) == 2 * (WIDTHS["a"] + WIDTHS["b"] + WIDTHS["c"]) + 12 + 1
    assert row_bytes("a", 2 * ROWS) == 2 * (WIDTHS["a"] + WIDTHS["b"]) + 12
