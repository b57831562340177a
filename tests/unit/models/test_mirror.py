"""Models from an object store: the user's own folder, and the copy of a Hub model beside a cache."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.errors import InvalidInput, Stopped
from sae_job.models.mirror import (
    MIRROR_PREFIX,
    LocalModel,
    localized,
    mirror_model,
    mirrored_commit,
    needed,
)
from sae_job.storage.base import ObjectInfo, StoreError
from sae_job.storage.file_store import FileStore
from sae_job.storage.open import open_store
from sae_job.text.tokenize import load_tokenizer
from sae_operator.api.activation_cache import ModelSource
from sae_operator.api.store import StoreLocation
from tests.faults import FaultPlan, fail
from tests.tiny_model import WIDTH, write_tiny_model

HOOK = "model.layers.1"
TOKENS = torch.arange(24).reshape(2, 12)
NAME = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
S3_NAME = "s3://bucket/models/tiny/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def no_store(location: StoreLocation) -> FileStore:
    raise AssertionError(f"{location.uri} is opened")


def activations_of(model: LocalModel) -> torch.Tensor:
    return model.load_hooked([HOOK], device="cpu").activations(TOKENS)[HOOK]


def loaded_from(folder: Path) -> torch.Tensor:
    return activations_of(LocalModel(ModelSource(name=str(folder), dtype="float32"), "", None))


class Bucket:
    """Folders that stand for S3; remembers how they were opened."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.opened: list[StoreLocation] = []

    def open(self, location: StoreLocation) -> Any:
        self.opened.append(location)
        return open_store(location, local_root=self.root)

    def fill(self, folder: Path) -> None:
        store = FileStore(self.root / "bucket/models/tiny")
        for path in folder.iterdir():
            store.put_file(path.name, path)


@pytest.fixture
def bucket(tmp_path: Path, folder: Path) -> Bucket:
    bucket = Bucket(tmp_path / "s3")
    bucket.fill(folder)
    return bucket


def s3_source(**options: Any) -> ModelSource:
    return ModelSource.model_validate({"name": S3_NAME, "dtype": "float32", **options})


def test_a_model_in_a_bucket_is_the_same_model(bucket: Bucket, folder: Path) -> None:
    model = localized(s3_source(), open_store=bucket.open)
    assert torch.equal(activations_of(model), loaded_from(folder))
    assert model.load_full(device="cpu").cross_entropy(TOKENS)[1] == 22
    assert (
        load_tokenizer(model.source)("a")["input_ids"] == load_tokenizer(ModelSource(name=str(folder)))("a").input_ids
    )


def test_the_store_is_opened_as_the_source_says(bucket: Bucket) -> None:
    access = {"endpointUrl": "http://127.0.0.1:1", "region": "nowhere", "secretRef": {"name": "models"}}
    localized(s3_source(store=access), open_store=bucket.open)
    (location,) = bucket.opened
    assert location.model_dump(by_alias=True) == {**access, "uri": "s3://bucket/models/tiny"}


def test_what_is_recorded_is_the_address_and_a_digest_of_the_files(bucket: Bucket, folder: Path) -> None:
    model = localized(s3_source(), open_store=bucket.open, weights=False)
    facts = model.inspect([HOOK])
    assert (facts.name, facts.source, facts.d_in) == (S3_NAME, model.source, {HOOK: WIDTH})
    assert facts.revision is not None
    assert len(facts.revision) == 40
    again = localized(s3_source(), open_store=bucket.open, revision=facts.revision)
    assert again.revision == facts.revision
    bucket.fill(folder)
    with pytest.raises(InvalidInput, match="not those that this cache was begun with") as caught:
        localized(s3_source(), open_store=bucket.open, revision=facts.revision)
    assert (caught.value.reason, caught.value.field) == ("ModelChanged", "spec.model.name")


def test_facts_need_no_weights(bucket: Bucket) -> None:
    model = localized(s3_source(), open_store=bucket.open, weights=False)
    assert not list(Path(model.source.name).glob("*.safetensors"))
    assert model.inspect([HOOK]).d_in == {HOOK: WIDTH}
    localized(s3_source(), open_store=bucket.open)
    assert [path.name for path in Path(model.source.name).glob("*.safetensors")] == ["model.safetensors"]


def test_a_place_without_a_model_is_told(bucket: Bucket) -> None:
    with pytest.raises(InvalidInput, match=r"s3://bucket/elsewhere holds no config\.json") as caught:
        localized(s3_source(name="s3://bucket/elsewhere"), open_store=bucket.open)
    assert (caught.value.reason, caught.value.field) == ("ModelNotFound", "spec.model.name")


def test_messages_name_the_address_and_not_the_folder_that_stands_for_it(bucket: Bucket) -> None:
    FileStore(bucket.root / "bucket/models/tiny").put("model.safetensors", b"no weights")
    model = localized(s3_source(), open_store=bucket.open)
    with pytest.raises(InvalidInput) as caught:
        model.load_hooked([HOOK], device="cpu")
    assert (caught.value.reason, caught.value.field) == ("ModelUnreadable", "spec.model.name")
    assert S3_NAME in caught.value.message
    assert model.source.name not in caught.value.message


FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
}
OTHERS = {"README.md", "training_args.bin", "original/consolidated.00.pth", "onnx/model.onnx", "tf_model.h5"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
PICKLES = {"pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"}


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (SHARDS | PICKLES | {"consolidated.safetensors"}, SHARDS),
        ({"model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"}, {"model.safetensors"}),
        ({"weights.safetensors", "pytorch_model.bin"}, {"weights.safetensors"}),
        (PICKLES, PICKLES),
    ],
)
def test_weights_are_fetched_once_and_pickles_only_where_there_is_nothing_else(
    there: set[str], chosen: set[str]
) -> None:
    objects = [ObjectInfo(f"model/{name}", 1, "") for name in there | FILES | OTHERS]
    assert {info.key for info in needed(objects, "model/", weights=True)} == {
        f"model/{name}" for name in chosen | FILES
    }
    text = FILES | {name for name in chosen if name.endswith(".safetensors.index.json")}
    assert {info.key for info in needed(objects, "model/", weights=False)} == {f"model/{name}" for name in text}


# Mirrors


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub as a machine without a network has it: a snapshot in the local Hub cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    (snapshot / "README.md").write_text("a model")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


@pytest.fixture
def cache(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "cache")


def hub_source(**options: Any) -> ModelSource:
    return ModelSource.model_validate({"name": NAME, "dtype": "float32", "mirror": True, **options})


def remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_prepare_copies_a_hub_model_once_and_pods_need_nothing_but_the_store(
    hub: Path, cache: FileStore, folder: Path
) -> None:
    prepared = localized(hub_source(), open_store=no_store, mirror=cache, make_mirror=True, weights=False)
    assert (prepared.name, prepared.revision, mirrored_commit(cache)) == (NAME, COMMIT, COMMIT)
    assert prepared.inspect([HOOK]).name == NAME
    remove(hub)
    worker = localized(hub_source(), open_store=no_store, mirror=cache, revision=COMMIT)
    assert torch.equal(activations_of(worker), loaded_from(folder))
    copied = {info.key.removeprefix(MIRROR_PREFIX) for info in cache.list(MIRROR_PREFIX)}
    assert copied == {path.name for path in folder.iterdir()} | {"mirror.json", "mirror-begun.json"}
    plan = FaultPlan()
    localized(hub_source(), open_store=no_store, mirror=plan.wrap(cache), make_mirror=True, weights=False)
    assert not [name for name in plan.names if name.startswith("put")]


def test_a_copy_that_failed_anywhere_is_gone_on_with(hub: Path, cache: FileStore, folder: Path, tmp_path: Path) -> None:
    counted = FaultPlan()
    mirror_model(NAME, COMMIT, counted.wrap(cache))
    for call in range(1, counted.calls + 1):
        store = FileStore(tmp_path / f"cache-{call}")
        with pytest.raises(StoreError):
            mirror_model(NAME, COMMIT, FaultPlan(at=call, action=fail).wrap(store))
        assert mirrored_commit(store) is None
        second = FaultPlan()
        mirror_model(NAME, COMMIT, second.wrap(store))
        assert mirrored_commit(store) == COMMIT
        assert second.calls <= counted.calls
        assert store.get("model/model.safetensors") == (folder / "model.safetensors").read_bytes()


def test_what_another_commit_left_is_not_taken_for_this_one(hub: Path, cache: FileStore, folder: Path) -> None:
    config = (folder / "config.json").read_bytes()
    cache.put("model/mirror-begun.json", json.dumps({"name": NAME, "commit": "f" * 40}).encode())
    cache.put("model/config.json", b" " * len(config))
    mirror_model(NAME, COMMIT, cache)
    assert cache.get("model/config.json") == config


def test_a_stop_ends_the_copy_without_its_marker(hub: Path, cache: FileStore) -> None:
    with pytest.raises(Stopped):
        mirror_model(NAME, COMMIT, cache, should_stop=lambda: True)
    assert mirrored_commit(cache) is None


def test_a_mirror_of_another_commit_is_refused(hub: Path, cache: FileStore) -> None:
    mirror_model(NAME, COMMIT, cache)
    with pytest.raises(InvalidInput, match="remove the copy") as caught:
        localized(hub_source(), open_store=no_store, mirror=cache, revision="f" * 40)
    assert (caught.value.reason, caught.value.field) == ("MirrorChanged", "spec.model.mirror")


def test_without_a_mirror_the_source_stays_as_it_is(hub: Path, cache: FileStore, folder: Path) -> None:
    plain = hub_source(mirror=False)
    assert localized(plain, open_store=no_store, mirror=cache, make_mirror=True) == LocalModel(plain, NAME, None)
    # A worker of a cache that was prepared before mirror was set asks the Hub.
    assert localized(hub_source(), open_store=no_store, mirror=cache, revision=COMMIT).source == hub_source()
    local = ModelSource(name=str(folder), mirror=True)
    assert localized(local, open_store=no_store, mirror=cache, make_mirror=True).source == local
    assert not list(cache.list())
