"""What the writer leaves: the right rows, shuffled, proved by a sidecar, within bounded memory."""

from __future__ import annotations

import hashlib
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from sae_job.activations.codecs import CODECS
from sae_job.activations.contexts import ContextReader
from sae_job.activations.format import HEADER, ShardLayout, layout_of_part, sidecar_key
from sae_job.activations.harvest import ContextBatch, Encoding, HostBatch, HostCopy, harvest
from sae_job.activations.manifest import Sidecar, read_manifest
from sae_job.activations.sink_filter import SinkFilter
from sae_job.activations.stored_parts import PartLayouts, proved_parts
from sae_job.activations.writer import ShardWriter, shards_in_memory
from sae_job.errors import InvalidInput
from sae_job.steps.cache import write_shards
from sae_job.steps.finalize import run_finalize
from sae_job.storage.base import ObjectInfo, StoreError
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_job.text.plan import CacheIndex, HookGroup
from sae_operator.api.activation_cache import Positions, Sampling, StorageDtype
from tests.caches import (
    BOS,
    VOCABULARY,
    LookupModel,
    cache_spec,
    cache_step,
    finished_cache,
    prepare_tokens,
    step_context,
)
from tests.faults import folder_bytes

WIDTH = 3


CODEC = CODECS["float32"]
ENCODING = Encoding(CODEC, {}, {0: SinkFilter(0, {"h": 1.5})}, {0: ["h"]})


