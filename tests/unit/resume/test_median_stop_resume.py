"""A job with a median stop that is killed at any call to its store decides what the undisturbed one decides, once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_job.storage.file_store import FileStore
from tests.faults import KILLED, FaultPlan, run_in_child
from tests.small_cache import write_small_cache
from tests.small_training import STANDARD, TOPK, Job, train_step

RULE = {"afterTokens": 200, "minSaes": 3}
FOLDER = "median-stop"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_small_cache(FileStore(folder))
    return folder


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_job.steps.train_results.render_report", lambda *arguments: "<html></html>")


def leave(folder: Path, figures: list[float], prefix: str = "other") -> None:
    for number, figure in enumerate(figures):
        record = {"metric": "explained_variance", "figure": figure, "median": None, "others": 0, "stopped": False}
        FileStore(folder / FOLDER).put(f"{prefix}{number}-sae.json", json.dumps(record).encode())


@pytest.fixture
def new_job(cache: Path, tmp_path: Path) -> Callable[[list[float]], Job]:
    numbers = iter(range(10**6))

    def make(figures: list[float]) -> Job:
        job = Job(cache, tmp_path / f"out{next(numbers)}", train_step(medianStop=RULE))
        leave(job.output, figures)
        return job

    return make


def own(job: Job) -> dict[str, dict[str, Any]]:
    paths = [path for path in (job.output / FOLDER).iterdir() if not path.name.startswith(("other", "later"))]
    records = [json.loads(path.read_bytes()) for path in paths]
    return {record["sae"]: record for record in records}


def between(new_job: Callable[[list[float]], Job]) -> list[float]:
    """Others' figures that one of the two SAEs is below and the other above."""
    job = new_job([])
    job.run()
    figures = sorted(record["figure"] for record in own(job).values())
    return [sum(figures) / 2] * 3


def test_killed_around_the_comparison_the_results_and_the_folder_are_the_same(
    new_job: Callable[[list[float]], Job],
) -> None:
    others = between(new_job)
    undisturbed = new_job(others)
    plan = FaultPlan()
    undisturbed.run(plan)
    expected = undisturbed.left()
    assert sorted(record["stopped"] for record in own(undisturbed).values()) == [False, True]
    assert sum(name.startswith(f"{FOLDER}/") for name in expected) == 5
    compared = [number for number, name in enumerate(plan.names, 1) if FOLDER in name]
    assert len(compared) == 6
    for number in range(min(compared) - 2, max(compared) + 8):
        job = new_job(others)
        code = run_in_child(lambda job=job, number=number: job.run(FaultPlan(number)))
        assert code == KILLED, number
        assert run_in_child(lambda job=job: job.run()) == 0, number
        assert job.left() == expected, number


def test_a_decision_that_is_left_holds_whatever_others_came_since(new_job: Callable[[list[float]], Job]) -> None:
    """Killed behind the first of the two decisions, before any checkpoint has it."""
    others = between(new_job)
    undisturbed = new_job(others)
    undisturbed.run()
    names = list(own(undisturbed))
    assert names
    job = new_job(others)
    killed = FaultPlan(f"put {FOLDER}/", when="after")
    assert run_in_child(lambda: job.run(killed)) == KILLED
    (decided,) = own(job)
    # By these, both would be given up.
    leave(job.output, [1.0] * 20, prefix="later")
    assert run_in_child(lambda: job.run()) == 0
    found, before = own(job), own(undisturbed)
    assert found[decided] == before[decided]
    (other,) = found.keys() - {decided}
    assert found[other]["stopped"] is True
    assert found[other]["others"] == 24
    results = json.loads((job.output / "results.json").read_text())
    phases = {sae["name"]: sae["phase"] for sae in results["saes"]}
    assert phases[other] == "Stopped"
    assert phases[decided] == ("Stopped" if before[decided]["stopped"] else "Succeeded")
    stopped = next(sae for sae in results["saes"] if sae["name"] == other)
    assert "the median of 24 other SAEs (medianStop)" in stopped["message"]


def test_jobs_that_share_a_folder_see_each_other(cache: Path, tmp_path: Path) -> None:
    shared = f"file://{tmp_path}/shared"
    rule = {"afterTokens": 200, "minSaes": 2, "uri": shared}
    for number, saes in enumerate(([TOPK, STANDARD], [{**TOPK, "seed": 5}])):
        step = train_step(saes=saes, medianStop=rule)
        step = step.model_copy(
            update={
                "spec": step.spec.model_copy(
                    update={"output": step.spec.output.model_copy(update={"uri": f"file://{tmp_path}/out{number}"})}
                )
            }
        )
        Job(cache, tmp_path / f"out{number}", step).run()
    records = [json.loads(path.read_bytes()) for path in sorted((tmp_path / "shared").iterdir())]
    assert sorted((record["sae"], record["others"]) for record in records) == [
        ("standard", 1),
        ("topk", 1),
        ("topk", 2),
    ]
