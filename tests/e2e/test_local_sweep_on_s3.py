"""A sweep in this process whose data, figures and report lie on a real S3 server."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from sae_job.cli import run_command_line
from tests.testbed.object_server import ObjectServer


def manifest(bucket: str, endpoint: str, model: Path, text: Path) -> dict[str, Any]:
    place = {"endpointUrl": endpoint}
    return {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "SAESweep",
        "metadata": {"name": "sweep"},
        "spec": {
            "template": {
                "activations": {
                    "cache": {
                        "model": {"name": str(model), "dtype": "float32"},
                        "dataset": {"path": str(text)},
                        "hooks": [{"name": "model.layers.1"}],
                        "contextSize": 16,
                        "tokens": 1500,
                        "storage": {"uri": f"s3://{bucket}/caches", **place},
                    }
                },
                "saes": [{"name": "sae", "architecture": {"type": "topk", "k": 4}, "dSae": 64}],
                "training": {"tokens": 1280, "batchSize": 64},
                "output": {"uri": f"s3://{bucket}/sweep", **place},
            },
            "space": {"parameters": [{"path": "training.learningRate", "values": [0.003, 0.002, 0.001, 1e-7]}]},
            "trialsPerJob": 2,
            "medianStop": {"afterTokens": 300, "minSaes": 3},
        },
    }


def test_trials_are_compared_given_up_and_reported_in_the_bucket(
    object_server: ObjectServer,
    tiny_model_dir: Path,
    tiny_text_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket = object_server.create_bucket(f"local-{uuid.uuid4().hex[:8]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_server.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_server.secret_key)
    client = object_server.client()

    def read(key: str) -> bytes:
        return client.get_object(Bucket=bucket, Key=f"sweep/{key}")["Body"].read()

    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(manifest(bucket, object_server.endpoint, tiny_model_dir, tiny_text_dir)))
    assert run_command_line(["run", "-f", str(file)]) == 0
    assert f"report  s3://{bucket}/sweep/report.html" in capsys.readouterr().out
    told = json.loads(read("trials.json"))
    assert [trial["phase"] for trial in told["trials"]] == ["Succeeded", "Succeeded", "Stopped", "Stopped"]
    assert told["trials"][0]["saes"][0]["uri"].startswith(f"s3://{bucket}/sweep/")
    assert told["best"].encode() in read("report.html")
    figures = client.list_objects_v2(Bucket=bucket, Prefix="sweep/median-stop/")["Contents"]
    assert len(figures) == 4
    # Once more: all is there.
    before = read("trials.json"), read("report.html")
    assert run_command_line(["run", "-f", str(file)]) == 0
    assert (read("trials.json"), read("report.html")) == before