def batch(values: list[int], *, below: list[bool] | None = None) -> HostBatch:
    """Rows whose activations tell their flat positions, in contexts of 10 tokens from context 0 on."""
    tokens = 100 + torch.arange(10 * (max(values) // 10 + 1), dtype=torch.int32).reshape(-1, 10)
    rows = torch.tensor(values, dtype=torch.float32).reshape(-1, 1).repeat(1, WIDTH)
    return HostBatch(
        ContextBatch(0, tokens, torch.tensor(values)), {"h": rows}, {} if below is None else {0: torch.tensor(below)}
    )


def layouts(rows: int = 6) -> dict[int, ShardLayout]:
    return {0: layout_of_part(rows, {"h": WIDTH}, CODEC)}


def writer_for(store: FileStore, **changes: Any) -> ShardWriter:
    arguments: dict[str, Any] = {
        "encoding": ENCODING,
        "seed": 5,
        "rows_per_shard": 6,
        "software": {"torch": "x"},
        "device": "cpu",
        "pause": lambda seconds: None,
    }
    return ShardWriter(store, **{**arguments, **changes})


def test_a_shard_holds_the_kept_rows_in_order_until_it_is_full_and_shuffled(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with writer_for(store) as writer:
        shard = writer.begin(0, 6, layouts())
        assert shard.add(batch([1, 2, 3], below=[True, False, True])) == 2
        assert shard.add(batch([10, 11], below=[False, False])) == 0
        assert shard.add(batch([20, 21, 22, 23, 24, 25, 26], below=[True, True, True, False, True, False, True])) == 4
        assert shard.full
        writer.finish(shard)
    data = store.get("shards/000000.safetensors")
    tensors = load(data)
    assert sorted(tensors["h"][:, 0].tolist()) == [1, 3, 20, 21, 22, 24]
    assert tensors["h"][:, 0].tolist() != [1, 3, 20, 21, 22, 24], "shuffled"
    assert torch.equal(tensors["h"][:, 0].int(), tensors["sequence"] * 10 + tensors["position"]), "aligned"
    assert torch.equal(tensors["token_ids"], 100 + tensors["h"][:, 0].int()), "aligned"

    sidecar = Sidecar.model_validate_json(store.get("shards/000000.json"))
    assert (sidecar.shard, sidecar.group, sidecar.rows, sidecar.bytes) == (0, 0, 6, len(data))
    assert sidecar.sha256 == hashlib.sha256(data).hexdigest()
    expected = {HEADER: data[: len(layouts()[0].header)]}
    expected |= {name: data[place.offset : place.offset + place.bytes] for name, place in layouts()[0].tensors.items()}
    assert sidecar.crc32 == {name: f"{zlib.crc32(piece):08x}" for name, piece in expected.items()}
    assert sum(len(piece) for piece in expected.values()) == len(data), "every byte is in one of them"
    assert sidecar.hooks["h"].sum == [91.0] * WIDTH
    assert sidecar.hooks["h"].calibration_median_norm == 1.5
    # 2; 10 and 11; 23: what comes after the row that fills the shard is not looked at.
    assert sidecar.dropped == 4


def test_memory_is_bounded_and_known(tmp_path: Path) -> None:
    """With two shards on their way, the fourth waits: three buffers are all there are."""
    release = threading.Event()
    entered = threading.Semaphore(0)

    class SlowStore(FileStore):
        def put(self, key: str, data: bytes | bytearray | memoryview, **conditions: object) -> ObjectInfo:
            entered.release()
            assert release.wait(60)
            return super().put(key, data)

    with writer_for(SlowStore(tmp_path), in_memory=3) as writer:
        buffers = set()
        for number in range(2):
            shard = writer.begin(number, 6, layouts())
            buffers.add(id(shard.buffer))
            shard.add(batch([1, 2, 3, 4, 5, 6]))
            writer.finish(shard)
        for _ in range(2):
            assert entered.acquire(timeout=60)
        third = writer.begin(2, 6, layouts())
        buffers.add(id(third.buffer))
        began: list[int] = []
        waiting = threading.Thread(target=lambda: began.append(id(writer.begin(3, 6, layouts()).buffer)))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        release.set()
        waiting.join(60)
        assert len(buffers) == 3
        assert began[0] in buffers
        assert writer.stored <= 2


def test_an_upload_that_keeps_failing_ends_the_work(tmp_path: Path) -> None:
    class DownStore(FileStore):
        puts = 0

        def put(self, key: str, data: bytes | bytearray | memoryview, **conditions: object) -> ObjectInfo:
            self.puts += 1
            raise StoreError("down")

    store = DownStore(tmp_path)
    pauses: list[float] = []
    writer = writer_for(store, pause=pauses.append)
    shard = writer.begin(0, 6, layouts())
    shard.add(batch([1, 2, 3, 4, 5, 6]))
    writer.finish(shard)
    with pytest.raises(StoreError, match="down"):
        writer.drain()
    assert (store.puts, pauses) == (4, [1.0, 2.0, 4.0])


def test_a_part_is_proved_by_its_sidecar_its_size_and_its_layout(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path, tokens=1000)
    index = CacheIndex.load(store)
    assert index is not None
    everything = range(len(manifest.shards))

    def proved(index: CacheIndex, dtype: str = "bfloat16") -> list[bool]:
        found = proved_parts(store, index, PartLayouts(index, CODECS[dtype]), everything)
        return [shard[0] is not None for shard in found]

    every = [True] * len(everything)
    assert proved(index) == every
    assert proved(index, "float16") == [False] * len(every), "as large, and in another format"
    other = index.model_copy(
        update={
            "groups": [HookGroup(hooks=["layer.9"])],
            "model": index.model.model_copy(update={"d_in": {"layer.9": 16}}),
        }
    )
    assert proved(other) == [False] * len(every), "as large, and of another hook"
    key, whole = manifest.shards[1].parts[0].key, store.get(manifest.shards[1].parts[0].key)
    store.put(key, whole[:-1])
    assert proved(index) == [True, False, *every[2:]], "cut short"
    store.put(key, whole)
    store.put(sidecar_key(key), b"{")
    assert proved(index) == [True, False, *every[2:]], "sidecar damaged"
    store.delete(sidecar_key(key))
    assert proved(index) == [True, False, *every[2:]], "sidecar missing"


@pytest.mark.parametrize(
    ("buffer_bytes", "shards"), [(None, 3), (2**20, 1), (2 * 2**20, 2), (5 * 2**20 - 1, 4), (2**10, 1), (2**40, 5)]
)
def test_the_buffer_decides_how_many_shards_are_held(buffer_bytes: int | None, shards: int) -> None:
    assert shards_in_memory(buffer_bytes, 2**20) == shards


def test_with_room_for_one_shard_it_is_stored_before_the_next_is_begun(tmp_path: Path) -> None:
    with writer_for(FileStore(tmp_path), in_memory=1) as writer:
        for number in range(3):
            shard = writer.begin(number, 6, layouts())
            assert writer.stored == number
            shard.add(batch([1, 2, 3, 4, 5, 6]))
            writer.finish(shard)
    assert writer.stored == 3


def test_harvest_gives_the_wanted_rows_encoded(tmp_path: Path) -> None:
    tokens = torch.tensor([[BOS, 4, 5], [BOS, 6, 7]], dtype=torch.int32)
    model = LookupModel({"a": WIDTH, "b": WIDTH})
    activations = {hook: values.reshape(-1, WIDTH) for hook, values in model.activations(tokens).items()}
    norms = activations["a"].float().norm(dim=1)
    filters = {0: SinkFilter(1.0, {"a": float(norms[4])}), 1: SinkFilter(0, {})}
    encoding = Encoding(CODEC, {}, filters, {0: ["a"], 1: ["b"]})
    contexts = [ContextBatch(7, tokens, torch.tensor([1, 4, 5])), ContextBatch(9, tokens, None)]
    some, every = list(harvest(model, iter(contexts), encoding=encoding, copies=HostCopy()))
    assert torch.equal(some.rows["a"], activations["a"][[1, 4, 5]].float())
    assert torch.equal(every.rows["b"], activations["b"].float())
    assert every.contexts.positions.tolist() == list(range(6))
    assert some.below.keys() == every.below.keys() == {0}, "a group without a filter has nothing to tell"
    assert every.below[0].tolist() == (norms <= norms[4]).tolist()
    (alone,) = harvest(model, iter(contexts[:1]), encoding=encoding.only([1]), copies=HostCopy())
    assert alone.rows.keys() == {"b"}


def test_rows_are_the_models_activations_of_their_tokens(tmp_path: Path) -> None:
    hooks = {"layer.0": 16, "layer.1": 4}
    store, manifest = finished_cache(tmp_path, hooks=hooks, tokens=1000)
    assert manifest.tokens == 1000
    assert [hook.d_in for hook in manifest.hooks] == [16, 4]
    index = CacheIndex.load(store)
    assert index is not None
    contexts = ContextReader(store, index).read(0, index.contexts)
    expected = LookupModel(hooks).activations(contexts)
    before = 0
    for entry in manifest.shards:
        tensors = load(store.get(entry.parts[0].key))
        assert (tensors["token_ids"] != BOS).all()
        assert int(tensors["sequence"].min()) >= entry.start
        assert int(tensors["sequence"].max()) < entry.stop
        assert entry.start == before
        before = entry.stop
        place = tensors["sequence"].long(), tensors["position"].long()
        assert torch.equal(tensors["token_ids"], contexts[place])
        for hook in hooks:
            assert torch.equal(tensors[hook], expected[hook][place])


def test_the_manifest_holds_exact_statistics_of_the_stored_rows(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path, tokens=1000)
    rows = torch.cat([load(store.get(entry.parts[0].key))["layer.0"] for entry in manifest.shards]).double()
    hook = manifest.hook("layer.0")
    assert hook.mean == pytest.approx(rows.mean(dim=0).tolist(), rel=1e-12)
    assert hook.mean_norm == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-12)
    assert manifest.bytes == sum(len(store.get(entry.parts[0].key)) for entry in manifest.shards)


def test_workers_share_the_shards_by_index(tmp_path: Path) -> None:
    spec = cache_spec(tmp_path / "shared", tokens=3000)
    step = cache_step(spec, completions=3)
    store = FileStore(path_of_file_uri(step.location.uri))
    prepare_tokens(store, spec, {"layer.0": 16})
    results = []
    for worker in range(3):
        context = step_context(completion_index=worker)
        results.append(write_shards(step, context, lambda _: LookupModel({"layer.0": 16}), device="cpu"))
        assert context.reporter.state.tokens == context.reporter.state.total_tokens == results[-1].tokens
        assert context.reporter.state.shards_complete == results[-1].shards_complete
    assert sum(result.tokens or 0 for result in results) == 3000
    run_finalize(step, step_context())
    alone, _ = finished_cache(tmp_path / "alone", tokens=3000)
    together = {name: data for name, data in folder_bytes(store.root).items() if name.startswith("shards/")}
    assert together == {name: data for name, data in folder_bytes(alone.root).items() if name.startswith("shards/")}


def test_more_tokens_extend_a_cache_and_leave_its_full_shards(tmp_path: Path) -> None:
    store, short = finished_cache(tmp_path, tokens=1000)
    before = folder_bytes(store.root)
    same, long = finished_cache(tmp_path, tokens=2500)
    assert same.root == store.root
    assert long.tokens == 2500
    full = [entry for entry in short.shards if entry.rows == short.rows_per_shard]
    assert long.shards[: len(full)] == full
    after = folder_bytes(store.root)
    assert all(after[name] == data for name, data in before.items() if name.startswith("shards/"))
    # Asking for fewer again finds the longer cache, and leaves it.
    again = finished_cache(tmp_path, tokens=1000)[1]
    assert again == long


def test_finalize_tells_which_shards_are_missing_or_cut(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path, tokens=3000)
    store.delete("manifest.json")
    store.delete(manifest.shards[1].parts[0].key)
    store.put(manifest.shards[2].parts[0].key, b"short")
    step = cache_step(cache_spec(tmp_path, tokens=3000))
    with pytest.raises(InvalidInput, match=r"lacks shards/000001.safetensors, shards/000002.safetensors, or") as caught:
        run_finalize(step, step_context())
    assert caught.value.reason == "ShardsMissing"
    assert store.head("manifest.json") is None


def test_finalize_twice_changes_nothing(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path, tokens=1000)
    before = store.head("manifest.json")
    result = run_finalize(cache_step(cache_spec(tmp_path, tokens=1000)), step_context())
    assert store.head("manifest.json") == before
    assert (result.tokens, result.bytes, result.shards_total) == (1000, manifest.bytes, len(manifest.shards))
    assert result.hooks is not None
    assert result.hooks[0].mean_norm == manifest.hook("layer.0").mean_norm


def test_too_many_sinks_are_told(tmp_path: Path) -> None:
    class SinkModel(LookupModel):
        def activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
            found = super().activations(tokens)
            # Every other position is a sink, but for the calibration batch.
            if self.calls > 1:
                found["layer.0"][:, ::2] *= 1000
            return found

    spec = cache_spec(tmp_path, tokens=1000, max_norm_ratio=10.0)
    step = cache_step(spec)
    prepare_tokens(FileStore(path_of_file_uri(step.location.uri)), spec, {"layer.0": 16})
    with pytest.raises(InvalidInput, match=r"leaves only \d+ of \d+ rows of shard 0") as caught:
        write_shards(step, step_context(), lambda _: SinkModel({"layer.0": 16}), device="cpu")
    assert (caught.value.reason, caught.value.field) == ("TooFewRows", "spec.sampling.maxNormRatio")


@pytest.mark.parametrize("dtype", ["float8", "int8"])
def test_rows_in_eight_bits_come_back_as_they_were_within_the_formats_bound(
    tmp_path: Path, dtype: StorageDtype
) -> None:
    hooks = {"layer.0": 16}
    store, manifest = finished_cache(tmp_path, hooks=hooks, tokens=1000, dtype=dtype)
    index = CacheIndex.load(store)
    assert index is not None
    contexts = ContextReader(store, index).read(0, index.contexts)
    expected = LookupModel(hooks, dtype=torch.float32).activations(contexts)["layer.0"]
    codec, read = manifest.codec, []
    for entry in manifest.shards:
        tensors = load(store.get(entry.parts[0].key))
        rows = {suffix: tensors["layer.0" + suffix] for suffix, _, _ in codec.row_tensors(16)}
        constants = {suffix: tensors["layer.0" + suffix] for suffix, _, _ in codec.constants(16)}
        read.append(codec.decode(rows, constants))
        true = expected[tensors["sequence"].long(), tensors["position"].long()]
        assert float((read[-1] - true).abs().max()) < (0.25 if dtype == "float8" else 0.05)
    everything = torch.cat(read).double()
    assert manifest.hook("layer.0").mean == pytest.approx(everything.mean(dim=0).tolist(), rel=1e-12)


def test_positions_and_tokens_that_are_left_out_never_become_rows(tmp_path: Path) -> None:
    spec = cache_spec(tmp_path, tokens=600)
    sampling = Sampling(max_norm_ratio=0, positions=Positions(start=2, stop=-3, step=2), exclude_token_ids=[5, 7])
    spec = spec.model_copy(update={"sampling": sampling})
    step = cache_step(spec)
    store = FileStore(path_of_file_uri(step.location.uri))
    index = prepare_tokens(store, spec, {"layer.0": 16}, contexts=200)
    model = LookupModel({"layer.0": 16})
    write_shards(step, step_context(), lambda _: model, device="cpu")
    run_finalize(step, step_context())
    tensors = [load(store.get(entry.parts[0].key)) for entry in read_manifest(store).shards]
    assert sum(len(part["position"]) for part in tensors) == 600
    assert {place for part in tensors for place in part["position"].tolist()} == {2, 4, 6, 8, 10, 12}
    tokens = {token for part in tensors for token in part["token_ids"].tolist()}
    assert tokens
    assert not tokens & {BOS, 5, 7}
    contexts = ContextReader(store, index).read(0, index.contexts)
    expected = LookupModel({"layer.0": 16}).activations(contexts)["layer.0"]
    for part in tensors:
        assert torch.equal(part["layer.0"], expected[part["sequence"].long(), part["position"].long()])


def test_only_excluded_positions_is_told(tmp_path: Path) -> None:
    spec = cache_spec(tmp_path, tokens=100, max_norm_ratio=10.0)
    step = cache_step(spec)
    store = FileStore(path_of_file_uri(step.location.uri))
    prepare_tokens(store, spec, {"layer.0": 16})
    blind = spec.model_copy(
        update={"sampling": Sampling(max_norm_ratio=10.0, exclude_token_ids=list(range(VOCABULARY)))}
    )
    with pytest.raises(InvalidInput, match="no position of any context may become a row"):
        write_shards(
            step.model_copy(update={"spec": blind}),
            step_context(),
            lambda _: LookupModel({"layer.0": 16}),
            device="cpu",
        )
