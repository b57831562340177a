"""Files of a store on this machine: whole or not there, fetched once, and gone on with after a fault."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

import pytest

from sae_job.errors import InvalidInput, Stopped
from sae_job.models import download as download_module
from sae_job.models.download import download, download_folder
from sae_job.storage.base import ObjectInfo, StoreError
from sae_job.storage.file_store import FileStore
from tests.faults import KILLED, FaultPlan, fail, kill, run_in_child

PART = 1000
# Of 0, 1, 3 and 4 parts, the last of which is short.
SIZES = {"empty": 0, "small.json": 10, "even.bin": 3 * PART, "odd.bin": 3 * PART + 1}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "PART_BYTES", PART)
    monkeypatch.setattr(download_module, "THREADS", 2)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    store = FileStore(tmp_path / "store")
    for name, size in SIZES.items():
        store.put(f"model/{name}", os.urandom(size))
    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def expected(store: FileStore) -> dict[str, bytes]:
    return {name: store.get(f"model/{name}") for name in SIZES}


def test_the_files_are_there_and_nothing_else(store: FileStore, folder: Path) -> None:
    download(store, list(store.list()), folder, prefix="model/")
    assert files_of(folder) == expected(store)


def test_what_is_there_is_not_fetched_again(store: FileStore, folder: Path) -> None:
    objects = list(store.list())
    download(store, objects, folder, prefix="model/")
    plan = FaultPlan()
    download(plan.wrap(store), objects, folder, prefix="model/")
    assert plan.calls == 0


def test_after_a_failure_or_a_kill_at_any_call_each_part_is_fetched_once(store: FileStore, tmp_path: Path) -> None:
    objects, whole = list(store.list()), expected(store)
    counted = FaultPlan()
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    download(counted.wrap(store), objects, folder, prefix="model/")
    assert counted.calls == 8
    for call in range(1, counted.calls + 1):
        for action in (fail, kill):
            folder = tmp_path / f"{action.__name__}-{call}"
            folder.mkdir()
            disturbed, second = FaultPlan(at=call, action=action).wrap(store), FaultPlan()
            work = partial(download, disturbed, objects, folder, prefix="model/")
            if action is kill:
                assert run_in_child(work) == KILLED
            else:
                with pytest.raises(StoreError):
                    work()
            unfinished = {f"{name}{ending}" for name in SIZES for ending in (".partial", ".parts")}
            there = files_of(folder)
            assert {name: data for name, data in there.items() if name not in unfinished}.items() <= whole.items()
            download(second.wrap(store), objects, folder, prefix="model/")
            assert files_of(folder) == whole
            # Of the parts before the fault, those that other threads had under way may be fetched again.
            assert second.calls <= counted.calls - (call - 1) + download_module.THREADS


def test_an_object_that_is_shorter_than_it_was_listed_is_no_file(store: FileStore, folder: Path) -> None:
    listed = ObjectInfo("model/odd.bin", SIZES["odd.bin"] + PART, "")
    with pytest.raises(StoreError, match="shorter than the 4001 bytes"):
        download(store, [listed], folder, prefix="model/")
    assert not (folder / "odd.bin").exists()


def test_a_stop_keeps_what_is_there(store: FileStore, folder: Path) -> None:
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        download(store, list(store.list()), folder, prefix="model/", should_stop=lambda: next(asked, True))
    plan = FaultPlan()
    download(plan.wrap(store), list(store.list()), folder, prefix="model/")
    assert plan.calls == 8 - 2
    assert files_of(folder) == expected(store)


def test_a_folder_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = download_folder("model-1")
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    folder.parent.rename(tmp_path / f"sae-operator-{other}")
    with pytest.raises(InvalidInput, match="another user's") as caught:
        download_folder("model-1")
    assert caught.value.reason == "TemporaryFolderTaken"
