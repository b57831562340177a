"""A cache as SAELens's data set: whole contexts in order, value by value, and what is left out is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from safetensors.torch import load

from sae_job.activations.manifest import CacheManifest
from sae_job.activations.saelens_export import CacheExport
from sae_job.cli import run_command_line
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectStore
from sae_job.storage.file_store import FileStore
from sae_operator.api.activation_cache import Positions, StorageDtype
from tests.caches import finished_cache
from tests.faults import FaultPlan
from tests.later_group import add_group

HOOK = "layer.0"
D_IN, CONTEXT = 16, 16
# BOS at position 0 is dropped when caching.
PER_CONTEXT = CONTEXT - 1


def decoded_rows(store: ObjectStore, manifest: CacheManifest, hook: str = HOOK) -> dict[tuple[int, int], Any]:
    """All rows: (sequence, position) -> decoded values in float32, token id."""
    found: dict[tuple[int, int], Any] = {}
    for entry in manifest.shards:
        tensors = load(store.get(entry.parts[0].key))
        codec, width = manifest.codec, manifest.hook(hook).d_in
        rows = codec.decode(
            {suffix: tensors[hook + suffix] for suffix, _, _ in codec.row_tensors(width)},
            {suffix: tensors[hook + suffix] for suffix, _, _ in codec.constants(width)},
        ).float()
        places = zip(tensors["sequence"].tolist(), tensors["position"].tolist(), strict=True)
        found |= {place: (rows[row], int(tensors["token_ids"][row])) for row, place in enumerate(places)}
    return found


def whole_contexts(rows: dict[tuple[int, int], Any], positions: list[int]) -> tuple[list[int], torch.Tensor]:
    """Contexts that have rows at all of these positions, in order, and their values [contexts, positions, d_in]."""
    sequences = sorted({sequence for sequence, _ in rows})
    whole = [sequence for sequence in sequences if all((sequence, position) in rows for position in positions)]
    values = [torch.stack([rows[sequence, position][0] for position in positions]) for sequence in whole]
    return whole, torch.stack(values)


def exported(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    there = load_from_disk(str(folder))
    assert isinstance(there, Dataset)
    rows = there.with_format("numpy")[:]
    return rows[there.column_names[0]], rows["token_ids"]


@pytest.mark.parametrize("dtype", get_args(StorageDtype))
def test_whole_contexts_are_written_in_order(tmp_path: Path, dtype: StorageDtype) -> None:
    store, manifest = finished_cache(tmp_path / "cache", hooks={HOOK: D_IN, "other": 8}, tokens=1000, dtype=dtype)
    done = CacheExport(store, manifest, HOOK).write(tmp_path / "set")
    rows = decoded_rows(store, manifest)
    positions = list(range(1, CONTEXT))
    whole, values = whole_contexts(rows, positions)
    activations, token_ids = exported(tmp_path / "set")
    np.testing.assert_array_equal(activations, values.numpy())
    expected = [[rows[sequence, position][1] for position in positions] for sequence in whole]
    np.testing.assert_array_equal(token_ids, expected)

    assert (done.contexts, done.positions, done.context_size) == (len(whole), positions, CONTEXT)
    assert done.shape.dtype == ("float16" if dtype == "float16" else "float32")
    # The last context of a shard does not fit whole.
    assert done.left_out == len({sequence for sequence, _ in rows}) - len(whole) > 0


def test_positions_can_be_chosen(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path / "cache", tokens=1000, dtype="float32")
    chosen = Positions(start=2, stop=-3, step=4)
    done = CacheExport(store, manifest, HOOK, positions=chosen).write(tmp_path / "set")
    assert done.positions == [2, 6, 10]
    _, values = whole_contexts(decoded_rows(store, manifest), [2, 6, 10])
    np.testing.assert_array_equal(exported(tmp_path / "set")[0], values.numpy())


def test_positions_that_no_context_has_are_told(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path / "cache", tokens=500)
    with pytest.raises(InvalidInput, match=r"no context of .* at all of 16 positions.*excludeSpecialTokens"):
        CacheExport(store, manifest, HOOK, positions=Positions(start=0))


def test_an_unknown_hook_is_told(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path / "cache", tokens=500)
    with pytest.raises(InvalidInput, match=r"layer\.9.*nearest: layer\.0"):
        CacheExport(store, manifest, "layer.9")


def test_of_a_hook_that_was_added_later_contexts_with_rows_that_are_not_kept_are_left_out(tmp_path: Path) -> None:
    store, first = finished_cache(tmp_path / "cache", tokens=1000, dtype="float32")
    manifest = add_group(store, first, "later", 4, drop_every=40)
    rows = {}
    for entry in manifest.shards:
        base, later = (load(store.get(part.key)) for part in entry.parts)
        places = zip(base["sequence"].tolist(), base["position"].tolist(), later["keep"].tolist(), strict=True)
        rows |= {place[:2]: (later["later"][row], 0) for row, place in enumerate(places) if place[2]}
    whole, values = whole_contexts(rows, list(range(1, CONTEXT)))
    done = CacheExport(store, manifest, "later").write(tmp_path / "set")
    np.testing.assert_array_equal(exported(tmp_path / "set")[0], values.numpy())
    assert done.contexts == len(whole) < CacheExport(store, manifest, HOOK).contexts


def test_shuffled_contexts_are_the_same_in_another_order(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path / "cache", tokens=1000, dtype="float32")
    export = CacheExport(store, manifest, HOOK)
    sets = []
    for name, seed in (("plain", None), ("first", 1), ("again", 1), ("second", 2)):
        export.write(tmp_path / name, shuffle_seed=seed)
        sets.append(exported(tmp_path / name))
    plain, first, again, second = sets
    np.testing.assert_array_equal(first[0], again[0])
    orders = []
    for activations, token_ids in (first, second):
        # In float32 no two contexts are equal.
        order = [int(np.nonzero((plain[0] == context).all(axis=(1, 2)))[0][0]) for context in activations]
        np.testing.assert_array_equal(token_ids, plain[1][order])
        assert sorted(order) == list(range(export.contexts)) != order
        orders.append(order)
    assert orders[0] != orders[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "cache", "first", "plain", "second"]


def test_of_a_shard_only_the_hook_is_read(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path / "cache", hooks={HOOK: 4, "wide": 1024}, tokens=100, shard_bytes=2**20)
    (entry,) = manifest.shards
    plan = FaultPlan()
    reads: list[int] = []

    class Counting(FileStore):
        def read_into(self, key: str, start: int, buffer: memoryview) -> int:
            reads.append(len(buffer))
            return super().read_into(key, start, buffer)

    CacheExport(plan.wrap(Counting(store.root)), manifest, HOOK).write(tmp_path / "set")
    assert sum(reads) < entry.parts[0].bytes / 10
    assert not any(name.startswith("get ") for name in plan.names)


def test_a_damaged_shard_is_told_and_leaves_no_data_set(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path / "cache", tokens=1000)
    export = CacheExport(store, manifest, HOOK)
    key = manifest.shards[1].parts[0].key
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, data)
    with pytest.raises(InvalidInput, match=rf"{key} differs from its checksum in the tensor layer\.0"):
        export.write(tmp_path / "set")
    assert not (tmp_path / "set" / "state.json").exists()


def test_the_command_tells_what_was_written_and_what_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, manifest = finished_cache(tmp_path / "cache", hooks={HOOK: D_IN, "other": 8}, tokens=1000)
    folder = tmp_path / "set"
    assert run_command_line(["cache", "export", str(store.root), str(folder)]) == 2
    assert "has the hooks layer.0, other: choose one with --hook" in capsys.readouterr().err
    assert run_command_line(["cache", "export", str(store.root), str(folder), "--hook", "other"]) == 0
    told = capsys.readouterr().out
    whole, _ = whole_contexts(decoded_rows(store, manifest, "other"), list(range(1, CONTEXT)))
    assert f"{len(whole)} contexts of {PER_CONTEXT} positions of other in float32" in told
    assert "stored in bfloat16, which the data set cannot hold" in told
    assert "contexts lack some of their rows and are left out" in told
    assert f"positions 1–15 of {CONTEXT} are there: use context_size {PER_CONTEXT}" in told
    assert exported(folder)[0].shape == (len(whole), PER_CONTEXT, 8)
    assert run_command_line(["cache", "export", str(store.root), str(folder), "--hook", "other"]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "5", "a:b", "-:3", "1:2:0", "1:2:-1", "1:2:3:4"])
def test_positions_that_are_no_slice_are_told(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = finished_cache(tmp_path / "cache", tokens=100)
    assert run_command_line(["cache", "export", str(store.root), str(tmp_path / "x"), f"--positions={text}"]) == 2
    assert "no slice of positions" in capsys.readouterr().err


def test_hub_options_without_a_repository_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["cache", "export", str(tmp_path), str(tmp_path / "x"), "--private"]) == 2
    assert "--hub-repo" in capsys.readouterr().err


def test_the_metadata_for_the_hub_tell_where_the_rows_came_from(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path / "cache", tokens=500)
    told = json.loads(json.dumps(CacheExport(store, manifest, HOOK).metadata()))
    assert (told["hook"], told["dIn"], told["positions"]) == (HOOK, D_IN, list(range(1, CONTEXT)))
    assert told["cache"]["identity"] == manifest.identity
    assert told["cache"]["spec"] == manifest.spec
    assert told["cache"]["model"]["name"] == "lookup"
