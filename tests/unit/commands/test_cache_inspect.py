"""`sae-job cache inspect`: what a cache is, as a table and as JSON; and the help of all these commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from safetensors.torch import load

from sae_job.activations.marker import mark
from sae_job.cli import run_command_line
from sae_job.storage.file_store import FileStore
from sae_operator.api.activation_cache import StorageDtype
from tests.caches import finished_cache

ROOT = Path(__file__).parents[3]
COMMANDS = ("ls", "inspect", "verify", "rm", "gc", "export", "import")


def test_json_tells_size_hooks_and_provenance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, manifest = finished_cache(tmp_path, hooks={"layer.0": 16, "layer.1": 8}, tokens=500)
    assert run_command_line(["cache", "inspect", str(store.root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["rows"], told["bytes"]) == ("Finished", 500, manifest.bytes)
    assert told["bytesPerRow"] == manifest.bytes / 500
    assert (told["dtype"], told["contextSize"], told["shards"]) == ("bfloat16", 16, len(manifest.shards))
    first, second = told["hooks"]
    assert (first["name"], first["dIn"], second["name"], second["dIn"]) == ("layer.0", 16, "layer.1", 8)
    assert first["meanNorm"] == manifest.hook("layer.0").mean_norm
    assert first["rmsNorm"] ** 2 == pytest.approx(manifest.hook("layer.0").mean_squared_norm)
    assert told["model"]["name"] == "lookup"
    assert told["dataset"]["path"] == "numbers"
    assert told["tokenizer"]["specialTokenIds"] == [0]
    assert told["devices"] == ["cpu"]
    assert "torch" in told["software"][0]


def test_the_table_tells_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, manifest = finished_cache(tmp_path, tokens=500)
    assert run_command_line(["cache", "inspect", str(store.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"file://{store.root}: finished"
    assert "500 rows, contexts of 16" in lines[1]
    assert f"{manifest.bytes / 500:.1f} bytes per row" in lines[1]
    (row,) = [line for line in lines if "layer.0" in line]
    assert f"{manifest.hook('layer.0').mean_norm:.4g}" in row
    (model,) = [line for line in lines if line.startswith("model ")]
    assert "name: lookup" in model


@pytest.mark.parametrize("dtype", get_args(StorageDtype))
def test_the_first_rows_are_shown_with_their_tokens_and_norms(
    tmp_path: Path, dtype: StorageDtype, capsys: pytest.CaptureFixture[str]
) -> None:
    store, manifest = finished_cache(tmp_path, hooks={"layer.0": 16, "layer.1": 8}, tokens=500, dtype=dtype)
    assert run_command_line(["cache", "inspect", str(store.root), "--rows", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["firstRows"]
    tensors = load(store.get(manifest.shards[0].parts[0].key))
    assert [row["context"] for row in told] == tensors["sequence"][:3].tolist()
    assert [row["position"] for row in told] == tensors["position"][:3].tolist()
    assert [row["tokenId"] for row in told] == tensors["token_ids"][:3].tolist()
    for hook, width in {"layer.0": 16, "layer.1": 8}.items():
        rows = {suffix: tensors[hook + suffix][:3] for suffix, _, _ in manifest.codec.row_tensors(width)}
        constants = {suffix: tensors[hook + suffix] for suffix, _, _ in manifest.codec.constants(width)}
        norms = manifest.codec.decode(rows, constants).float().norm(dim=1)
        assert [row["norms"][hook] for row in told] == pytest.approx(norms.tolist())
    assert run_command_line(["cache", "inspect", str(store.root), "--rows", "10000"]) == 0
    table = capsys.readouterr().out
    assert "norm at layer.1" in table
    assert len([line for line in table.splitlines() if line.count("│") == 6]) == manifest.shards[0].rows

    store.delete(manifest.shards[0].parts[0].key)
    assert run_command_line(["cache", "inspect", str(store.root), "--rows", "3"]) == 2
    assert "missing or cut" in capsys.readouterr().err


def test_an_unfinished_cache_tells_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, manifest = finished_cache(tmp_path, tokens=500)
    store.delete("manifest.json")
    assert run_command_line(["cache", "inspect", str(store.root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["rows"], told["storedParts"]) == ("Unfinished", 500, len(manifest.shards))
    assert run_command_line(["cache", "inspect", str(store.root)]) == 0
    assert f"{len(manifest.shards)} files of them stored" in capsys.readouterr().out


def test_a_cache_that_was_only_begun_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark(FileStore(tmp_path), "a")
    assert run_command_line(["cache", "inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"file://{tmp_path}: empty\n"


def test_a_folder_without_a_cache_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["cache", "inspect", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"file://{tmp_path} holds no cache" in line
    assert "cache ls" in line


@pytest.mark.parametrize("uri", ["gs://bucket/cache", "s3://bucket/../x", "://x"])
def test_a_uri_that_is_none_is_told(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["cache", "inspect", uri]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert uri in line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["cache", command, "--help"]) == 0
    told = capsys.readouterr().out
    assert "Usage" in told
    assert f" sae-job cache {command} " in told, "an example to copy"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([command, "--help"] for command in COMMANDS), ["rm"], ["gc", "x", "--unused-for", "never"]],
    ids=" ".join,
)
def test_help_and_wrong_arguments_are_answered_without_heavy_imports(arguments: list[str]) -> None:
    code = (
        "import sys; from sae_job.cli import run_command_line; "
        f"run_command_line(['cache', *{arguments!r}]); "
        "heavy = {'torch', 'boto3', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'operator'}:{ROOT / 'jobimage'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
