"""A cache that is extended while jobs read it: who asked for fewer rows reads the same rows as before."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from sae_job.activations.first_rows import ShardRows, first_rows
from sae_job.activations.format import sidecar_key
from sae_job.activations.loading import ShardId
from sae_job.activations.manifest import CacheManifest, PartEntry, Sidecar, read_sidecar
from sae_job.activations.reader import CachedActivations, HeldOut, held_out_contexts_for
from sae_job.errors import InvalidInput
from sae_job.storage.file_store import FileStore
from tests.caches import finished_cache

Cache = tuple[FileStore, CacheManifest]
HOOK = "layer.0"
# Shards hold 215 rows, so a cache of 1,000 ends with a partial one.
ROWS, PART = 1000, "shards/000004-140.safetensors"
BATCH = 100
# Two epochs and a half.
BATCHES = 25
# None held out, contexts of full shards, and contexts that reach into the partial shard.
HELD_OUT = [0, 20, 61]


def cache_of(root: Path, tokens: int) -> Cache:
    """A finished cache, which extends the one that is there."""
    return finished_cache(root, tokens=tokens, dtype="float32")


def open_reader(
    cache: Cache, *, total_rows: int | None = ROWS, held_out_contexts: int = 0, mix: int = 3
) -> CachedActivations:
    return CachedActivations.open(
        cache[0],
        hooks=[HOOK],
        batch_size=BATCH,
        seed=1,
        held_out_contexts=held_out_contexts,
        total_rows=total_rows,
        read_ahead_bytes=2**16,
        mix_shards=mix,
    )


def take(reader: CachedActivations, batches: int) -> torch.Tensor:
    return torch.cat([torch.empty(0, 16), *(reader.next_batch()[HOOK] for _ in range(batches))])


def keys(rows: torch.Tensor) -> Counter[bytes]:
    """What tells rows apart, whatever their order."""
    return Counter(row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows)


def stored_rows(cache: Cache, key: str) -> torch.Tensor:
    return load(cache[0].get(key))[HOOK]


def undisturbed(cache: Cache, *, held_out_contexts: int = 0, mix: int = 3) -> torch.Tensor:
    reader = open_reader(cache, held_out_contexts=held_out_contexts, mix=mix)
    stream = take(reader, BATCHES)
    reader.close()
    return stream


def test_an_extended_cache_lists_the_full_shard_and_keeps_the_partial_one(tmp_path: Path) -> None:
    short = cache_of(tmp_path, ROWS)
    assert short[1].shards[-1].parts[0].key == PART
    long = cache_of(tmp_path, 2 * ROWS)
    assert PART not in [entry.parts[0].key for entry in long[1].shards]
    full = stored_rows(long, long[1].shards[4].parts[0].key)
    assert keys(stored_rows(long, PART)) != keys(full[:140]), (
        "in an order of its own, or there is nothing to tell apart"
    )


@pytest.mark.parametrize("mix", [1, 3, 100])
@pytest.mark.parametrize("held_out_contexts", HELD_OUT)
@pytest.mark.parametrize("tokens", [ROWS + 20, 2 * ROWS])
def test_a_new_reader_of_as_many_rows_reads_as_before(
    tmp_path: Path, tokens: int, held_out_contexts: int, mix: int
) -> None:
    """Also when the shard is still a partial one after the extension."""
    expected = undisturbed(cache_of(tmp_path, ROWS), held_out_contexts=held_out_contexts, mix=mix)
    long = cache_of(tmp_path, tokens)
    assert torch.equal(undisturbed(long, held_out_contexts=held_out_contexts, mix=mix), expected)


@pytest.mark.parametrize("before", [0, 1, 7, 10, 13, 24])
@pytest.mark.parametrize("mix", [3, 100])
@pytest.mark.parametrize("held_out_contexts", HELD_OUT)
def test_a_reader_that_was_interrupted_continues_exactly(
    tmp_path: Path, held_out_contexts: int, mix: int, before: int
) -> None:
    short = cache_of(tmp_path, ROWS)
    expected = undisturbed(short, held_out_contexts=held_out_contexts, mix=mix)
    reader = open_reader(short, held_out_contexts=held_out_contexts, mix=mix)
    first = take(reader, before)
    state = json.loads(json.dumps(reader.state()))
    reader.close()
    reader = open_reader(cache_of(tmp_path, 2 * ROWS), held_out_contexts=held_out_contexts, mix=mix)
    reader.restore(state)
    assert torch.equal(torch.cat([first, take(reader, BATCHES - before)]), expected)
    reader.close()


@pytest.mark.parametrize("mix", [1, 3, 100])
@pytest.mark.parametrize("asked", [None, 1500])
def test_a_job_that_asks_for_more_ends_the_epoch_that_was_begun_as_planned(
    tmp_path: Path, asked: int | None, mix: int
) -> None:
    """Also when it is interrupted once more, after the extension."""
    short = cache_of(tmp_path, ROWS)
    expected = undisturbed(short, mix=mix)[:ROWS]
    reader = open_reader(short, mix=mix)
    parts = [take(reader, 4)]
    state = reader.state()
    reader.close()
    long = cache_of(tmp_path, 2 * ROWS)
    for batches in (3, 3):
        reader = open_reader(long, total_rows=asked, mix=mix)
        reader.restore(state)
        parts.append(take(reader, batches))
        state = reader.state()
        reader.close()
    assert torch.equal(torch.cat(parts), expected)
    rows = asked or 2 * ROWS
    reader = open_reader(long, total_rows=asked, mix=mix)
    assert reader.training_rows == rows
    every = keys(take(reader, rows // BATCH))
    reader.restore(state)
    assert reader.epoch == 1
    assert keys(take(reader, rows // BATCH)) == every
    reader.close()


@pytest.mark.parametrize("rows", [1, 300, 870, 990, ROWS])
def test_held_out_rows_stay_the_same(tmp_path: Path, rows: int) -> None:
    def held_out(cache: Cache) -> tuple[int, HeldOut]:
        contexts = held_out_contexts_for(*cache, rows)
        # Where everything is held out the reader has nothing to train on.
        reader = open_reader(cache, held_out_contexts=min(contexts, 66))
        held = reader.held_out(rows)
        reader.close()
        return contexts, held

    contexts, before = held_out(cache_of(tmp_path, ROWS))
    same, after = held_out(cache_of(tmp_path, 2 * ROWS))
    assert same == contexts
    assert torch.equal(after.activations[HOOK], before.activations[HOOK])
    for field in ("token_ids", "sequence", "position"):
        assert torch.equal(getattr(after, field), getattr(before, field))


def test_held_out_rows_too_come_from_the_partial_shard(tmp_path: Path) -> None:
    """A real model rounds differently in batches of other sizes, so equal contexts are not equal bits."""
    cache_of(tmp_path, ROWS)
    long = cache_of(tmp_path, 2 * ROWS)
    long[0].delete(long[1].shards[4].parts[0].key)
    reader = open_reader(long, held_out_contexts=61)
    assert int(reader.held_out(ROWS).sequence.max()) == 60
    take(reader, BATCHES)
    reader.close()


@pytest.mark.parametrize("lost", [PART, sidecar_key(PART)])
def test_without_the_partial_shard_or_its_proof_the_full_one_is_read(tmp_path: Path, lost: str) -> None:
    cache_of(tmp_path, ROWS)
    long = cache_of(tmp_path, 2 * ROWS)
    long[0].delete(lost)
    reader = open_reader(long)
    read = keys(take(reader, ROWS // BATCH))
    reader.close()
    entries = long[1].shards
    whole = [stored_rows(long, entry.parts[0].key) for entry in entries[:4]]
    assert read == keys(torch.cat([*whole, stored_rows(long, entries[4].parts[0].key)[:140]]))


def test_a_partial_shard_that_is_not_listed_is_verified_too(tmp_path: Path) -> None:
    cache_of(tmp_path, ROWS)
    long = cache_of(tmp_path, 2 * ROWS)
    data = bytearray(long[0].get(PART))
    data[-1] ^= 1
    long[0].put(PART, data)
    reader = open_reader(long)
    with pytest.raises(InvalidInput, match=f"{PART} is corrupt .the CRC-32 of tensor '{HOOK}' differs"):
        take(reader, ROWS // BATCH)
    reader.close()


def test_the_objects_follow_from_the_manifest_and_the_row_count(tmp_path: Path) -> None:
    store, _ = cache_of(tmp_path, ROWS)
    part = read_sidecar(store, 4, 140, 215)
    assert part is not None
    _, manifest = cache_of(tmp_path, 2 * ROWS)
    asked: list[tuple[int, int, int]] = []

    def objects(total: int, stored: Sidecar | None) -> list[tuple[str, int]]:
        def stored_part(number: int, rows: int, group: int) -> Sidecar | None:
            asked.append((number, rows, group))
            return stored

        return [(shard.parts[0].key, shard.rows) for shard in first_rows(manifest, total, {0}, stored_part)]

    full = [(f"shards/{number:06d}.safetensors", 215) for number in range(9)]
    assert objects(0, None) == []
    assert objects(4 * 215, None) == full[:4]
    assert objects(2 * ROWS, None) == objects(9999, None) == [*full, ("shards/000009-65.safetensors", 65)]
    assert asked == [], "at the end of a shard there is nothing to choose"
    assert objects(ROWS, None) == [*full[:4], ("shards/000004.safetensors", 140)]
    assert objects(ROWS, part) == [*full[:4], (PART, 140)]
    assert asked == [(4, 140, 0), (4, 140, 0)]
    entry = manifest.shards[4]
    assert first_rows(manifest, ROWS, {0}, lambda number, rows, group: part)[4] == ShardRows(
        ShardId(4, 140),
        140,
        entry.start,
        entry.stop,
        {0: PartEntry(key=PART, bytes=part.bytes, sha256=part.sha256, crc32=part.crc32)},
    )
