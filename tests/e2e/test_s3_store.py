"""The S3 store against a real S3 server: what every store promises, in parts and ranges, and what errors tell."""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path

import pytest
import torch

from sae_job.activations.reader import CachedActivations
from sae_job.errors import InvalidInput
from sae_job.steps.cache import write_shards
from sae_job.steps.finalize import run_finalize
from sae_job.storage import s3_store
from sae_job.storage.base import ObjectNotFound, ObjectStore, PreconditionFailed, StoreError
from sae_job.storage.open import open_store
from sae_job.storage.s3_store import MULTIPART_BYTES, S3Store, read_credentials
from sae_operator.api.store import SecretRef, StoreLocation
from tests.caches import LookupModel, cache_spec, cache_step, finished_cache, prepare_tokens, step_context
from tests.faults import folder_bytes
from tests.testbed.object_server import ObjectServer

SECRET = "team-s3"


@pytest.fixture(scope="module")
def secrets(object_server: ObjectServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mounted Secrets: the right one, and two wrong ones."""
    folder = tmp_path_factory.mktemp("secrets")
    for name, identity, key in (
        (SECRET, object_server.access_key, object_server.secret_key),
        ("wrong-key", object_server.access_key, "not-the-secret-key"),
        ("wrong-id", "nobody", object_server.secret_key),
    ):
        (folder / name).mkdir()
        (folder / name / "AWS_ACCESS_KEY_ID").write_text(identity)
        (folder / name / "AWS_SECRET_ACCESS_KEY").write_text(key)
        (folder / name / "AWS_ENDPOINT_URL").write_text(object_server.endpoint)
    return folder


@pytest.fixture(scope="module")
def bucket(object_server: ObjectServer) -> str:
    name = f"store-{uuid.uuid4().hex[:8]}"
    object_server.create_bucket(name)
    return name


@pytest.fixture
def store(bucket: str, secrets: Path) -> ObjectStore:
    location = StoreLocation(uri=f"s3://{bucket}/{uuid.uuid4().hex}/prefix/", secret_ref=SecretRef(name=SECRET))
    return open_store(location, secrets_directory=secrets)


def test_what_is_put_is_read_back(store: ObjectStore) -> None:
    info = store.put("a/b", b"0123456789")
    assert (info.key, info.size) == ("a/b", 10)
    assert store.get("a/b") == b"0123456789"
    assert store.head("a/b") == info
    assert list(store.list()) == [info]
    store.put("empty", b"")
    assert store.get("empty") == b""


def test_ranges_end_at_the_end_of_the_object(store: ObjectStore) -> None:
    store.put("x", b"0123456789")
    assert store.get_range("x", 2, 3) == b"234"
    assert store.get_range("x", 8, 10) == b"89"
    assert store.get_range("x", 30, 10) == b""
    buffer = bytearray(4)
    assert store.read_into("x", 8, memoryview(buffer)) == 2
    assert bytes(buffer[:2]) == b"89"


def test_missing_objects(store: ObjectStore) -> None:
    assert store.head("missing") is None
    with pytest.raises(ObjectNotFound, match="missing"):
        store.get("missing")
    store.delete("missing")
    assert list(store.list()) == []


def test_conditional_writes(store: ObjectStore) -> None:
    seen = store.put("x", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put("x", b"2", if_absent=True)
    store.put("x", b"2", if_match=seen.etag)
    with pytest.raises(PreconditionFailed):
        store.put("x", b"3", if_match=seen.etag)
    with pytest.raises(PreconditionFailed):
        store.put("never", b"3", if_match=seen.etag)
    assert store.get("x") == b"2"


def test_of_many_writers_that_race_one_wins(store: ObjectStore) -> None:
    barrier = threading.Barrier(8)
    won: list[int] = []

    def write(number: int) -> None:
        barrier.wait()
        try:
            store.put("race", str(number).encode(), if_absent=True)
        except PreconditionFailed:
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("race") == str(won[0]).encode()


def test_large_objects_go_up_in_parts_and_come_back_in_ranges(store: ObjectStore, tmp_path: Path) -> None:
    data = os.urandom(2**20) * 81 + b"tail"
    assert len(data) > MULTIPART_BYTES
    from_memory = store.put("memory", memoryview(data))
    (tmp_path / "file").write_bytes(data)
    from_file = store.put_file("file", tmp_path / "file")
    assert from_memory.size == from_file.size == len(data)
    assert from_memory.etag == from_file.etag
    buffer = bytearray(len(data))
    half = len(data) // 2
    assert store.read_into("memory", 0, memoryview(buffer)[:half]) == half
    assert store.read_into("memory", half, memoryview(buffer)[half:]) == len(data) - half
    assert buffer == data
    assert store.get("file") == data


def test_listing_goes_on_past_a_page(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_store, "LIST_KEYS", 10)
    keys = [f"many/{number:04d}" for number in range(35)]
    for key in keys:
        store.put(key, b"")
    store.put("other", b"")
    assert [info.key for info in store.list("many/")] == keys


def open_as(secret: str, bucket: str, secrets: Path) -> ObjectStore:
    location = StoreLocation(uri=f"s3://{bucket}/prefix", secret_ref=SecretRef(name=secret))
    return open_store(location, secrets_directory=secrets)


CALLS = {
    "get": lambda store: store.get("x"),
    "head": lambda store: store.head("x"),
    "put": lambda store: store.put("x", b""),
    "list": lambda store: list(store.list()),
    "delete": lambda store: store.delete("x"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_bucket_is_told_by_every_call(call: str, secrets: Path, object_server: ObjectServer) -> None:
    with pytest.raises(InvalidInput) as caught:
        CALLS[call](open_as(SECRET, "no-such-bucket", secrets))
    assert caught.value.reason == "BucketNotFound"
    assert f"bucket no-such-bucket at {object_server.endpoint} does not exist" in caught.value.message


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("secret", ["wrong-key", "wrong-id"])
def test_refused_credentials_are_told_by_every_call_without_the_keys(
    call: str, secret: str, bucket: str, secrets: Path, object_server: ObjectServer
) -> None:
    with pytest.raises(InvalidInput) as caught:
        CALLS[call](open_as(secret, bucket, secrets))
    assert caught.value.reason == "CredentialsRefused"
    message = str(caught.value)
    assert f"bucket {bucket} at {object_server.endpoint} refuses the credentials of Secret {secret}" in message
    assert object_server.secret_key not in message
    assert "not-the-secret-key" not in message


def test_a_server_that_is_not_there_is_told_after_a_few_tries(bucket: str, secrets: Path) -> None:
    location = StoreLocation(
        uri=f"s3://{bucket}/prefix", endpoint_url="http://127.0.0.1:1", secret_ref=SecretRef(name=SECRET)
    )
    store = S3Store(location, read_credentials(location, secrets), attempts=2)
    with pytest.raises(StoreError, match=r"at http://127.0.0.1:1 cannot be reached .*check endpointUrl"):
        store.get("x")


def test_a_cache_on_s3_is_the_same_as_in_a_folder_byte_for_byte(
    store: ObjectStore, bucket: str, secrets: Path, tmp_path: Path
) -> None:
    hooks = {"layer.0": 16}
    spec = cache_spec(tmp_path, hooks=hooks, tokens=1000, dtype="float32")
    step = cache_step(spec)
    context = step_context(open_store=lambda location: store)
    prepare_tokens(store, spec, hooks)
    for _ in range(2):
        write_shards(step, context, lambda _: LookupModel(hooks, dtype=torch.float32), device="cpu")
        run_finalize(step, context)
    folder, _ = finished_cache(tmp_path, hooks=hooks, tokens=1000, dtype="float32")
    on_s3 = {info.key: store.get(info.key) for info in store.list()}
    assert on_s3 == folder_bytes(folder.root)

    batches = []
    for place in (store, folder):
        reader = CachedActivations.open(place, hooks=["layer.0"], batch_size=64, seed=3, held_out_contexts=4)
        batches.append(torch.cat([reader.next_batch()["layer.0"] for _ in range(30)]))
        reader.close()
    assert torch.equal(*batches)
