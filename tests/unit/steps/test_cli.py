"""The command line: help that teaches, one line for each mistake with exit code 2, no heavy import without need."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sae_job.cli import run_command_line, show_results
from sae_job.steps.local import JobOutcome
from sae_operator.api.steps import SaeProgress, StepResult
from sae_operator.api.store import StoreLocation

ROOT = Path(__file__).parents[3]
JOB = """
apiVersion: sae-operator.dev/v1alpha1
kind: SAETrainingJob
metadata: {name: job}
spec:
  activations: {uri: "s3://bucket/cache"}
  saes: [{name: k4, architecture: {type: topk, k: 4}, dSae: 64}]
  training: {tokens: 3e8, learningRate: 3e-4}
  output: {uri: "s3://bucket/out"}
"""


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def test_a_valid_manifest_is_said_to_be_valid(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["validate", "-f", str(manifest)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "SAETrainingJob/job is valid",
        "  plan: the widths of its hooks are not known here; --d-in tells them",
    ]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("k: 4", "k: 400", "spec.saes[0].architecture.k: k must be at most dSae"),
        ("learningRate: 3e-4", "learningrate: 3e-4", "learningRate"),
        ("kind: SAETrainingJob", "kind: SAEJob", "SAETrainingJob"),
        ("type: topk", "type: vanilla", "topk"),
        ("name: job}", "name: Job}", "metadata.name"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_field_and_fix(
    manifest: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, told: str
) -> None:
    manifest.write_text(JOB.replace(old, new))
    assert run_command_line(["validate", "-f", str(manifest)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(str(manifest))
    assert told in line


def test_every_problem_has_a_line_of_its_own(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest.write_text(JOB.replace("k: 4", "k: 0").replace("tokens: 3e8", "tokens: -1"))
    assert run_command_line(["run", "-f", str(manifest)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_missing_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["validate", "-f", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_an_unknown_option_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["run", "--fast"]) == 2
    assert "--fast" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["validate", "--help"], ["step", "--help"]])
def test_help_explains(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(arguments) == 0
    assert "Usage" in capsys.readouterr().out


def test_validating_imports_neither_torch_nor_boto3(manifest: Path) -> None:
    code = (
        "import sys; from sae_job.cli import run_command_line; "
        f"assert run_command_line(['validate', '-f', {str(manifest)!r}]) == 0; "
        "heavy = {'torch', 'boto3', 'transformers', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    path = f"{ROOT / 'operator'}:{ROOT / 'jobimage'}"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_results_tell_each_sae_and_the_whole_message_of_one_that_failed(tmp_path: Path) -> None:
    out = io.StringIO()
    message = "the loss is not finite from step 1 of 782 on: lower spec.saes[1].training.learningRate, e.g. to 0.001"
    saes = [
        SaeProgress(name="good", phase="Succeeded", explained_variance=0.76125, l0=4.0, mse=336.2, dead_fraction=0.25),
        SaeProgress(name="bad", phase="Failed", message=message),
    ]
    result = StepResult(step="train", exit_code=0, reason="Completed", tokens=200_192, saes=saes)
    outcome = JobOutcome(name="job", output=StoreLocation(uri="s3://bucket/out"), result=result)
    show_results(outcome, tmp_path, Console(file=out, width=100))
    text = out.getvalue()
    (row,) = [line for line in text.splitlines() if "│ good" in line]
    assert all(figure in row for figure in ("0.7612", "4.00", "336.2", "–", "25.0%"))
    assert f"failed  bad: {message}\n" in text
    assert f"SAE     {tmp_path}/bucket/out/good\n" in text
    assert f"report  {tmp_path}/bucket/out/report.html\n" in text
    assert "out/bad" not in text


def test_a_signal_to_stop_ends_the_process_also_while_it_imports() -> None:
    code = (
        "import os, signal, sys, types; cli = types.ModuleType('sae_job.cli'); "
        "cli.run_command_line = lambda arguments: os.kill(os.getpid(), signal.SIGTERM); "
        "sys.modules['sae_job.cli'] = cli; from sae_job.entry import main; main(); os._exit(0)"
    )
    path = f"{ROOT / 'operator'}:{ROOT / 'jobimage'}"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
