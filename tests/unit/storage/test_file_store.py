"""A folder as an object store: whole objects, conditional writes, no way out of the folder, clear errors."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_job.errors import InvalidInput
from sae_job.storage.base import MapsObjects, NoSpaceLeft, ObjectNotFound, PreconditionFailed, StoreError
from sae_job.storage.file_store import FileStore, path_of_file_uri
from tests.faults import KILLED, kill, run_in_child


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def test_what_is_put_is_read_back(store: FileStore) -> None:
    info = store.put("a/b", b"0123456789")
    assert (info.key, info.size) == ("a/b", 10)
    assert store.get("a/b") == b"0123456789"
    assert store.head("a/b") == info
    assert list(store.list()) == [info]


def test_ranges_end_at_the_end_of_the_object(store: FileStore) -> None:
    store.put("x", b"0123456789")
    assert store.get_range("x", 2, 3) == b"234"
    assert store.get_range("x", 8, 10) == b"89"
    assert store.get_range("x", 30, 10) == b""


def test_reading_into_a_buffer_tells_how_much_there_was(store: FileStore) -> None:
    store.put("x", b"0123456789")
    buffer = bytearray(4)
    assert store.read_into("x", 1, memoryview(buffer)) == 4
    assert bytes(buffer) == b"1234"
    assert store.read_into("x", 8, memoryview(buffer)) == 2
    assert bytes(buffer) == b"8934"


def test_a_map_shows_what_was_there_when_it_was_made(store: FileStore) -> None:
    """Also from places between pages, and after the object is gone."""
    data = bytes(range(256)) * 100
    store.put("x", data)
    assert isinstance(store, MapsObjects)
    views = {
        place: store.map("x", *place) for place in [(0, 25_600), (1, 5000), (4096, 9), (20_001, 9999), (25_600, 1)]
    }
    store.put("x", b"other")
    store.delete("x")
    for (start, length), view in views.items():
        assert view == data[start : start + length]
    with pytest.raises(ObjectNotFound, match="/x: no such object"):
        store.map("x", 0, 1)


def test_a_large_file_is_uploaded_whole(store: FileStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    data = bytes(range(256)) * 40_000
    source.write_bytes(data)
    assert store.put_file("big", source).size == len(data)
    assert store.get("big") == data


def test_a_missing_object_is_told(store: FileStore) -> None:
    store.put("a/b", b"")
    for key in ("missing", "a", "a/b/c"):
        assert store.head(key) is None
        with pytest.raises(ObjectNotFound, match=key):
            store.get(key)
        store.delete(key)


def test_if_absent_never_replaces(store: FileStore) -> None:
    store.put("x", b"first", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put("x", b"second", if_absent=True)
    assert store.get("x") == b"first"


def test_if_match_replaces_only_the_version_that_was_seen(store: FileStore) -> None:
    seen = store.put("x", b"1")
    now = store.put("x", b"2", if_match=seen.etag)
    assert now.etag != seen.etag
    with pytest.raises(PreconditionFailed):
        store.put("x", b"3", if_match=seen.etag)
    with pytest.raises(PreconditionFailed):
        store.put("y", b"3", if_match=seen.etag)
    assert store.get("x") == b"2"


def test_every_write_changes_the_etag_even_of_equal_bytes(store: FileStore) -> None:
    etags = {store.put("x", b"same").etag for _ in range(5)}
    assert len(etags) == 5


def test_of_many_writers_that_race_one_wins(store: FileStore) -> None:
    barrier = threading.Barrier(16)
    won: list[int] = []

    def write(number: int) -> None:
        barrier.wait()
        try:
            store.put("race", str(number).encode(), if_absent=True)
        except PreconditionFailed:
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("race") == str(won[0]).encode()


def test_readers_see_whole_objects_while_they_are_replaced(store: FileStore) -> None:
    versions = [bytes([number]) * 2**20 for number in range(2)]
    store.put("x", versions[0])
    done = threading.Event()

    def write() -> None:
        for number in range(60):
            store.put("x", versions[number % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert store.get("x") in versions
    writer.join()


KEYS = st.lists(st.text(alphabet="ab.-_0/", min_size=1, max_size=8), max_size=12)


@given(keys=KEYS, prefix=st.text(alphabet="ab.-_0/", max_size=4))
def test_keys_are_listed_in_order_by_prefix(
    keys: list[str], prefix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = FileStore(tmp_path_factory.mktemp("list"))
    put: set[str] = set()
    for key in keys:
        try:
            store.put(key, b"")
        except StoreError:
            # Not a key, or a folder of another key.
            continue
        put.add(key)
    assert [info.key for info in store.list(prefix)] == sorted(key for key in put if key.startswith(prefix))


def test_deleting_leaves_no_empty_folders(store: FileStore) -> None:
    store.put("a/b/c", b"")
    store.put("a/d", b"")
    store.delete("a/b/c")
    assert os.listdir(store.root) == ["a"]
    store.delete("a/d")
    assert os.listdir(store.root) == []


@pytest.mark.parametrize("key", ["", "..", "../x", "a/../../x", "/x", "a//b", "a/./b", "a/"])
def test_what_is_no_key_is_refused(store: FileStore, key: str) -> None:
    with pytest.raises(StoreError, match="is not a key"):
        store.put(key, b"")


def test_a_link_that_leads_out_is_refused_and_not_listed(store: FileStore, tmp_path: Path) -> None:
    store.put("x", b"")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    (store.root / "link").symlink_to(tmp_path / "outside")
    (store.root / "file").symlink_to(tmp_path / "outside" / "secret")
    for key in ("link/secret", "file"):
        with pytest.raises(StoreError, match="leads out of the store"):
            store.get(key)
        with pytest.raises(StoreError, match="leads out of the store"):
            store.put(key, b"")
    assert [info.key for info in store.list()] == ["x"]
    assert (tmp_path / "outside" / "secret").read_bytes() == b"secret"


def test_a_relative_uri_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = FileStore(path_of_file_uri("file://out/run"))
    store.put("x", b"1")
    assert (tmp_path / "out" / "run" / "x").read_bytes() == b"1"
    monkeypatch.chdir("/")
    assert store.get("x") == b"1"


@pytest.mark.parametrize("call", ["os.fsync", "os.rename", "os.link", "os.write"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_inside_a_write_the_object_is_whole_and_can_be_written_again(
    store: FileStore, call: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditional = call == "os.link"
    before, after = b"before" * 1000, b"after" * 1000
    if not conditional:
        store.put("x", before)

    def write() -> None:
        name = call.removeprefix("os.")
        real = getattr(os, name)

        def killing(*arguments: object) -> None:
            if when == "after":
                real(*arguments)
            kill()

        monkeypatch.setattr(os, name, killing)
        store.put("x", after, if_absent=conditional)

    assert run_in_child(write) == KILLED
    if conditional:
        assert store.head("x") is None or store.get("x") == after
    else:
        assert store.get("x") in (before, after)
    store.put("x", b"again")
    assert store.get("x") == b"again"
    assert [info.key for info in store.list()] == ["x"]
    assert os.listdir(store.root) == ["x"], "what the dead writer left is gone"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB (mounting it needs root)."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True, capture_output=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def test_a_full_disk_is_told_and_loses_nothing(small_disk: Path) -> None:
    store = FileStore(small_disk)
    store.put("x", b"1" * 30_000)
    with pytest.raises(NoSpaceLeft, match=r"file://.*/x: no space left for 50000 bytes; free some space"):
        store.put("x", b"2" * 50_000)
    assert store.get("x") == b"1" * 30_000
    assert os.listdir(small_disk) == ["x"]
    store.put("y", b"3" * 20_000)


def test_a_folder_that_must_not_be_written_is_told_as_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    store = FileStore(tmp_path / "closed" / "store")

    def write() -> int:
        # Root may write everywhere.
        os.setuid(65534)
        with pytest.raises(InvalidInput) as caught:
            store.put("x", b"")
        assert caught.value.reason == "AccessDenied"
        assert "Permission denied for user 65534" in caught.value.message
        return 7

    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.getuid() and str(parent).startswith("/tmp/"):
            os.chmod(parent, 0o755)
    assert run_in_child(write) == 7
