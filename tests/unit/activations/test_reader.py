"""What training reads: full batches of mixed rows, each row once an epoch, resumable exactly, held-out rows apart."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from sae_job.activations.format import parse_layout
from sae_job.activations.manifest import CacheManifest
from sae_job.activations.reader import (
    CachedActivations,
    default_mix_shards,
    held_out_contexts_for,
    reader_memory_bytes,
)
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectStore
from sae_job.storage.file_store import FileStore
from sae_operator.api.activation_cache import StorageDtype
from tests.caches import finished_cache
from tests.faults import FaultPlan, FaultyStore, fail

Cache = tuple[ObjectStore, CacheManifest]
HOOK = "layer.0"
ROWS = 2000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return finished_cache(tmp_path_factory.mktemp("cache"), tokens=ROWS, dtype="float32")


def test_as_many_shards_are_mixed_as_two_gibibytes_hold() -> None:
    mixed = {size: default_mix_shards(size) for size in (2**12, 2**26, 2**28, 2**29, 2**30, 2**34)}
    assert mixed == {2**12: 128, 2**26: 32, 2**28: 8, 2**29: 4, 2**30: 2, 2**34: 2}
    assert reader_memory_bytes(2**40, 2**28) == 8 * 2**28 + 2**29
    assert reader_memory_bytes(2**40, 2**30) == 3 * 2**30, "one shard is read ahead, however large it is"
    assert reader_memory_bytes(2**20, 2**28) == 2**20
    assert reader_memory_bytes(2**40, 2**28, read_bytes=2**32) == 9 * 2**32, "many hooks were added"
    assert reader_memory_bytes(2**40, 2**28, read_bytes=2**26) == 8 * 2**26 + 2**29, "one hook of several is read"


def open_reader(cache: Cache, **changes: object) -> CachedActivations:
    arguments: dict[str, object] = {
        "hooks": [HOOK],
        "batch_size": 64,
        "seed": 1,
        "held_out_contexts": 0,
        "mix_shards": 3,
        "read_ahead_bytes": 2**16,
    }
    return CachedActivations.open(cache[0], **{**arguments, **changes})  # pyright: ignore[reportArgumentType]


def keys(rows: torch.Tensor) -> list[bytes]:
    """What tells rows apart: in float32 no two rows of the test's model are equal."""
    return [row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows]


def all_rows(cache: Cache, name: str = HOOK) -> torch.Tensor:
    return torch.cat([load(cache[0].get(entry.parts[0].key))[name] for entry in cache[1].shards])


def take(reader: CachedActivations, batches: int) -> torch.Tensor:
    return torch.cat([reader.next_batch()[HOOK] for _ in range(batches)])


