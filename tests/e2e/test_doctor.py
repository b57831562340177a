"""`sae-job doctor` against a real S3 server: what it needs of a store is there, and a user's mistakes are named."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from sae_job.cli import run_command_line
from tests.testbed.object_server import ObjectServer


@pytest.fixture(scope="module")
def bucket(object_server: ObjectServer) -> str:
    return object_server.create_bucket(f"doctor-{uuid.uuid4().hex[:8]}")


def mounted(folder: Path, server: ObjectServer, *, key: str | None = None) -> Path:
    """A Secret as the kubelet mounts it."""
    folder.mkdir()
    (folder / "AWS_ACCESS_KEY_ID").write_text(server.access_key)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(key or server.secret_key)
    return folder


def doctor(server: ObjectServer, uri: str, secret: Path) -> int:
    options = [f"--store={uri}", f"--endpoint-url={server.endpoint}", f"--secret={secret}", "--port=0"]
    return run_command_line(["doctor", *options])


def test_a_real_server_keeps_all_promises_and_nothing_is_left(
    object_server: ObjectServer, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = mounted(tmp_path / "team-s3", object_server)
    assert doctor(object_server, f"s3://{bucket}/team", secret) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " store, " in line]
    assert len(lines) == 9
    assert any("32 MiB in one object: written at" in line for line in lines), "in parts"
    left = object_server.client().list_objects_v2(Bucket=bucket)
    assert left["KeyCount"] == 0, left
    assert not object_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads")


@pytest.mark.parametrize(
    ("bucket_suffix", "key", "words"),
    [("", "wrong-secret", "Secret team-s3"), ("-none", None, "create it")],
)
def test_what_is_wrong_is_named_once_and_without_the_key(
    object_server: ObjectServer,
    bucket: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bucket_suffix: str,
    key: str | None,
    words: str,
) -> None:
    secret = mounted(tmp_path / "team-s3", object_server, key=key)
    assert doctor(object_server, f"s3://{bucket}{bucket_suffix}/team", secret) == 1
    told = capsys.readouterr().out
    (line,) = [line for line in told.splitlines() if line.startswith("✗")]
    assert words in line
    assert object_server.client().list_objects_v2(Bucket=bucket)["KeyCount"] == 0
    assert object_server.secret_key not in told
    assert "wrong-secret" not in told
