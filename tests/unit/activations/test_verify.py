"""`sae-job cache verify`: every kind of damage is found, and told with shard, object and fix."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from sae_job.activations.format import HEADER, KEEP, MANIFEST_KEY, POSITION, SEQUENCE, TOKEN_IDS, sidecar_key
from sae_job.activations.manifest import CacheManifest
from sae_job.activations.marker import MARKER_KEY, MIRROR_PREFIX, mark
from sae_job.activations.verify import Verification, verify_cache
from sae_job.cli import run_command_line
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectStore
from sae_job.storage.file_store import FileStore
from sae_job.text.plan import INDEX_KEY, block_key, block_sidecar_key
from sae_operator.api.activation_cache import StorageDtype
from tests.caches import finished_cache
from tests.later_group import add_group

HOOKS = {"layer.0": 16, "layer.1": 8}
# The shard that is damaged, neither first nor last.
SHARD = 2
DTYPES = get_args(StorageDtype)

Edit = Callable[[dict[str, Any]], object]


def sound_cache(root: Path, *, dtype: str = "bfloat16") -> tuple[FileStore, CacheManifest]:
    store, manifest = finished_cache(root, hooks=HOOKS, tokens=700, shard_bytes=2**13, dtype=dtype)  # pyright: ignore[reportArgumentType]
    assert len(manifest.shards) > SHARD + 1
    mark(store, manifest.identity)
    return store, manifest


@pytest.fixture
def cache(tmp_path: Path) -> tuple[FileStore, CacheManifest]:
    return sound_cache(tmp_path)


def edit_json(store: ObjectStore, key: str, edit: Edit) -> None:
    told = json.loads(store.get(key))
    edit(told)
    store.put(key, json.dumps(told).encode())


def part_of(manifest: CacheManifest) -> str:
    return manifest.shards[SHARD].parts[0].key


def flip(store: ObjectStore, key: str, offset: int) -> None:
    data = bytearray(store.get(key))
    data[offset] ^= 1
    store.put(key, data)


def falsify(
    store: ObjectStore,
    manifest: CacheManifest,
    name: str,
    change: Callable[[torch.Tensor], object],
    *,
    group: int = 0,
) -> None:
    """Change a tensor, and all checksums with it: nothing but the rows tells."""
    key = manifest.shards[SHARD].parts[group].key
    layout = manifest.layout(manifest.shards[SHARD], group)
    data = bytearray(store.get(key))
    change(layout.tensor(memoryview(data), name))
    store.put(key, data)
    place = layout.tensors[name]
    crc32 = f"{zlib.crc32(data[place.offset : place.offset + place.bytes]):08x}"
    sha256 = hashlib.sha256(data).hexdigest()

    def tell(part: dict[str, Any]) -> None:
        part["sha256"] = sha256
        part["crc32"][name] = crc32

    edit_json(store, sidecar_key(key), tell)
    edit_json(store, MANIFEST_KEY, lambda told: tell(told["shards"][SHARD]["parts"][group]))


def only_problem(found: Verification, key: str, told: str, *, shard: int | None = SHARD) -> None:
    (problem,) = found.problems
    assert (problem.uri, problem.shard) == (f"{found.uri}/{key}", shard)
    assert told in problem.what
    assert problem.fix


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sound_cache_has_no_problems(tmp_path: Path, dtype: str) -> None:
    store, manifest = sound_cache(tmp_path, dtype=dtype)
    told: list[tuple[int, int]] = []
    found = verify_cache(store, progress=lambda done, total: told.append((done, total)))
    assert (found.problems, found.orphans) == ([], [])
    assert (found.finished, found.rows, found.bytes) == (True, manifest.tokens, manifest.bytes)
    assert found.parts == len(manifest.shards)
    assert found.blocks > 1
    assert told[0] == (0, manifest.bytes)
    assert told[-1] == (manifest.bytes, manifest.bytes)


@pytest.mark.parametrize("threads", [1, 4])
def test_what_is_found_does_not_depend_on_the_threads(cache: tuple[FileStore, CacheManifest], threads: int) -> None:
    store, manifest = cache
    for entry in manifest.shards:
        flip(store, entry.parts[0].key, entry.parts[0].bytes - 1)
    found = verify_cache(store, threads=threads)
    assert [problem.shard for problem in found.problems] == list(range(len(manifest.shards)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_byte_in_any_tensor_is_found(tmp_path: Path, dtype: str) -> None:
    store, manifest = sound_cache(tmp_path, dtype=dtype)
    key = part_of(manifest)
    data = store.get(key)
    layout = manifest.layout(manifest.shards[SHARD], 0)
    assert len(layout.tensors) >= 5
    for name, place in layout.tensors.items():
        flip(store, key, place.offset + place.bytes - 1)
        only_problem(verify_cache(store), key, f"tensor {name} differs from its CRC-32")
        store.put(key, data)
    assert verify_cache(store).problems == []


def test_a_changed_header_is_found(cache: tuple[FileStore, CacheManifest]) -> None:
    store, manifest = cache
    key = part_of(manifest)
    data = store.get(key)
    for old, new in ((b'"layer.1"', b'"layer.2"'), (b"BF16", b"F16 "), (b"{", b"[")):
        store.put(key, data.replace(old, new, 1))
        (problem,) = verify_cache(store).problems
        assert "header" in problem.what
    rows = manifest.shards[SHARD].rows
    swapped = data.replace(f"[{rows},16]".encode(), f"[16,{rows}]".encode(), 1)
    assert swapped != data
    store.put(key, swapped)
    told = f"tensor layer.0 is bfloat16 [16, {rows}] in its header instead of bfloat16 [{rows}, 16]"
    only_problem(verify_cache(store), key, told)


def test_a_part_of_another_size_is_found(cache: tuple[FileStore, CacheManifest]) -> None:
    store, manifest = cache
    key = part_of(manifest)
    data = store.get(key)
    store.put(key, data[:-5])
    only_problem(verify_cache(store), key, f"has {len(data) - 5} bytes instead of {len(data)}")
    store.put(key, data + b"more")
    only_problem(verify_cache(store), key, f"has {len(data) + 4} bytes instead of {len(data)}")
    store.delete(key)
    only_problem(verify_cache(store), key, "is missing")


def test_a_sidecar_that_is_missing_or_says_otherwise_is_found(cache: tuple[FileStore, CacheManifest]) -> None:
    store, manifest = cache
    key = sidecar_key(part_of(manifest))
    data = store.get(key)
    store.put(key, data[:-10])
    only_problem(verify_cache(store), key, "no sidecar")
    for field, value in (("rows", 7), ("shard", 5), ("sha256", "0" * 64), ("crc32", {}), ("bytes", 1), ("group", 1)):
        store.put(key, data)
        edit_json(store, key, lambda told, field=field, value=value: told.update({field: value}))
        only_problem(verify_cache(store), key, f"disagrees with the manifest in {field}")
    store.delete(key)
    only_problem(verify_cache(store), key, "is missing")


def test_a_sidecar_with_another_median_norm_or_none_is_found(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path, hooks=HOOKS, tokens=700, shard_bytes=2**13, max_norm_ratio=10.0)
    key = sidecar_key(part_of(manifest))
    edit_json(store, key, lambda told: told["hooks"]["layer.0"].update(calibrationMedianNorm=1.5))
    only_problem(verify_cache(store), key, "another median norm of layer.0 than the manifest")
    store.delete(key)
    only_problem(verify_cache(store), key, "is missing")


def test_a_manifest_with_another_median_norm_than_all_sidecars_is_found(tmp_path: Path) -> None:
    store, _ = finished_cache(tmp_path, hooks=HOOKS, tokens=700, shard_bytes=2**13, max_norm_ratio=10.0)
    edit_json(store, MANIFEST_KEY, lambda told: told["hooks"][0].update(calibrationMedianNorm=1.5))
    only_problem(verify_cache(store), MANIFEST_KEY, "another median norm of layer.0 than all sidecars", shard=None)


@pytest.mark.parametrize("checksum", [TOKEN_IDS, "layer.1", HEADER, "sha256"])
def test_a_manifest_with_another_checksum_is_found(cache: tuple[FileStore, CacheManifest], checksum: str) -> None:
    store, manifest = cache

    def change(told: dict[str, Any]) -> None:
        part = told["shards"][SHARD]["parts"][0]
        (part if checksum == "sha256" else part["crc32"])[checksum] = "0" * 8

    edit_json(store, MANIFEST_KEY, change)
    found = verify_cache(store)
    # The file differs from the manifest, and so does its sidecar.
    assert [problem.uri.rpartition("/")[2] for problem in found.problems] == [
        sidecar_key(part_of(manifest)).removeprefix("shards/"),
        part_of(manifest).removeprefix("shards/"),
    ]


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (SEQUENCE, lambda rows: rows[:3].add_(100_000), "sequence of 3 rows is outside of the shard's contexts"),
        (SEQUENCE, lambda rows: rows[:1].fill_(-1), "sequence of 1 rows is outside"),
        (POSITION, lambda rows: rows[:2].fill_(16), "position of 2 rows is outside of a context of 16"),
        (TOKEN_IDS, lambda rows: rows[:4].add_(1), "token_ids of 4 rows are not those of their contexts"),
        ("layer.0", lambda rows: rows[0, 0].fill_(50), "the rows of layer.0 have other sums than the sidecar tells"),
        ("layer.1", lambda rows: rows[3, 2].fill_(float("nan")), "values of layer.1 are not finite"),
    ],
)
def test_rows_that_cannot_be_are_found_although_all_checksums_agree(
    cache: tuple[FileStore, CacheManifest], name: str, change: Callable[[torch.Tensor], object], told: str
) -> None:
    store, manifest = cache
    falsify(store, manifest, name, change)
    problems = [problem for problem in verify_cache(store).problems if problem.shard == SHARD]
    assert [told in problem.what for problem in problems] == [True]
    assert problems[0].uri == f"{store.uri}/{part_of(manifest)}"


def test_rows_that_are_there_twice_are_found(cache: tuple[FileStore, CacheManifest]) -> None:
    store, manifest = cache
    for name in (SEQUENCE, POSITION, TOKEN_IDS):
        falsify(store, manifest, name, lambda rows: rows[0].copy_(rows[1]))
    only_problem(verify_cache(store), part_of(manifest), "1 rows have the sequence and position of another row")


def test_statistics_are_looked_at_only_where_asked_for(cache: tuple[FileStore, CacheManifest]) -> None:
    store, manifest = cache
    falsify(store, manifest, "layer.0", lambda rows: rows[0, 0].fill_(50))
    assert verify_cache(store, statistics=False).problems == []
    assert verify_cache(store).problems != []


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda told: told.update(tokens=699), "tells 699 tokens, its shards have 700"),
        (lambda told: told.update(bytes=1), "tells 1 bytes"),
        (lambda told: told["hooks"][1].update(meanNorm=1.0), "other statistics of layer.1 than its rows have"),
        (lambda told: told["hooks"][0]["mean"].reverse(), "other statistics of layer.0 than its rows have"),
    ],
)
def test_a_manifest_that_tells_what_is_not_so_is_found(
    cache: tuple[FileStore, CacheManifest], edit: Edit, told: str
) -> None:
    store, _ = cache
    edit_json(store, MANIFEST_KEY, edit)
    only_problem(verify_cache(store), MANIFEST_KEY, told, shard=None)


def test_shards_that_share_contexts_are_found(cache: tuple[FileStore, CacheManifest]) -> None:
    store, manifest = cache
    start = manifest.shards[SHARD].start
    edit_json(store, MANIFEST_KEY, lambda told: told["shards"][SHARD].update(start=start - 1))
    found = verify_cache(store)
    assert [problem.what for problem in found.problems] == [
        "lists contexts of the shard that other shards have, too",
        "plans other shards than the manifest lists",
    ]


def test_damaged_contexts_are_found(cache: tuple[FileStore, CacheManifest]) -> None:
    store, _ = cache
    key = block_key(1)
    flip(store, key, 500)
    only_problem(verify_cache(store), key, "differs from its SHA-256 in the index", shard=None)
    store.delete(key)
    only_problem(verify_cache(store), key, "is missing", shard=None)


def test_a_damaged_index_or_manifest_is_told_and_the_rest_is_checked(cache: tuple[FileStore, CacheManifest]) -> None:
    store, manifest = cache
    index = store.get(INDEX_KEY)
    store.put(INDEX_KEY, b"{}")
    found = verify_cache(store)
    only_problem(found, INDEX_KEY, "is damaged", shard=None)
    assert found.parts == len(manifest.shards)
    store.put(INDEX_KEY, index)
    store.put(MANIFEST_KEY, store.get(MANIFEST_KEY)[:-20])
    found = verify_cache(store)
    only_problem(found, MANIFEST_KEY, "is damaged", shard=None)
    assert (found.finished, found.parts) == (False, len(manifest.shards))


def test_objects_that_nothing_lists_are_reported_and_are_no_damage(cache: tuple[FileStore, CacheManifest]) -> None:
    store, _ = cache
    for key in ("shards/000009.safetensors", "shards/000001-9.json", "notes.txt", "tokens/000099.safetensors"):
        store.put(key, b"x")
    for key in ("last-used.json", f"{MIRROR_PREFIX}config.json"):
        store.put(key, b"{}")
    store.put(block_sidecar_key(0), b"{}")
    found = verify_cache(store)
    assert found.problems == []
    assert found.orphans == [
        "notes.txt",
        "shards/000001-9.json",
        "shards/000009.safetensors",
        "tokens/000099.safetensors",
    ]


def test_a_partial_shard_of_the_cache_before_it_was_extended_is_checked_too(tmp_path: Path) -> None:
    short, before = finished_cache(tmp_path, hooks=HOOKS, tokens=700, shard_bytes=2**13)
    partial = before.shards[-1].parts[0]
    store, after = finished_cache(tmp_path, hooks=HOOKS, tokens=1400, shard_bytes=2**13)
    assert (short.root, partial.key in [entry.parts[0].key for entry in after.shards]) == (store.root, False)
    found = verify_cache(store)
    assert (found.problems, found.orphans) == ([], []), "jobs that asked for fewer rows still read it"
    assert (found.rows, found.bytes) == (1400, after.bytes)
    flip(store, partial.key, partial.bytes - 1)
    only_problem(verify_cache(store), partial.key, "differs from its CRC-32", shard=len(before.shards) - 1)


def test_hooks_that_were_added_later_are_checked_too(cache: tuple[FileStore, CacheManifest]) -> None:
    store, first = cache
    manifest = add_group(store, first, "layer.2", 4, drop_every=5)
    found = verify_cache(store)
    assert (found.problems, found.orphans) == ([], [])
    assert (found.parts, found.rows, found.bytes) == (2 * len(manifest.shards), 700, manifest.bytes)
    key = manifest.shards[SHARD].parts[1].key
    data, sidecar = store.get(key), store.get(sidecar_key(key))
    for name, place in manifest.layout(manifest.shards[SHARD], 1).tensors.items():
        flip(store, key, place.offset)
        only_problem(verify_cache(store), key, f"tensor {name} differs from its CRC-32")
        store.put(key, data)
    for change, told in (
        (lambda keep: keep[:2].fill_(2), "keep of 2 rows is neither 0 nor 1"),
        (lambda keep: keep.fill_(1), "the sidecar counts"),
    ):
        falsify(store, manifest, KEEP, change, group=1)
        only_problem(verify_cache(store), key, told)
        store.put(key, data)
        store.put(sidecar_key(key), sidecar)
        store.put(MANIFEST_KEY, manifest.to_bytes())
    edit_json(store, sidecar_key(key), lambda told: told.update(follows="0-0"))
    only_problem(verify_cache(store), sidecar_key(key), "other rows than the shard's first hooks have")
    store.put(sidecar_key(key), sidecar)
    store.delete(key)
    only_problem(verify_cache(store), key, "is missing")


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_an_unfinished_cache_what_is_stored_is_checked(tmp_path: Path, dtype: str) -> None:
    store, manifest = sound_cache(tmp_path, dtype=dtype)
    store.delete(MANIFEST_KEY)
    store.delete(sidecar_key(manifest.shards[0].parts[0].key))
    found = verify_cache(store)
    assert (found.problems, found.finished) == ([], False)
    assert found.parts == len(manifest.shards) - 1
    assert found.rows == manifest.tokens - manifest.shards[0].rows
    # Written, but not proved: the next attempt writes it again.
    assert found.orphans == [manifest.shards[0].parts[0].key]
    flip(store, part_of(manifest), manifest.shards[SHARD].parts[0].bytes - 1)
    (problem,) = verify_cache(store).problems
    assert (problem.shard, "CRC-32" in problem.what) == (SHARD, True)


def test_a_folder_that_is_no_cache_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no cache"):
        verify_cache(FileStore(tmp_path))


def test_a_cache_that_was_only_begun_is_empty(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    mark(store, "a")
    found = verify_cache(store)
    assert (found.finished, found.parts, found.problems) == (False, 0, [])


def test_a_marker_of_another_cache_is_found(cache: tuple[FileStore, CacheManifest]) -> None:
    store, _ = cache
    edit_json(store, MARKER_KEY, lambda told: told.update(identity="other"))
    only_problem(verify_cache(store), MARKER_KEY, "is of the cache other", shard=None)


def test_the_command_ends_with_0_or_2_and_a_line_for_each_problem(
    cache: tuple[FileStore, CacheManifest], capsys: pytest.CaptureFixture[str]
) -> None:
    store, manifest = cache
    uri = str(store.root)
    assert run_command_line(["cache", "verify", uri]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"file://{uri} is finished: 700 rows in {len(manifest.shards)} files of shards" in out
    assert "no problems" in out

    flip(store, part_of(manifest), manifest.shards[SHARD].parts[0].bytes - 1)
    store.delete(block_key(0))
    assert run_command_line(["cache", "verify", uri]) == 2
    out, err = capsys.readouterr()
    assert "2 problems" in out
    block, part = err.splitlines()
    assert block.startswith(f"sae-job: {store.uri}/{block_key(0)} is missing; delete tokens/000000.json")
    assert part.startswith(f"sae-job: shard {SHARD}: {store.uri}/{part_of(manifest)} tensor layer.1 differs")
    assert "spec.retry" in part

    assert run_command_line(["cache", "verify", uri, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["sound"], told["finished"], [problem["shard"] for problem in told["problems"]]) == (
        False,
        True,
        [None, SHARD],
    )


def test_a_cache_of_a_newer_format_is_told(
    cache: tuple[FileStore, CacheManifest], capsys: pytest.CaptureFixture[str]
) -> None:
    store, _ = cache
    edit_json(store, MANIFEST_KEY, lambda told: told.update(formatVersion=2))
    assert run_command_line(["cache", "verify", str(store.root)]) == 2
    assert "format 2" in capsys.readouterr().err
