"""What the writer leaves: the right rows, shuffled, proved by a sidecar, within bounded memory."""

from __future__ import annotations

import hashlib
import threading
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from sae_job.activations.contexts import ContextReader
from sae_job.activations.harvest import HostBatch, HostCopy, harvest
from sae_job.activations.manifest import Sidecar
from sae_job.activations.sink_filter import SinkFilter
from sae_job.activations.writer import ShardWriter, is_stored
from sae_job.errors import InvalidInput
from sae_job.steps.cache import write_shards
from sae_job.steps.finalize import run_finalize
from sae_job.storage.base import ObjectInfo, StoreError
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_job.text.plan import CacheIndex
from tests.caches import BOS, LookupModel, cache_spec, cache_step, finished_cache, prepare_tokens, step_context
from tests.faults import folder_bytes

WIDTH = 3


def batch(values: list[float], *, usable: list[bool] | None = None, keep: list[bool] | None = None) -> HostBatch:
    count = len(values)
    usable_tensor = torch.tensor(usable or [True] * count)
    return HostBatch(
        activations={"h": torch.tensor(values, dtype=torch.float32).reshape(-1, 1).repeat(1, WIDTH)},
        token_ids=torch.arange(count, dtype=torch.int32),
        sequence=torch.tensor([int(value) // 10 for value in values], dtype=torch.int32),
        position=torch.tensor([int(value) % 10 for value in values], dtype=torch.int32),
        usable=usable_tensor,
        keep=usable_tensor if keep is None else usable_tensor & torch.tensor(keep),
    )


def writer_for(store: FileStore, **changes: object) -> ShardWriter:
    arguments: dict[str, object] = {
        "hooks": {"h": WIDTH},
        "dtype": torch.float32,
        "seed": 5,
        "rows_per_shard": 6,
        "software": {"torch": "x"},
        "device": "cpu",
        "pause": lambda seconds: None,
    }
    return ShardWriter(store, **{**arguments, **changes})  # pyright: ignore[reportArgumentType]


def test_a_shard_holds_the_kept_rows_in_order_until_it_is_full_and_shuffled(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with writer_for(store) as writer:
        shard = writer.begin(0, 6)
        assert shard.add(batch([0, 1, 2, 3], usable=[False, True, True, True], keep=[True, True, False, True])) == 2
        assert shard.add(batch([10, 11], keep=[False, False])) == 0
        assert shard.add(batch([20, 21, 22, 23, 24, 25], keep=[True, True, True, False, True, False])) == 4
        assert shard.full
        writer.finish(shard, {"h": 1.5})
    data = store.get("shards/000000.safetensors")
    tensors = load(data)
    assert sorted(tensors["h"][:, 0].tolist()) == [1, 3, 20, 21, 22, 24]
    assert tensors["h"][:, 0].tolist() != [1, 3, 20, 21, 22, 24], "shuffled"
    assert torch.equal(tensors["h"][:, 0].int(), tensors["sequence"] * 10 + tensors["position"]), "aligned"

    sidecar = Sidecar.model_validate_json(store.get("shards/000000.json"))
    assert (sidecar.shard, sidecar.rows, sidecar.bytes) == (0, 6, len(data))
    assert sidecar.sha256 == hashlib.sha256(data).hexdigest()
    assert sidecar.crc32 == f"{zlib.crc32(data):08x}"
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

    with writer_for(SlowStore(tmp_path), in_flight=2) as writer:
        buffers = set()
        for number in range(2):
            shard = writer.begin(number, 6)
            buffers.add(id(shard.buffer))
            shard.add(batch([1, 2, 3, 4, 5, 6]))
            writer.finish(shard, {})
        for _ in range(2):
            assert entered.acquire(timeout=60)
        third = writer.begin(2, 6)
        buffers.add(id(third.buffer))
        began: list[int] = []
        waiting = threading.Thread(target=lambda: began.append(id(writer.begin(3, 6).buffer)))
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
    shard = writer.begin(0, 6)
    shard.add(batch([1, 2, 3, 4, 5, 6]))
    writer.finish(shard, {})
    with pytest.raises(StoreError, match="down"):
        writer.drain()
    assert (store.puts, pauses) == (4, [1.0, 2.0, 4.0])


def test_a_shard_is_proved_by_its_sidecar_and_its_size(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with writer_for(store) as writer:
        shard = writer.begin(0, 6)
        shard.add(batch([1, 2, 3, 4, 5, 6]))
        writer.finish(shard, {})
    key = "shards/000000.safetensors"
    assert is_stored(store, 0, 6, 6)
    assert not is_stored(store, 0, 5, 6)
    assert not is_stored(store, 1, 6, 6)
    whole = store.get(key)
    store.put(key, whole[:-1])
    assert not is_stored(store, 0, 6, 6), "cut short"
    store.put(key, whole)
    store.put("shards/000000.json", b"{")
    assert not is_stored(store, 0, 6, 6), "sidecar damaged"


def test_harvest_gives_every_position_with_its_context(tmp_path: Path) -> None:
    tokens = torch.tensor([[BOS, 4, 5], [BOS, 6, 7]], dtype=torch.int32)
    model = LookupModel({"h": WIDTH})
    (found,) = harvest(
        model,
        iter([(7, tokens)]),
        sink_filter=SinkFilter(0, {}),
        excluded=[BOS],
        dtype=torch.float32,
        copies=HostCopy(),
    )
    assert found.token_ids.tolist() == [0, 4, 5, 0, 6, 7]
    assert found.sequence.tolist() == [7, 7, 7, 8, 8, 8]
    assert found.position.tolist() == [0, 1, 2, 0, 1, 2]
    assert found.keep.tolist() == [False, True, True, False, True, True]
    assert torch.equal(found.activations["h"], model.activations(tokens)["h"].reshape(-1, WIDTH).float())


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
        tensors = load(store.get(entry.key))
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
    rows = torch.cat([load(store.get(entry.key))["layer.0"] for entry in manifest.shards]).double()
    hook = manifest.hook("layer.0")
    assert hook.mean == pytest.approx(rows.mean(dim=0).tolist(), rel=1e-12)
    assert hook.mean_norm == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-12)
    assert manifest.bytes == sum(len(store.get(entry.key)) for entry in manifest.shards)


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
    store.delete(manifest.shards[1].key)
    store.put(manifest.shards[2].key, b"short")
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
