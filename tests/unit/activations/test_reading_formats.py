"""Reading hooks of later groups, and of 8-bit formats: the bytes asked for, the rows that may be seen, decoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae_job.activations.first_rows import first_rows
from sae_job.activations.loading import ShardId
from sae_job.activations.manifest import Sidecar
from sae_job.activations.reader import CachedActivations, read_bytes_of_shard
from sae_job.errors import InvalidInput
from sae_job.storage.file_store import FileStore
from tests.caches import finished_cache
from tests.faults import FaultPlan
from tests.grouped_cache import CONTEXT_SIZE, GroupedCache, write_grouped_cache

FIRST, LATER, LAST = {"a": 6, "b": 3}, {"c": 5}, {"d": 2, "e": 4}
# Rows, by their numbers, that the later groups leave out: of several shards, and a whole one.
LEFT_OUT = {1: {0, 7, 41, 42, 143}, 2: {7, 9, *range(80, 120)}}
ROWS = 144


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grouped")


@pytest.fixture(scope="module")
def cache(folder: Path) -> GroupedCache:
    return write_grouped_cache(FileStore(folder), [FIRST, LATER, LAST], left_out=LEFT_OUT)


def open_reader(
    folder: Path, hooks: list[str], *, batch_size: int = 16, held_out_contexts: int = 0
) -> CachedActivations:
    return CachedActivations.open(
        FileStore(folder),
        hooks=hooks,
        batch_size=batch_size,
        seed=0,
        held_out_contexts=held_out_contexts,
        mix_shards=2,
    )


def sorted_rows(rows: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, rows.tolist()))


@pytest.mark.parametrize(
    ("hooks", "left_out"),
    [
        (["a"], set()),
        (["b", "a"], set()),
        (["c"], LEFT_OUT[1]),
        (["a", "c"], LEFT_OUT[1]),
        (["e"], LEFT_OUT[2]),
        (["e", "b", "d"], LEFT_OUT[2]),
        (["c", "d"], LEFT_OUT[1] | LEFT_OUT[2]),
    ],
)
def test_rows_that_a_group_leaves_out_are_never_given_out(
    folder: Path, cache: GroupedCache, hooks: list[str], left_out: set[int]
) -> None:
    """Of the groups that are read; every other row comes once an epoch, and hooks stay aligned."""
    kept = torch.tensor([row for row in range(ROWS) if row not in left_out])
    reader = open_reader(folder, hooks, batch_size=len(kept))
    assert reader.training_rows == ROWS, "rows that are left out are known only when they are read"
    for _ in range(3):
        batch = reader.next_batch()
        joined = torch.cat([batch[hook] for hook in hooks], dim=1)
        assert sorted_rows(joined) == sorted_rows(torch.cat([cache.rows[hook][kept] for hook in hooks], dim=1))
    reader.close()


@pytest.mark.parametrize(("hooks", "values"), [(["a"], 6), (["a", "c"], 11), (["e", "b", "d"], 9)])
def test_what_is_read_of_a_shard_is_known_before(cache: GroupedCache, hooks: list[str], values: int) -> None:
    """40 rows of float32, and a byte for each row that tells whether to keep it."""
    assert read_bytes_of_shard(cache.manifest, hooks) == 40 * (4 * values + 1)


def test_held_out_rows_too_are_only_those_that_are_kept(folder: Path, cache: GroupedCache) -> None:
    reader = open_reader(folder, ["c"], held_out_contexts=11)
    held = reader.held_out(1000)
    kept = [row for row in range(11 * CONTEXT_SIZE) if row not in LEFT_OUT[1]]
    assert (held.sequence * CONTEXT_SIZE + held.position).tolist() == kept
    assert torch.equal(held.activations["c"], cache.rows["c"][kept])
    reader.close()


def test_parts_of_other_groups_are_not_needed(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    cache = write_grouped_cache(store, [FIRST, LATER, LAST], left_out=LEFT_OUT)
    for entry in cache.manifest.shards:
        store.delete(entry.parts[0].key)
        store.delete(entry.parts[2].key)
    reader = open_reader(tmp_path, ["c"], batch_size=ROWS - len(LEFT_OUT[1]))
    assert len(sorted_rows(reader.next_batch()["c"])) == ROWS - len(LEFT_OUT[1])
    reader.close()


def test_hooks_that_share_no_row_are_told(tmp_path: Path) -> None:
    write_grouped_cache(FileStore(tmp_path), [{"a": 2}, {"c": 2}], left_out={1: range(ROWS)})
    reader = open_reader(tmp_path, ["a", "c"])
    with pytest.raises(
        InvalidInput, match="no row is within the norm ratio of all of a, c: train them in separate jobs"
    ):
        reader.next_batch()
    reader.close()


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8", "int8"])
def test_rows_are_decoded_as_the_format_says(tmp_path: Path, dtype: str, mapped: bool) -> None:
    """8-bit ones to float32, with the constants of the shard that they lie in."""
    store = FileStore(tmp_path)
    cache = write_grouped_cache(store, [FIRST, LATER], dtype=dtype, left_out=LEFT_OUT)
    reader = CachedActivations.open(
        store if mapped else FaultPlan().wrap(store),
        hooks=["b", "c"],
        batch_size=ROWS - len(LEFT_OUT[1]),
        seed=0,
        held_out_contexts=0,
        mix_shards=2,
    )
    kept = [row for row in range(ROWS) if row not in LEFT_OUT[1]]
    batch = reader.next_batch()
    for hook in ("b", "c"):
        expected = cache.rows[hook][kept]
        assert batch[hook].dtype == expected.dtype == (torch.float32 if dtype.endswith("8") else getattr(torch, dtype))
        assert sorted_rows(batch[hook].float()) == sorted_rows(expected.float())
    reader.close()


def test_a_batch_is_decoded_as_the_shards_say_that_it_came_from(tmp_path: Path) -> None:
    """Even when these were let go before it was full, and their memory holds other shards by then."""
    store, _ = finished_cache(tmp_path, hooks={"a": 16, "b": 24}, tokens=1500, dtype="int8", shard_bytes=2**13)
    readers = [
        CachedActivations.open(
            place,
            hooks=["a", "b"],
            batch_size=64,
            seed=1,
            held_out_contexts=0,
            mix_shards=2,
            read_ahead_bytes=1,
        )
        for place in (store, FaultPlan().wrap(store))
    ]
    for _ in range(60):
        mapped, read = (reader.next_batch() for reader in readers)
        assert torch.equal(mapped["a"], read["a"])
        assert torch.equal(mapped["b"], read["b"])
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("name", ["keep", "c/mean", "c/spread", "c/scale", "c"])
def test_every_tensor_that_is_read_is_verified(tmp_path: Path, name: str) -> None:
    store = FileStore(tmp_path)
    cache = write_grouped_cache(store, [FIRST, LATER], dtype="int8", left_out=LEFT_OUT)
    entry = cache.manifest.shards[2]
    data = bytearray(store.get(entry.parts[1].key))
    data[cache.manifest.layout(entry, 1).tensors[name].offset] ^= 4
    store.put(entry.parts[1].key, data)
    reader = open_reader(tmp_path, ["c"], batch_size=ROWS)
    with pytest.raises(
        InvalidInput, match=rf"000002\.g1\.safetensors is corrupt .the CRC-32 of tensor '{name}' differs"
    ):
        reader.next_batch()
    reader.close()


def test_a_partial_shard_is_read_where_all_groups_that_are_needed_are_stored(tmp_path: Path) -> None:
    """And hold the same rows: a part that follows another one is no part of this shard."""
    cache = write_grouped_cache(FileStore(tmp_path / "long"), [FIRST, LATER, LAST])
    short = write_grouped_cache(FileStore(tmp_path / "short"), [FIRST, LATER, LAST], shards=(40, 40, 20)).manifest
    orders = [f"{entry.parts[0].crc32['sequence']}-{entry.parts[0].crc32['position']}" for entry in short.shards]

    def read_from(*groups: int, follows: str = orders[2]) -> list[tuple[ShardId, int, list[int]]]:
        """What 100 rows are read from, where the partial shard 2 of 20 rows has parts of these groups."""

        def stored_part(number: int, rows: int, group: int) -> Sidecar | None:
            assert (number, rows) == (2, 20)
            part = short.shards[2].parts[group]
            return (
                Sidecar(
                    shard=2,
                    group=group,
                    rows=20,
                    bytes=part.bytes,
                    sha256=part.sha256,
                    crc32=part.crc32,
                    hooks={},
                    dropped=0,
                    software={},
                    device="cpu",
                    follows=follows if group > 0 else None,
                )
                if group in groups
                else None
            )

        found = first_rows(cache.manifest, 100, {2}, stored_part)
        return [(shard.shard, shard.rows, sorted(shard.parts)) for shard in found]

    whole = [(ShardId(0, 40), 40, [0, 1, 2]), (ShardId(1, 40), 40, [0, 1, 2])]
    assert read_from(0, 1, 2) == read_from(0, 2) == [*whole, (ShardId(2, 20), 20, [0, 2])]
    full = [*whole, (ShardId(2, 40), 20, [0, 1, 2])]
    assert read_from(0, 1) == read_from(2) == read_from() == full
    assert read_from(0, 1, 2, follows=orders[0]) == full
