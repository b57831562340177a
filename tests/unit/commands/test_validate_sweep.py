"""`sae-job validate` of a sweep: trials, packing, one plan for each kind of job, and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sae_job.cli import run_command_line

CACHE: dict[str, Any] = {
    "model": {"name": "some/model"},
    "dataset": {"path": "d"},
    "hooks": [{"name": "a"}, {"name": "b"}],
    "tokens": 10_000,
    "storage": {"uri": "s3://b12/c"},
}
SAE: dict[str, Any] = {"name": "sae", "hook": "a", "architecture": {"type": "topk", "k": 4}, "dSae": 64}


def manifest(parameters: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    template = {
        "activations": {"cache": CACHE},
        "saes": [SAE],
        "training": {"batchSize": 64, "tokens": 6400},
        "output": {"uri": "s3://b12/sweep"},
        **changes.pop("template", {}),
    }
    spec = {"template": template, "space": {"parameters": parameters, **changes.pop("space", {})}, **changes}
    return {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "SAESweep",
        "metadata": {"name": "sweep"},
        "spec": spec,
    }


def validate(tmp_path: Path, document: dict[str, Any], *options: str) -> int:
    (tmp_path / "sweep.yaml").write_text(json.dumps(document))
    return run_command_line(["validate", "-f", str(tmp_path / "sweep.yaml"), *options])


def test_size_packing_trials_and_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = [
        {"path": "saes[0].architecture.k", "values": [2, 4, 8]},
        {"path": "training.learningRate", "values": [1e-4, 3e-4, 1e-3]},
    ]
    assert validate(tmp_path, manifest(parameters, trialsPerJob=4, maxParallel=2), "--d-in", "16") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "SAESweep/sweep is valid"
    assert lines[1] == "9 trials in 3 training jobs, up to 4 trials each; at most 2 at a time in a cluster"
    assert lines[2].endswith(": saes[0].architecture.k=2, training.learningRate=0.0001")
    assert "... and 4 more" in lines
    # Two jobs of four SAEs and one of one.
    assert sum("like that of" in line for line in lines) == 2
    assert any(line.startswith("2 training jobs like that of t-") for line in lines)
    assert sum("memory of a training pod" in line for line in lines) == 2
    assert lines[-1] == "all together: 19,200 tokens read, once for all SAEs of a job"


def test_thousands_of_trials_are_a_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = [
        {"path": "saes[0].architecture.k", "values": list(range(1, 41))},
        {"path": "training.learningRate", "values": [1e-4 * i for i in range(1, 51)]},
    ]
    assert validate(tmp_path, manifest(parameters, trialsPerJob=8), "--d-in", "16") == 0
    shown = capsys.readouterr().out
    assert "2,000 trials in 250 training jobs" in shown
    assert len(shown.splitlines()) < 40


def test_many_kinds_of_job_are_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = [{"path": "training.batchSize", "values": [32, 64, 128, 256, 512, 1024]}]
    assert validate(tmp_path, manifest(parameters), "--d-in", "16") == 0
    shown = capsys.readouterr().out
    assert shown.count("like that of") == 4
    assert "... and 2 other kinds of job" in shown
    assert "all together: 39,424 tokens read" in shown


def test_saes_are_counted_where_trials_have_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = {"saes": [SAE, {**SAE, "name": "other", "hook": "b"}]}
    parameters = [{"path": "saes[*].architecture.k", "values": [2, 4]}]
    assert validate(tmp_path, manifest(parameters, template=template), "--d-in", "16") == 0
    assert "2 trials with 4 SAEs in 2 training jobs, one trial each" in capsys.readouterr().out


def test_without_a_width_the_total_is_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = [{"path": "saes[0].architecture.k", "values": [2, 4]}]
    assert validate(tmp_path, manifest(parameters)) == 0
    shown = capsys.readouterr().out
    assert "--d-in tells them" in shown
    assert "all together: 12,800 tokens read" in shown
    template = {"training": {"batchSize": 64}}
    assert validate(tmp_path, manifest(parameters, template=template)) == 0
    assert "all together" not in capsys.readouterr().out


def test_advice_is_given_once_with_its_field_in_the_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = [
        {"path": "saes[0].architecture.k", "values": [2, 4]},
        {"path": "training.learningRate", "values": [1e-3, 0.5]},
    ]
    assert validate(tmp_path, manifest(parameters), "--d-in", "16") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "learningRate" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: SAESweep/sweep: spec.template.training.learningRate: 0.5 is likely")
    assert "(2 trials, e.g. t-" in warnings[0]


def test_every_problem_of_the_space_is_a_line_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = [
        {"path": "saes[0].architecture.k", "values": [2, 0]},
        {"path": "training.rate", "values": [1]},
    ]
    assert validate(tmp_path, manifest(parameters)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 2
    start = f"{tmp_path}/sweep.yaml: SAESweep/sweep: spec.template."
    assert sorted(line.removeprefix(start).partition(":")[0] for line in lines) == [
        "saes[0].architecture.k",
        "training.rate",
    ]


def test_a_job_that_cannot_work_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = [{"path": "saes[0].architecture.k", "values": [2]}]
    nothing = {"activations": {"uri": f"file://{tmp_path}/nothing"}}
    assert validate(tmp_path, manifest(parameters, template=nothing)) == 2
    told = capsys.readouterr().err
    assert "SAESweep/sweep: the training job of t-" in told
    assert "spec.activations.uri" in told
