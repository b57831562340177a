"""Jobs of all architectures, over both phases, killed anywhere: they end as if nothing had happened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_job.storage.file_store import FileStore
from sae_operator.api.steps import Progress
from tests.faults import KILLED, FaultPlan, count_calls, kill, run_in_child
from tests.small_cache import write_small_cache
from tests.small_training import EVERY_KIND, TRAINING, TWO_HOOKS, Job, train_step

# Of the calls and steps of a job so many are tried; all of them are by the job of two SAEs beside this one.
TRIED_CALLS = 6
FINETUNED: dict[str, Any] = {**TRAINING, "tokens": 320, "finetuning": {"method": "decoder", "tokens": 160}}
GIVEN_UP = {**EVERY_KIND["topk"], "name": "given-up", "stopEarly": {"afterTokens": 200, "l0Above": 0.5}}
BROKEN = {**EVERY_KIND["topk"], "name": "broken", "training": {"learningRate": 1e9}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_small_cache(FileStore(folder), hooks=tuple(TWO_HOOKS), d_in=TWO_HOOKS)
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("sae_job.steps.train_results.render_report", lambda *arguments: "<html></html>")


@pytest.fixture
def new_job(cache: Path, tmp_path: Path) -> Callable[..., Job]:
    numbers = iter(range(10**6))

    def make(**parts: Any) -> Job:
        saes = [*EVERY_KIND.values(), GIVEN_UP, BROKEN]
        step = train_step(**{"saes": saes, "training": FINETUNED, "checkpoints": {"everyTokens": 64}, **parts})
        return Job(cache, tmp_path / f"out{next(numbers)}", step)

    return make


def same_files(left: dict[str, bytes], right: dict[str, bytes]) -> None:
    assert left.keys() == right.keys()
    for name, data in left.items():
        assert data == right[name], name


@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_killed_at_calls_to_the_store(new_job: Callable[..., Job], optimizer: str) -> None:
    training = {**FINETUNED, "optimizer": optimizer}
    undisturbed = new_job(training=training)
    calls = count_calls(lambda plan: undisturbed.run(plan))
    expected = undisturbed.left()
    assert {f"{name}/cfg.json" for name in (*EVERY_KIND, "given-up")} <= expected.keys()
    # The steps of adafactor are relative: no rate breaks it.
    assert ("broken/cfg.json" in expected) == (optimizer == "adafactor")
    # From the first checkpoints to the last results, evenly.
    chosen = [10 + (calls - 20) * part // TRIED_CALLS for part in range(TRIED_CALLS)]
    continued = 0
    for number in chosen:
        job = new_job(training=training)
        assert run_in_child(lambda job=job, number=number: job.run(FaultPlan(number))) == KILLED, number
        continued += any((job.output / "checkpoints").glob("*/checkpoint.json"))
        assert run_in_child(lambda job=job: job.run()) == 0, number
        same_files(job.left(), expected)
    assert continued >= TRIED_CALLS // 2


@pytest.mark.parametrize("step", [1, 2, 9, 10, 11, 14])
def test_killed_after_steps(new_job: Callable[..., Job], step: int) -> None:
    """Around the first checkpoint, around the switch to fine-tuning, and before the last step."""
    undisturbed, job = new_job(), new_job()
    undisturbed.run()

    def listener(state: Progress) -> None:
        if state.tokens == 32 * step:
            kill()

    assert run_in_child(lambda: job.run(listener=listener)) == KILLED
    assert run_in_child(lambda: job.run()) == 0
    same_files(job.left(), undisturbed.left())
