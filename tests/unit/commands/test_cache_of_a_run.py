"""A cache that `sae-job run` made is listed, found sound, exported and removed by the commands that look after it."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.cli import run_command_line
from sae_job.steps.local import run_resources
from sae_job.storage.file_store import FileStore
from sae_operator.api.manifest import parse_manifests
from tests.tiny_model import write_tiny_model, write_tiny_text


def job(folder: Path) -> dict[str, Any]:
    return {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "SAETrainingJob",
        "metadata": {"name": "job"},
        "spec": {
            "activations": {
                "cache": {
                    "model": {"name": str(folder / "model"), "dtype": "float32"},
                    "dataset": {"path": str(folder / "text")},
                    "hooks": [{"name": "model.layers.1"}],
                    "contextSize": 16,
                    "tokens": 3000,
                    "storage": {"uri": "s3://bucket/caches", "shardBytes": 131072},
                }
            },
            "saes": [{"name": "k4", "architecture": {"type": "topk", "k": 4}, "dSae": 64}],
            "training": {"tokens": 4096, "batchSize": 128},
            "evaluation": {"heldOutTokens": 200, "metrics": ["mse"]},
            "output": {"uri": "s3://bucket/job"},
        },
    }


def test_what_a_run_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    write_tiny_model(tmp_path / "model")
    write_tiny_text(tmp_path / "text")
    store = tmp_path / "store"
    before = datetime.fromtimestamp(time.time(), UTC).date()
    run_resources(parse_manifests(json.dumps(job(tmp_path)), source="job.yaml"), store_root=store)
    capsys.readouterr()

    def command(*arguments: str) -> str:
        assert run_command_line(["cache", *arguments, "--store", str(store)]) == 0
        return capsys.readouterr().out

    (told,) = json.loads(command("ls", "s3://bucket", "--json"))
    assert (told["state"], told["rows"], told["hooks"]) == ("Finished", 3000, ["model.layers.1"])
    folder = Path(told["uri"].removeprefix("file://"))
    uri = f"s3://{folder.relative_to(store)}"
    # The job recorded that it reads the cache.
    noted = json.loads((folder / "last-used.json").read_text())["date"]
    assert before.isoformat() <= noted <= datetime.now(UTC).date().isoformat()

    assert "no problems" in command("verify", uri)
    assert json.loads(command("inspect", uri, "--json"))["identity"] == told["identity"]
    out = command("export", uri, str(tmp_path / "set"))
    assert "contexts of 15 positions of model.layers.1 in float32" in out
    command("rm", uri, "--yes")
    left = {info.key for info in FileStore(store).list()}
    assert left
    assert all(key.startswith("bucket/job/") for key in left), "the job's results stay"
