"""The commands that look after caches, on a real S3 server, with credentials as AWS tools take them."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sae_job.activations.marker import mark
from sae_job.cli import run_command_line
from sae_job.storage.base import ObjectStore
from sae_job.storage.open import open_store
from sae_operator.api.store import StoreLocation
from tests.caches import finished_cache
from tests.testbed.object_server import ObjectServer


@pytest.fixture
def prefix(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of an empty prefix; the environment opens it."""
    name = f"caches-{uuid.uuid4().hex[:8]}"
    object_server.create_bucket(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_server.secret_key)
    return f"s3://{name}/caches"


def store_at(object_server: ObjectServer, uri: str) -> ObjectStore:
    return open_store(StoreLocation(uri=uri, endpoint_url=object_server.endpoint))


def test_s3_tells_when_objects_were_written(object_server: ObjectServer, prefix: str) -> None:
    store = store_at(object_server, prefix)
    store.put("x", b"")
    (listed,) = store.list()
    looked_at = store.head("x")
    assert looked_at is not None
    for info in (listed, looked_at):
        assert info.modified is not None
        assert abs(datetime.now(UTC) - info.modified) < timedelta(minutes=1)


def test_a_cache_on_s3_is_listed_verified_and_removed(
    object_server: ObjectServer, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, manifest = finished_cache(tmp_path, tokens=500)
    mark(folder, manifest.identity)
    store = store_at(object_server, f"{prefix}/team/numbers")
    for info in folder.list():
        store.put(info.key, folder.get(info.key))
    beside = store_at(object_server, prefix)
    beside.put("team/notes.txt", b"mine")

    def run(*arguments: str) -> tuple[int, str]:
        code = run_command_line(["cache", *arguments, "--endpoint-url", object_server.endpoint])
        return code, capsys.readouterr().out

    code, out = run("ls", prefix, "--json")
    (told,) = json.loads(out)
    assert (code, told["uri"], told["rows"]) == (0, f"{prefix}/team/numbers", 500)
    assert run("inspect", told["uri"])[0] == 0
    code, out = run("verify", told["uri"])
    assert (code, "no problems" in out) == (0, True)
    code, out = run("gc", prefix, "--unused-for", "1h", "--yes")
    assert (code, "0 of 1 caches" in out) == (0, True)
    code, out = run("rm", told["uri"])
    assert (code, "would delete" in out) == (0, True)
    assert len(list(store.list())) == told["objects"]
    assert run("rm", "--yes", told["uri"])[0] == 0
    assert [info.key for info in beside.list()] == ["team/notes.txt"]
