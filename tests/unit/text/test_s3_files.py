"""Data sets in an object store: the same rows as from a folder, one file on disk at a time."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from sae_job.errors import InvalidInput
from sae_job.storage.file_store import FileStore
from sae_job.text.documents import Documents, open_documents
from sae_operator.api.activation_cache import DatasetSource
from sae_operator.api.store import StoreLocation


class Bucket:
    """A folder that stands in for S3."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open_store(self, location: StoreLocation) -> FileStore:
        return FileStore(self.root / location.uri.removeprefix("s3://"), location.uri)

    def documents(self, path: str, **source: object) -> Documents:
        return open_documents(DatasetSource.model_validate({"path": path, **source}), open_store=self.open_store)


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    root = tmp_path / "bucket-root"
    folder = root / "bucket" / "data"
    folder.mkdir(parents=True)
    for name, rows in {"train-0": ["a", "b"], "train-1": ["c"], "test-0": ["t"]}.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps({'text': row})}\n" for row in rows))
    return Bucket(root)


def test_a_prefix_is_read_as_a_folder_is(bucket: Bucket) -> None:
    assert list(bucket.documents("s3://bucket/data/").texts()) == ["a", "b", "c"]
    assert list(bucket.documents("s3://bucket/data").texts(skip=2)) == ["c"]
    assert list(bucket.documents("s3://bucket/data", split="test").texts()) == ["t"]
    assert list(bucket.documents("s3://bucket/data", dataFiles=["train-1.jsonl"]).texts()) == ["c"]


def test_one_object_is_a_data_set(bucket: Bucket) -> None:
    assert list(bucket.documents("s3://bucket/data/test-0.jsonl").texts()) == ["t"]


def test_a_saved_data_set_is_read_in_its_order(bucket: Bucket) -> None:
    import datasets

    datasets.Dataset.from_dict({"tokens": [[1, 2], [3, 4], [5, 6]]}).save_to_disk(
        bucket.root / "bucket" / "set", num_shards=2
    )
    rows = [row for _, row in bucket.documents("s3://bucket/set").token_rows()]
    assert rows == [[1, 2], [3, 4], [5, 6]]


def test_one_file_lies_on_disk_at_a_time_and_none_afterwards(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    there = [len(list(scratch.rglob("*.jsonl"))) for _ in bucket.documents("s3://bucket/data").texts()]
    assert there == [1, 1, 1]
    assert list(scratch.rglob("*.jsonl")) == []


def test_the_fingerprint_follows_the_objects(bucket: Bucket) -> None:
    before = bucket.documents("s3://bucket/data").record.fingerprint
    assert bucket.documents("s3://bucket/data").record.fingerprint == before
    (bucket.root / "bucket" / "data" / "train-1.jsonl").write_text('{"text": "changed"}\n')
    assert bucket.documents("s3://bucket/data").record.fingerprint != before


def test_an_object_that_changes_meanwhile_is_told(bucket: Bucket) -> None:
    documents = bucket.documents("s3://bucket/data")
    (bucket.root / "bucket" / "data" / "train-1.jsonl").write_text('{"text": "another text"}\n')
    with pytest.raises(InvalidInput, match=r"train-1\.jsonl was changed") as caught:
        list(documents.texts())
    assert caught.value.reason == "DatasetChanged"


def test_an_empty_prefix_is_told(bucket: Bucket) -> None:
    with pytest.raises(InvalidInput, match="holds no objects") as caught:
        bucket.documents("s3://bucket/nothing")
    assert (caught.value.reason, caught.value.field) == ("DatasetNotFound", "spec.dataset.path")
