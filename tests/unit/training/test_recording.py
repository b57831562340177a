"""What a job records while it trains: parts of metrics.jsonl, and runs of Weights & Biases, over attempts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_job.errors import Stopped
from sae_job.evaluation import metrics as evaluation_metrics
from sae_job.reporting import metrics_parts
from sae_job.reporting.wandb_file import history
from sae_job.storage.file_store import FileStore
from tests.small_cache import write_small_cache
from tests.small_training import Job, train_step

OFFLINE = {"project": "p", "mode": "offline"}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Makes jobs on one cache, each with an output of its own."""
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    write_small_cache(FileStore(tmp_path / "cache"))

    def make(name: str, **parts: Any) -> Job:
        return Job(tmp_path / "cache", tmp_path / name, train_step(**parts))

    return make


def stop_at(number: int) -> Callable[[], bool]:
    """Says stop at the n-th question, and from then on."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= number

    return should_stop


def parts_of(job: Job) -> list[dict[str, Any]]:
    files = sorted((job.output / "metrics").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def lines_of(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]


def rows_of(job: Job) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Rows of each SAE's run, of all attempts in their order, by the run's id."""
    rows: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for file in sorted((job.output / "wandb").glob("offline-run-*/run-*.wandb")):
        found = [(step, {k: json.loads(v) for k, v in row.items()}) for step, row in history(file.read_bytes())]
        rows.setdefault(file.stem.removeprefix("run-"), []).extend(found)
    return rows


def test_a_stopped_training_has_left_its_lines_and_a_finished_one_has_no_parts(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_parts, "FIRST_SECONDS", 0.0)
    undisturbed, stopped = job("undisturbed"), job("stopped")
    undisturbed.run()
    lines = lines_of(undisturbed)
    assert parts_of(undisturbed) == []
    for attempt in (9, 12):
        with pytest.raises(Stopped):
            stopped.run(should_stop=stop_at(attempt))
        told = parts_of(stopped)
        assert told == lines[: len(told)]
        assert len(told) > 3
    stopped.run()
    assert parts_of(stopped) == []
    assert lines_of(stopped) == lines
    assert stopped.left() == undisturbed.left()


def test_each_line_tells_the_variance_that_the_step_explained(job: Callable[..., Job]) -> None:
    trained = job("out")
    trained.run()
    steps = [line for line in lines_of(trained) if "loss" in line and line["sae"] == "topk"]
    assert all(0 < line["explained_variance"] < 1 and line["l0"] == 3 for line in steps[2:])
    evaluations = [line["evaluation"] for line in lines_of(trained) if "evaluation" in line]
    assert all(0 < evaluation["l2_ratio"] < 1.5 and evaluation["l1"] > 0 for evaluation in evaluations)


def test_offline_runs_hold_what_metrics_jsonl_holds(job: Callable[..., Job]) -> None:
    trained = job("out", wandb=OFFLINE)
    trained.run()
    by_id = rows_of(trained)
    assert len(by_id) == 2
    lines = lines_of(trained)
    for name in ("topk", "standard"):
        mine = [line for line in lines if line["sae"] == name]
        first = next(line for line in mine if "loss" in line)
        (rows,) = (
            rows for rows in map(dict, by_id.values()) if rows[first["step"]]["losses/overall_loss"] == first["loss"]
        )
        assert list(rows) == sorted({line["step"] for line in mine})
        for line in mine:
            row = rows[line["step"]]
            assert row["details/n_training_tokens"] == line["tokens"]
            if "loss" in line:
                assert row["losses/overall_loss"] == line["loss"]
                assert row["metrics/explained_variance"] == line["explained_variance"]
                assert row["details/current_learning_rate"] == line["learning_rate"]
            if "evaluation" in line:
                assert row["reconstruction_quality.mse"] == line["evaluation"]["mse"]
                assert row["sparsity.dead_fraction"] == line["evaluation"]["dead_fraction"]
                assert "weights/W_dec_norms.values" in row
            if "window" in line:
                assert row["sparsity/below_1e-5"] == line["window"]["below_1e-5"]


def test_a_job_that_goes_on_goes_on_with_its_runs(job: Callable[..., Job]) -> None:
    trained = job("out", wandb=OFFLINE)
    with pytest.raises(Stopped):
        trained.run(should_stop=stop_at(11))
    before = rows_of(trained)
    trained.run()
    after = rows_of(trained)
    assert before.keys() == after.keys()
    steps = sorted({line["step"] for line in lines_of(trained)})
    for id, rows in after.items():
        assert 0 < len(before[id]) < len(rows)
        assert [step for step, _ in rows] == steps


def test_an_evaluation_that_is_cut_off_is_made_by_the_next_attempt(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_metrics, "CHUNK_ROWS", 8)
    undisturbed, stopped = job("undisturbed"), job("stopped")
    undisturbed.run()
    stops = 0
    # A question before each step and before each of 5 chunks of each evaluation of 2 SAEs: some fall between chunks.
    while True:
        try:
            stopped.run(should_stop=stop_at(14))
            break
        except Stopped:
            stops += 1
    assert stops > 3
    assert stopped.left() == undisturbed.left()
