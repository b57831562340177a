"""`sae-job cache ls | rm | gc`: what is a cache of ours is listed and removed, and nothing else is ever touched."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_job.activations.listing import find_caches, plan_removal, remove
from sae_job.activations.marker import CACHE_KIND, MARKER_KEY, is_ours, mark, marker_bytes
from sae_job.cli import run_command_line
from sae_job.errors import InvalidInput
from sae_job.storage.base import StoreError
from sae_job.storage.file_store import FileStore
from sae_job.storage.folder import StoreFolder
from tests.caches import finished_cache
from tests.faults import FaultPlan, fail

OTHER_MARKER = json.dumps({"kind": "SAETrainingJob", "specHash": "abc"}).encode()
# What a cache holds, as far as removal is concerned.
CACHE_KEYS = (
    "manifest.json",
    "last-used.json",
    "shards/000000.safetensors",
    "shards/000000.json",
    "shards/000001-12.safetensors",
    "shards/000001-12.json",
    "shards/000000.g1.safetensors",
    "shards/000000.g1.json",
    "tokens/index.json",
    "tokens/000000.safetensors",
    "tokens/000000.json",
    "model/config.json",
)


def put_cache(store: FileStore, folder: str = "", *, marker: bytes | None = None) -> None:
    inside = StoreFolder(store, folder)
    for key in CACHE_KEYS:
        inside.put(key, key.encode())
    inside.put(MARKER_KEY, marker_bytes("0123456789abcdef") if marker is None else marker)


def grow_old(store: FileStore, age: timedelta) -> None:
    """Make everything in a store look as if it had been written so long ago."""
    time = (datetime.now(UTC) - age).timestamp()
    for path in store.root.rglob("*"):
        if path.is_file():
            os.utime(path, (time, time))


def contents(store: FileStore) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list()}


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def test_a_real_cache_is_listed_with_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, manifest = finished_cache(tmp_path / "caches", hooks={"layer.0": 16, "layer.1": 8}, tokens=500)
    mark(cache, manifest.identity)
    assert run_command_line(["cache", "ls", str(tmp_path), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    sizes = [info.size for info in cache.list()]
    assert told["uri"] == f"file://{cache.root}"
    assert (told["identity"], told["state"]) == (manifest.identity, "Finished")
    assert (told["model"], told["hooks"], told["rows"]) == ("lookup", ["layer.0", "layer.1"], 500)
    assert (told["objects"], told["bytes"]) == (len(sizes), sum(sizes))

    assert run_command_line(["cache", "ls", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert manifest.identity in table
    assert f"file://{cache.root}\n" in table

    cache.delete("manifest.json")
    run_command_line(["cache", "ls", str(tmp_path), "--json"])
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["state"], told["rows"]) == ("Unfinished", 500), "the plan tells what it will be"


def test_only_folders_with_the_marker_of_a_cache_are_caches(store: FileStore) -> None:
    put_cache(store, "team/a")
    put_cache(store, "team/job", marker=OTHER_MARKER)
    put_cache(store, "team/damaged", marker=b"{")
    put_cache(store, "team/none")
    store.delete(f"team/none/{MARKER_KEY}")
    (found,) = find_caches(store)
    assert found.uri == f"{store.uri}/team/a"
    assert found.objects == len(CACHE_KEYS) + 1
    assert found.identity == "0123456789abcdef"


def test_a_cache_in_a_folder_that_is_called_like_a_copy_of_a_model_is_one_of_its_own(store: FileStore) -> None:
    put_cache(store, "imported")
    put_cache(store, "imported/model")
    assert [cache.uri for cache in find_caches(store)] == [f"{store.uri}/imported", f"{store.uri}/imported/model"]
    inner = {f"imported/model/{key}" for key in (*CACHE_KEYS, MARKER_KEY)}
    remove(plan_removal(StoreFolder(store, "imported")))
    assert set(contents(store)) == inner


def test_the_prefix_may_be_the_cache_itself(store: FileStore) -> None:
    put_cache(store)
    assert [cache.uri for cache in find_caches(store)] == [store.uri]


def test_an_empty_prefix_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["cache", "ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no caches below file://{tmp_path}\n"


def test_a_dry_run_says_what_would_go_and_deletes_nothing(store: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
    put_cache(store, "a")
    grow_old(store, timedelta(days=40))
    before = contents(store)
    size = sum(map(len, before.values()))
    assert run_command_line(["cache", "rm", f"{store.root}/a"]) == 0
    told = capsys.readouterr().out
    assert f"would delete file://{store.root}/a: {len(before)} objects, {size} B, last used 40 d ago" in told
    assert f"nothing was deleted; add --yes to free {size} B" in told
    assert run_command_line(["cache", "gc", str(store.root), "--unused-for", "30d"]) == 0
    told = capsys.readouterr().out
    assert "1 of 1 caches" in told
    assert "nothing was deleted" in told
    assert contents(store) == before


def test_rm_deletes_the_cache_and_leaves_what_is_not_ours(store: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
    put_cache(store, "a")
    put_cache(store, "b")
    store.put("a/notes.txt", b"mine")
    store.put("a/shards/000000.safetensors.bak", b"mine")
    store.put("a/tokens/deeper/index.json", b"mine")
    kept = {key: data for key, data in contents(store).items() if key.startswith("b/") or data == b"mine"}
    assert run_command_line(["cache", "rm", "--yes", f"file://{store.root}/a"]) == 0
    assert contents(store) == kept
    told = capsys.readouterr().out
    assert "deleted file://" in told
    assert "3 objects there are not ours and stay: notes.txt" in told


@pytest.mark.parametrize("marker", [OTHER_MARKER, b"{", b"[]", b'"text"', None], ids=["job", "cut", "[]", "text", "no"])
def test_rm_refuses_a_folder_without_the_marker_of_a_cache(
    store: FileStore, marker: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    put_cache(store, "a")
    put_cache(store, "b")
    store.delete(f"b/{MARKER_KEY}") if marker is None else store.put(f"b/{MARKER_KEY}", marker)
    before = contents(store)
    # The one that is a cache stays, too: nothing is deleted before all are known to be caches.
    assert run_command_line(["cache", "rm", "--yes", f"{store.root}/a", f"{store.root}/b"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"file://{store.root}/b" in line
    assert contents(store) == before


def test_a_prefix_of_caches_is_not_removed_as_one(store: FileStore, capsys: pytest.CaptureFixture[str]) -> None:
    put_cache(store, "team/a")
    before = contents(store)
    assert run_command_line(["cache", "rm", "--yes", f"{store.root}/team"]) == 2
    assert "cache ls" in capsys.readouterr().err
    assert contents(store) == before


FOLDERS = st.sampled_from(["", "a/", "a/b/", "a/shards/", "c/tokens/", "d/"])
KEYS = st.sampled_from([*CACHE_KEYS, "notes.txt", "shards/x.safetensors", "results.json", "shards/000000.json.bak"])
MARKERS = st.sampled_from([None, marker_bytes("1"), OTHER_MARKER, b"", b"{}", b'{"kind": ["ActivationCache"]}'])


@settings(max_examples=60)
@given(objects=st.sets(st.tuples(FOLDERS, KEYS), max_size=20), markers=st.dictionaries(FOLDERS, MARKERS, max_size=6))
def test_gc_and_rm_never_touch_what_has_no_marker(
    objects: set[tuple[str, str]], markers: dict[str, bytes | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = FileStore(tmp_path_factory.mktemp("gc"))
    for folder, key in objects:
        store.put(folder + key, b"x")
    for folder, marker in markers.items():
        if marker is not None:
            store.put(folder + MARKER_KEY, marker)
    caches = {folder for folder, marker in markers.items() if marker == marker_bytes("1")}
    before = contents(store)
    expected = {
        key: data
        for key, data in before.items()
        if not any(key.startswith(folder) and is_ours(key.removeprefix(folder)) for folder in caches)
    }
    for folder in {folder for folder, _ in objects} - caches:
        with pytest.raises(InvalidInput):
            plan_removal(StoreFolder(store, folder))
    grow_old(store, timedelta(days=2))
    assert run_command_line(["cache", "gc", str(store.root), "--unused-for", "1d", "--yes"]) == 0
    assert contents(store) == expected


def test_only_caches_that_nobody_used_for_so_long_are_collected(
    store: FileStore, capsys: pytest.CaptureFixture[str]
) -> None:
    put_cache(store, "old")
    put_cache(store, "building")
    put_cache(store, "read")
    grow_old(store, timedelta(days=40))
    # A worker stores another shard; a job begins to read.
    store.put("building/shards/000002.safetensors", b"new")
    store.put("read/last-used.json", b"{}")
    assert run_command_line(["cache", "gc", str(store.root), "--unused-for", "30d", "--yes"]) == 0
    told = capsys.readouterr().out
    assert f"deleted file://{store.root}/old:" in told
    assert "1 of 3 caches" in told
    assert [cache.uri for cache in find_caches(store)] == [f"{store.uri}/building", f"{store.uri}/read"]
    assert not any(key.startswith("old/") for key in contents(store))


def test_a_cache_that_begins_to_be_used_after_it_was_listed_is_not_collected(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_cache(store, "a")
    grow_old(store, timedelta(days=40))
    before = contents(store)
    from sae_job.activations import listing

    def use_it_meanwhile(prefix: FileStore) -> list[listing.FoundCache]:
        found = find_caches(prefix)
        store.put("a/last-used.json", b"{}")
        return found

    monkeypatch.setattr(listing, "find_caches", use_it_meanwhile)
    assert run_command_line(["cache", "gc", str(store.root), "--unused-for", "30d", "--yes"]) == 0
    assert contents(store).keys() == before.keys()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_removal_that_is_interrupted_anywhere_is_continued(
    store: FileStore, when: Literal["before", "after"]
) -> None:
    calls = len(CACHE_KEYS) + 1
    for number in range(1, calls + 1):
        put_cache(store)
        plan = FaultPlan(at=f"delete {plan_removal(store).keys[number - 1]}", action=fail, when=when)
        with pytest.raises(StoreError):
            remove(plan_removal(plan.wrap(store)))
        left = contents(store)
        gone = when == "after"
        if number == calls and gone:
            assert left == {}
            continue
        assert MARKER_KEY in left, "what is left can be removed by the same command"
        assert ("manifest.json" in left) == (number == 1 and not gone), "a half-deleted cache never looks complete"
        remove(plan_removal(store))
        assert contents(store) == {}


def test_a_file_never_outlives_what_proves_it(store: FileStore) -> None:
    put_cache(store)
    keys = plan_removal(store).keys
    assert sorted(keys) == sorted([*CACHE_KEYS, MARKER_KEY])
    assert keys[0] == "manifest.json"
    assert keys[-1] == MARKER_KEY
    for key in keys:
        if key.endswith(".safetensors"):
            assert keys.index(key.replace(".safetensors", ".json")) < keys.index(key)


@pytest.mark.parametrize("text", ["30", "d", "-3d", "30 days", "", "1y"])
def test_a_duration_that_is_none_is_told(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["cache", "gc", str(tmp_path), f"--unused-for={text}"]) == 2
    assert "30d, 12h" in capsys.readouterr().err


def test_s3_uris_lie_in_the_folder_that_stands_in_for_the_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_cache(FileStore(tmp_path / "bucket" / "caches"), "a")
    assert run_command_line(["cache", "ls", "s3://bucket/caches", "--store", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    assert run_command_line(["cache", "rm", "s3://bucket/caches/a", "--store", str(tmp_path), "--yes"]) == 0
    assert list(FileStore(tmp_path).list()) == []


def test_a_marker_that_is_there_stays(store: FileStore) -> None:
    assert mark(store, "a")
    assert not mark(store, "b")
    assert json.loads(store.get(MARKER_KEY))["identity"] == "a"
    assert json.loads(store.get(MARKER_KEY))["kind"] == CACHE_KIND
