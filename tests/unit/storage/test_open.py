"""From a location to its store: the table of schemes, the folder that stands in for S3, and credentials from
Secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_job.errors import InvalidInput
from sae_job.storage.file_store import FileStore
from sae_job.storage.open import open_store
from sae_job.storage.s3_store import S3Store, read_credentials
from sae_operator.api.store import SecretRef, StoreLocation


def test_schemes_choose_the_store() -> None:
    assert isinstance(open_store("file://some/folder"), FileStore)
    store = open_store("s3://bucket/a/b/")
    assert isinstance(store, S3Store)
    assert store.uri == "s3://bucket/a/b"


def test_a_local_folder_stands_in_for_s3(tmp_path: Path) -> None:
    store = open_store("s3://bucket/a/b", local_root=tmp_path)
    store.put("x", b"1")
    assert (tmp_path / "bucket" / "a" / "b" / "x").read_bytes() == b"1"
    assert store.uri == f"file://{tmp_path}/bucket/a/b"
    other = open_store(f"file://{tmp_path}/elsewhere", local_root=tmp_path / "unused")
    assert other.uri == f"file://{tmp_path}/elsewhere"


def test_another_scheme_is_refused_with_those_that_work() -> None:
    location = StoreLocation.model_construct(uri="gs://bucket/a")
    with pytest.raises(InvalidInput, match="use one of s3://, file://") as caught:
        open_store(location)
    assert caught.value.reason == "UnknownScheme"


def location() -> StoreLocation:
    return StoreLocation(uri="s3://bucket/a", secret_ref=SecretRef(name="team-s3"))


def test_credentials_come_from_the_mounted_secret(tmp_path: Path) -> None:
    folder = tmp_path / "team-s3"
    folder.mkdir()
    for key, value in {
        "AWS_ACCESS_KEY_ID": "id\n",
        "AWS_SECRET_ACCESS_KEY": "hidden",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_REGION": "eu-1",
    }.items():
        (folder / key).write_text(value)
    credentials = read_credentials(location(), tmp_path)
    assert (credentials.access_key_id, credentials.secret_access_key) == ("id", "hidden")
    assert (credentials.endpoint_url, credentials.region) == ("http://127.0.0.1:9", "eu-1")
    assert credentials.source == "Secret team-s3"
    assert "hidden" not in repr(credentials)


def test_a_secret_that_lacks_a_key_is_told(tmp_path: Path) -> None:
    (tmp_path / "team-s3").mkdir()
    (tmp_path / "team-s3" / "AWS_ACCESS_KEY_ID").write_text("id")
    with pytest.raises(InvalidInput, match="Secret team-s3 lacks AWS_SECRET_ACCESS_KEY") as caught:
        read_credentials(location(), tmp_path)
    assert caught.value.reason == "CredentialsRefused"


def test_without_a_mounted_secret_the_environment_serves(tmp_path: Path) -> None:
    for directory in (None, tmp_path):
        credentials = read_credentials(location(), directory)
        assert credentials.access_key_id is None
        assert "team-s3 is not mounted" in credentials.source
