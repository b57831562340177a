"""`sae-job validate`: what a job comes to, as far as it is known here, and warnings."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_job.cli import run_command_line
from sae_job.storage.file_store import FileStore
from tests.small_cache import write_small_cache

JOB = """
apiVersion: sae-operator.dev/v1alpha1
kind: SAETrainingJob
metadata: {{name: job}}
spec:
  activations: {activations}
  saes: [{{name: k4, architecture: {{type: topk, k: 4}}, dSae: 64}}]
  training: {{batchSize: 64, learningRate: 0.5}}
  output: {{uri: "s3://bucket/out"}}
"""
CACHE = (
    "{cache: {model: {name: some/model}, dataset: {path: d}, hooks: [{name: a}], tokens: 10000, "
    "storage: {uri: s3://b12/c}}}"
)


def validate(tmp_path: Path, activations: str, *options: str) -> int:
    (tmp_path / "job.yaml").write_text(JOB.format(activations=activations))
    return run_command_line(["validate", "-f", str(tmp_path / "job.yaml"), *options])


def test_a_finished_cache_on_this_machine_tells_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_small_cache(FileStore(tmp_path / "cache"))
    assert validate(tmp_path, f"{{uri: 'file://{tmp_path}/cache'}}") == 0
    shown = capsys.readouterr()
    assert "steps of 64" in shown.out
    assert "k4: topk" in shown.out
    assert "memory of a training pod:" in shown.out
    assert "warning: SAETrainingJob/job: spec.training.learningRate: 0.5 is likely to diverge" in shown.err
    assert not (tmp_path / "bucket").exists(), "nothing is written"


def test_a_width_that_is_told_stands_for_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(tmp_path, CACHE, "--d-in", "16") == 0
    shown = capsys.readouterr().out
    assert "k4: topk, 16 x 64" in shown
    assert "9,024 tokens in 141 steps of 64, 1,000 held out" in shown


@pytest.mark.parametrize("activations", ["{uri: s3://b12/c}", "{cacheRef: {name: elsewhere}}"])
def test_a_width_tells_nothing_of_a_cache_that_is_described_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], activations: str
) -> None:
    assert validate(tmp_path, activations, "--d-in", "16") == 0
    shown = capsys.readouterr()
    assert "plan: its cache is described elsewhere" in shown.out
    assert "spec.training.learningRate: 0.5 is likely to diverge" in shown.err


def test_a_model_of_unknown_size_that_runs_beside_the_training_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "without the language model, whose size is not known here"
    live = "{live: {model: {name: some/model}, dataset: {path: d}, hooks: [{name: a}], tokens: 10000}}"
    for activations, expected in ((live, True), (CACHE, False)):
        assert validate(tmp_path, activations, "--d-in", "16") == 0
        assert (told in capsys.readouterr().out) is expected


def test_what_cannot_work_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    activations = f"{{uri: 'file://{tmp_path}/nothing'}}"
    assert validate(tmp_path, activations) == 2
    assert "SAETrainingJob/job: spec.activations.uri" in capsys.readouterr().err
