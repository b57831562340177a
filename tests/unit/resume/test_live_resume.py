"""A job whose model runs beside it, killed or stopped anywhere, ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_job.errors import Stopped
from sae_job.steps.stopping import stop_on_signals
from sae_operator.api.steps import Progress
from tests.faults import KILLED, FaultPlan, count_calls, folder_bytes, run_in_child
from tests.live_job import TOKENS, LiveJob, write_inputs

# Points of an undisturbed run at which it is killed: each costs two trainings.
POINTS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def new_job(inputs: Path, tmp_path: Path) -> Callable[..., LiveJob]:
    numbers = iter(range(10**6))

    def make(**parts: Any) -> LiveJob:
        return LiveJob.make(inputs, tmp_path / f"out{next(numbers)}", **parts)

    return make


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr("sae_job.steps.train_results.render_report", lambda *arguments: "<html></html>")


def test_killed_at_store_calls_the_saes_are_the_same(new_job: Callable[..., LiveJob]) -> None:
    undisturbed = new_job()
    undisturbed.preflight()
    calls = count_calls(lambda plan: undisturbed.train(plan))
    expected = undisturbed.left()
    assert {"topk/sae_weights.safetensors", "standard/sae_weights.safetensors"} <= expected.keys()
    continued = 0
    for number in range(2, calls + 1, max(1, calls // POINTS)):
        job = new_job()
        job.preflight()
        assert run_in_child(lambda job=job, number=number: job.train(FaultPlan(number))) in (KILLED, 0), number
        continued += (job.output / "checkpoints").exists()
        assert run_in_child(lambda job=job: job.train()) == 0, number
        assert job.left() == expected, number
    assert continued > 2


def test_sigterm_leaves_a_checkpoint_and_the_scale_that_was_measured(
    new_job: Callable[..., LiveJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"tokens": 2 * TOKENS, "batchSize": 256, "learningRate": 0.01}
    parts = {"training": training, "checkpoints": {"everySeconds": 3600}}
    undisturbed, job = new_job(**parts), new_job(**parts)
    for each in (undisturbed, job):
        each.preflight()
    undisturbed.train()

    def terminate_at(tokens: int) -> Callable[[Progress], None]:
        def listener(state: Progress) -> None:
            if state.tokens == tokens:
                os.kill(os.getpid(), signal.SIGTERM)

        return listener

    # In the first pass over the rows, and in the second.
    for tokens in (256 * 7, 256 * 45):
        with stop_on_signals() as stop, pytest.raises(Stopped) as caught:
            job.train(should_stop=stop, listener=terminate_at(tokens))
        assert caught.value.tokens == tokens
        # It is measured once: what is measured again on another device may differ.
        monkeypatch.setattr("sae_job.activations.live.LiveSource.statistics", None)
    job.train()
    assert job.left() == undisturbed.left()


def test_preflight_killed_or_stopped_goes_on_to_the_same_contexts(new_job: Callable[..., LiveJob]) -> None:
    undisturbed = new_job()
    calls = count_calls(lambda plan: undisturbed.preflight(plan))
    expected = folder_bytes(undisturbed.output / "activations")
    assert "tokens/index.json" in expected
    for number in range(1, calls + 1):
        job = new_job()
        assert run_in_child(lambda job=job, number=number: job.preflight(FaultPlan(number))) == KILLED, number
        job.preflight()
        assert folder_bytes(job.output / "activations") == expected, number
    job = new_job()
    with pytest.raises(Stopped):
        job.preflight(should_stop=lambda: True)
    assert not (job.output / "activations/tokens/index.json").exists()
    job.preflight()
    assert folder_bytes(job.output / "activations") == expected