@pytest.mark.parametrize("mix", [1, 3, 100])
def test_an_epoch_reads_every_row_once_and_the_next_one_in_another_order(cache: Cache, mix: int) -> None:
    reader = open_reader(cache, batch_size=ROWS // 20, mix_shards=mix)
    first, second = take(reader, 20), take(reader, 20)
    assert reader.training_rows == ROWS
    assert Counter(keys(first)) == Counter(keys(second)) == Counter(keys(all_rows(cache)))
    assert not torch.equal(first, second)
    reader.close()


def test_batches_are_full_across_epochs(cache: Cache) -> None:
    reader = open_reader(cache, batch_size=999)
    epochs = []
    for _ in range(6):
        assert reader.next_batch()[HOOK].shape == (999, 16)
        epochs.append(reader.epoch)
    assert epochs == [0, 0, 1, 1, 2, 2]
    reader.close()


def test_a_batch_may_be_larger_than_an_epoch(cache: Cache) -> None:
    reader = open_reader(cache, batch_size=3 * ROWS)
    assert Counter(keys(reader.next_batch()[HOOK])) == Counter(keys(all_rows(cache)) * 3)
    reader.close()


def test_the_order_is_a_function_of_the_seed(cache: Cache) -> None:
    batches = {}
    for name, changes in {
        "one": {},
        "again": {"read_ahead_bytes": 0},
        "other seed": {"seed": 2},
    }.items():
        reader = open_reader(cache, **changes)
        batches[name] = take(reader, 70)
        reader.close()
    assert torch.equal(batches["one"], batches["again"]), "reading ahead has no part in it"
    assert not torch.equal(batches["one"], batches["other seed"])


def test_a_batch_mixes_shards(cache: Cache) -> None:
    home = {
        key: number
        for number, entry in enumerate(cache[1].shards)
        for key in keys(load(cache[0].get(entry.parts[0].key))[HOOK])
    }
    reader = open_reader(cache, batch_size=128)
    for _ in range(ROWS // 128):
        shards = Counter(home[key] for key in keys(reader.next_batch()[HOOK]))
        assert len(shards) >= 2
        assert max(shards.values()) < 120
    reader.close()


@pytest.mark.parametrize("hooks", [["layer.1"], ["layer.1", "layer.0"]])
def test_hooks_are_read_aligned(tmp_path: Path, hooks: list[str]) -> None:
    cache = finished_cache(tmp_path, hooks={"layer.0": 16, "layer.1": 8}, tokens=500, dtype="float32")
    pairs = dict(zip(keys(all_rows(cache, "layer.1")), keys(all_rows(cache, "layer.0")), strict=True))
    reader = open_reader(cache, hooks=hooks)
    batch = reader.next_batch()
    assert list(batch) == hooks
    if len(hooks) == 2:
        assert [pairs[key] for key in keys(batch["layer.1"])] == keys(batch["layer.0"])
    reader.close()


@pytest.mark.parametrize("before", [0, 1, 3, 17, 31, 32, 65])
@pytest.mark.parametrize("mix", [2, 100])
def test_a_restored_reader_continues_exactly(cache: Cache, before: int, mix: int) -> None:
    reader = open_reader(cache, mix_shards=mix, held_out_contexts=5)
    take(reader, before) if before else None
    state = json.loads(json.dumps(reader.state()))
    expected = take(reader, 40)
    other = open_reader(cache, mix_shards=mix, held_out_contexts=5)
    other.next_batch()
    other.restore(state)
    assert torch.equal(take(other, 40), expected)
    assert other.state() == reader.state()
    reader.close()
    other.close()


def test_a_state_of_another_order_is_refused(cache: Cache) -> None:
    reader = open_reader(cache)
    state = reader.state()
    other = open_reader(cache, seed=2)
    with pytest.raises(InvalidInput, match="reading with seed 1, not 2"):
        other.restore(state)
    reader.close()
    other.close()


def test_held_out_rows_are_never_in_a_batch(cache: Cache) -> None:
    contexts = held_out_contexts_for(cache[0], cache[1], 300)
    reader = open_reader(cache, held_out_contexts=contexts)
    held = reader.held_out(10_000)
    assert reader.training_rows == ROWS - len(held.sequence)
    everything = take(reader, 2 * (reader.training_rows // 64 + 1))
    assert not set(keys(held.activations[HOOK])) & set(keys(everything))
    assert set(keys(held.activations[HOOK])) | set(keys(everything)) == set(keys(all_rows(cache)))
    reader.close()


def test_held_out_rows_come_in_order_of_their_context_and_position(cache: Cache) -> None:
    reader = open_reader(cache, held_out_contexts=20)
    held = reader.held_out(10_000)
    place = (held.sequence * 16 + held.position).tolist()
    assert place == sorted(set(place))
    assert int(held.sequence.max()) == 19
    assert len(held.token_ids) == int((all_rows(cache, "sequence") < 20).sum())
    fewer = reader.held_out(33)
    assert torch.equal(fewer.activations[HOOK], held.activations[HOOK][:33])
    assert reader.held_out(0).activations[HOOK].shape == (0, 16)
    reader.close()


def test_looking_at_held_out_rows_does_not_move_the_reader(cache: Cache) -> None:
    plain, looking = (open_reader(cache, held_out_contexts=30) for _ in range(2))
    for _ in range(40):
        assert torch.equal(plain.next_batch()[HOOK], looking.next_batch()[HOOK])
        looking.held_out(50)
    plain.close()
    looking.close()


@pytest.mark.parametrize(
    ("rows", "contexts"), [(0, 0), (1, 1), (15, 1), (16, 2), (300, None), (450, None), (1500, None)]
)
def test_the_fewest_contexts_that_hold_so_many_rows(cache: Cache, rows: int, contexts: int | None) -> None:
    sequence = all_rows(cache, "sequence")
    found = held_out_contexts_for(cache[0], cache[1], rows)
    assert contexts is None or found == contexts
    assert int((sequence < found).sum()) >= rows
    assert found == 0 or int((sequence < found - 1).sum()) < rows


def test_holding_out_more_rows_than_there_are_is_refused(cache: Cache) -> None:
    with pytest.raises(InvalidInput, match="has 2000 rows, fewer than the 2001 to hold out"):
        held_out_contexts_for(*cache, ROWS + 1)
    with pytest.raises(InvalidInput, match="no rows are left to train on"):
        open_reader(cache, held_out_contexts=10**6)


def test_only_the_first_rows_are_read_when_fewer_are_asked_for(cache: Cache) -> None:
    reader = open_reader(cache, total_rows=500, batch_size=250)
    assert reader.training_rows == 500
    assert Counter(keys(take(reader, 2))) == Counter(keys(all_rows(cache)[:500]))
    reader.close()


def test_an_unknown_hook_is_told_with_the_nearest(cache: Cache) -> None:
    with pytest.raises(InvalidInput, match=r"no activations of 'layer\.00'; nearest: layer\.0") as caught:
        open_reader(cache, hooks=["layer.00"])
    assert caught.value.reason == "HookNotFound"


def test_an_unfinished_cache_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"holds no finished cache: it has no manifest.json") as caught:
        open_reader((FileStore(tmp_path), None))  # pyright: ignore[reportArgumentType]
    assert caught.value.reason == "CacheNotFound"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "CorruptManifest"),
        (b'{"formatVersion": 1}', "CorruptManifest"),
        (b'{"formatVersion": 9}', "UnknownFormat"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_told(tmp_path: Path, data: bytes, reason: str) -> None:
    store = FileStore(tmp_path)
    store.put("manifest.json", data)
    with pytest.raises(InvalidInput) as caught:
        CachedActivations.open(store, hooks=[HOOK], batch_size=1, seed=0, held_out_contexts=0)
    assert caught.value.reason == reason


class BytesPlan(FaultyStore):
    """Counts the bytes that are read."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store, FaultPlan())
        self.bytes = 0

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        self.bytes += len(buffer)
        return super().read_into(key, start, buffer)


def read_until_error(cache: Cache, **changes: object) -> InvalidInput:
    reader = open_reader(cache, **changes)
    with pytest.raises(InvalidInput) as caught:
        take(reader, ROWS // 64 + 1)
    reader.close()
    return caught.value


@pytest.fixture(params=[True, False], ids=["mapped", "fetched"])
def wrap(request: pytest.FixtureRequest) -> Callable[[FileStore], ObjectStore]:
    """Files are mapped; of other stores, ranges are fetched."""
    return (lambda store: store) if request.param else FaultPlan().wrap


@pytest.mark.parametrize("place", [0, 1001, -1])
def test_a_flipped_bit_in_what_is_read_is_found(
    tmp_path: Path, wrap: Callable[[FileStore], ObjectStore], place: int
) -> None:
    """At both ends of the hook's rows, and between."""
    store, manifest = finished_cache(tmp_path, tokens=1000)
    part = manifest.shards[1].parts[0]
    rows = parse_layout(store.get(part.key)).tensors[HOOK]
    data = bytearray(store.get(part.key))
    data[rows.offset + place % rows.bytes] ^= 1
    store.put(part.key, data)
    error = read_until_error((wrap(store), manifest))
    assert error.reason == "CorruptShard"
    assert f"{part.key} is corrupt (the CRC-32 of tensor 'layer.0' differs" in error.message
    assert "delete it and its .json, and raise the cache's spec.retry" in error.message


def test_what_is_not_read_is_not_looked_at(tmp_path: Path) -> None:
    """Of a hook of many, its own bytes are read and nothing else."""
    hooks = {"layer.0": 16, "layer.1": 8, "layer.2": 16}
    store, manifest = finished_cache(tmp_path, hooks=hooks, tokens=1000, dtype="float32")
    expected = open_reader((store, manifest), hooks=["layer.1"])
    plan = BytesPlan(store)
    for entry in manifest.shards:
        data = bytearray(store.get(entry.parts[0].key))
        mine = parse_layout(bytes(data)).tensors["layer.1"]
        for place in range(len(data)):
            if not mine.offset <= place < mine.offset + mine.bytes:
                data[place] ^= 255
        store.put(entry.parts[0].key, data)
    for source in (store, plan):
        reader = open_reader((source, manifest), hooks=["layer.1"])
        for _ in range(1000 // 64):
            assert torch.equal(reader.next_batch()["layer.1"], expected.next_batch()["layer.1"])
        reader.close()
        expected.restore(expected.state() | {"epoch": 0, "phase": 0, "offset": 0})
    assert plan.bytes == 1000 * 8 * 4
    expected.close()


def test_a_shard_that_changes_between_epochs_is_found(tmp_path: Path, wrap: Callable[[FileStore], ObjectStore]) -> None:
    store, manifest = finished_cache(tmp_path, tokens=1000)
    reader = open_reader((wrap(store), manifest), mix_shards=1, read_ahead_bytes=0)
    take(reader, 16)
    part = manifest.shards[0].parts[0]
    data = bytearray(store.get(part.key))
    data[-1] ^= 1
    store.put(part.key, data)
    with pytest.raises(InvalidInput, match=r"the CRC-32 of tensor 'layer\.0' differs"):
        take(reader, 32)
    reader.close()


@pytest.mark.parametrize(
    ("length", "why"),
    [
        (None, "it is missing"),
        (5, "it ends before the end of tensor 'layer.0'"),
        (-1, "it ends before the end of tensor 'layer.0'"),
    ],
)
def test_a_shard_that_is_not_there_whole_is_told(
    tmp_path: Path, wrap: Callable[[FileStore], ObjectStore], length: int | None, why: str
) -> None:
    store, manifest = finished_cache(tmp_path, tokens=1000)
    key = manifest.shards[0].parts[0].key
    data = store.get(key)
    if length is None:
        store.delete(key)
    else:
        store.put(key, data[:length])
    error = read_until_error((wrap(store), manifest))
    assert error.reason == "CorruptShard"
    assert f"{key} is corrupt ({why})" in error.message


def test_no_more_shards_are_held_than_are_mixed_and_read_ahead(cache: Cache) -> None:
    """Every shard is fetched once an epoch, and read-ahead keeps within its bytes."""
    plan = FaultPlan()
    reader = open_reader((plan.wrap(cache[0]), cache[1]), mix_shards=2, read_ahead_bytes=0)
    take(reader, ROWS // 64)
    fetched = Counter(name for name in plan.names if name.startswith("read_into"))
    reader.close()
    assert set(fetched.values()) == {1}
    assert len(fetched) == len(cache[1].shards)


def test_a_store_that_fails_ends_the_reading(cache: Cache) -> None:
    plan = FaultPlan("read_into", fail)
    reader = open_reader((plan.wrap(cache[0]), cache[1]))
    with pytest.raises(Exception, match="cannot be reached"):
        take(reader, ROWS // 64)
    reader.close()


@pytest.mark.parametrize(
    ("expected", "reason", "message"),
    [
        ({"hooks": ["layer.00"]}, "HookNotFound", "no activations of 'layer.00'; nearest: layer.0"),
        ({"d_in": {"layer.0": 24}}, "WidthMismatch", "of 'layer.0' have dIn 16 in the cache, not 24"),
        ({"dtype": "bfloat16"}, "DtypeMismatch", "the cache is stored as float32, not bfloat16"),
    ],
)
def test_a_cache_of_something_else_is_refused_with_what_it_holds(
    cache: Cache, expected: dict[str, object], reason: str, message: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        open_reader(cache, **expected)
    assert caught.value.reason == reason
    assert message in caught.value.message
    assert "holds 2000 rows of layer.0 (dIn 16) in float32, of lookup on contexts of 16 tokens" in caught.value.message


def test_a_manifest_that_tells_other_widths_than_are_stored_is_refused(cache: Cache, tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for info in cache[0].list():
        store.put(info.key, cache[0].get(info.key))
    hook = cache[1].hooks[0].model_copy(update={"d_in": 8})
    store.put("manifest.json", cache[1].model_copy(update={"hooks": [hook]}).to_bytes())
    with pytest.raises(
        InvalidInput, match=r"but \d+ rows of what the manifest tells are \d+ .it holds .* .dIn 8."
    ) as caught:
        open_reader((store, cache[1])).next_batch()
    assert caught.value.reason == "CorruptManifest"


class ManyShards(FaultyStore):
    """A store in which every shard is one of the first two, and whose calls are counted."""

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        real = re.sub(r"\d{6}", lambda number: f"{int(number.group()) % 2:06d}", key)
        return super().read_into(real, start, buffer)


def test_opening_a_cache_of_very_many_shards_touches_but_those_of_the_first_batch(cache: Cache, tmp_path: Path) -> None:
    first, second = cache[1].shards[:2]
    shards = [
        (first, second)[number % 2].model_copy(
            update={
                "start": number // 2 * second.stop + (first, second)[number % 2].start,
                "stop": number // 2 * second.stop + (first, second)[number % 2].stop,
                "parts": [
                    part.model_copy(update={"key": f"shards/{number:06d}.safetensors"})
                    for part in (first, second)[number % 2].parts
                ],
            }
        )
        for number in range(10_000)
    ]
    rows = sum(entry.rows for entry in shards)
    store = FileStore(tmp_path)
    for part in (*first.parts, *second.parts):
        store.put(part.key, cache[0].get(part.key))
    store.put("manifest.json", cache[1].model_copy(update={"shards": shards, "tokens": rows}).to_bytes())
    plan = FaultPlan()
    # The first shards hold contexts of both kinds.
    reader = open_reader((ManyShards(store, plan), cache[1]), held_out_contexts=5, mix_shards=4, read_ahead_bytes=0)
    opened = list(plan.names)
    assert opened == ["get manifest.json", "read_into shards/000000.safetensors"]
    assert rows - reader.training_rows == int((all_rows(cache, "sequence") < 5).sum())
    reader.next_batch()
    assert len(plan.names) - len(opened) == 4
    reader.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_memory_that_held_out_rows_were_gathered_in_is_not_kept(tmp_path: Path, dtype: StorageDtype) -> None:
    """They are gathered once, and may be larger than all batches."""
    store, manifest = finished_cache(tmp_path, hooks={"a": 64}, tokens=20_000, dtype=dtype, shard_bytes=2**20)
    reader = CachedActivations.open(store, hooks=["a"], batch_size=64, seed=0, held_out_contexts=600)
    tracemalloc.start()
    try:
        size = reader.held_out(manifest.tokens).activations["a"].nbytes
        reader.next_batch()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 2**20
    assert kept < size / 4
    reader.close()
