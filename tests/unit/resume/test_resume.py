"""A training that is killed at any call to its store, or stopped, ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sae_job.errors import InvalidInput, Stopped
from sae_job.steps.output_marker import claim_output
from sae_job.steps.stopping import stop_on_signals
from sae_job.storage.base import StoreError
from sae_job.storage.file_store import FileStore
from sae_operator.api.steps import Progress
from tests.faults import KILLED, FaultPlan, count_calls, fail, folder_bytes, run_in_child
from tests.small_cache import write_small_cache
from tests.small_training import STANDARD, TOPK, Job, train_step

# What the time of day may change: rates.
NOT_COMPARED = ("results.json", "report.html")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_small_cache(FileStore(folder))
    return folder


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to disk guards against losing power; a process that is killed loses nothing that was written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the report takes ten times as long as such a training."""
    monkeypatch.setattr("sae_job.steps.train_results.render_report", lambda *arguments: "<html></html>")


@pytest.fixture
def new_job(cache: Path, tmp_path: Path) -> Callable[..., Job]:
    numbers = iter(range(10**6))

    def make(**parts: Any) -> Job:
        return Job(cache, tmp_path / f"out{next(numbers)}", train_step(**parts))

    return make


def test_killed_at_every_call_the_results_are_the_same(new_job: Callable[..., Job]) -> None:
    undisturbed = new_job()
    calls = count_calls(lambda plan: undisturbed.run(plan))
    expected = undisturbed.left()
    assert {"topk/sae_weights.safetensors", "standard/cfg.json", "metrics.jsonl"} <= expected.keys()
    assert not [name for name in expected if name.startswith("checkpoints/")]
    assert calls >= 60
    continued = 0
    for number in range(1, calls + 1):
        job = new_job()
        code = run_in_child(lambda job=job, number=number: job.run(FaultPlan(number)))
        # The order of calls of several threads may differ: the last ones may not be reached.
        assert code == KILLED or (code == 0 and number > calls - 10), number
        continued += (job.output / "checkpoints").exists()
        assert run_in_child(lambda job=job: job.run()) == 0, number
        assert job.left() == expected, number
    assert continued > calls // 4


def test_killed_again_and_again_it_still_comes_to_its_end(new_job: Callable[..., Job]) -> None:
    undisturbed, job = new_job(), new_job()
    undisturbed.run()
    attempts = 0
    # Later each time: an attempt must come far enough to store its first checkpoint.
    while run_in_child(lambda allowed=30 + attempts: job.run(FaultPlan(allowed))) == KILLED:
        attempts += 1
        assert attempts < 200
    assert attempts > 3
    assert job.left() == undisturbed.left()


def test_a_store_that_fails_ends_the_attempt_and_the_next_one_goes_on(new_job: Callable[..., Job]) -> None:
    undisturbed, job = new_job(), new_job()
    undisturbed.run()
    for call in ("put checkpoints/128/topk/cfg.json", "put checkpoints/256/checkpoint.json", "put topk/cfg.json"):
        with pytest.raises(StoreError, match="cannot be reached"):
            job.run(FaultPlan(call, fail))
    seen: list[Progress] = []
    job.run(listener=seen.append)
    assert min(state.tokens for state in seen if state.total_tokens) == 512
    assert job.left() == undisturbed.left()


def test_sigterm_leaves_a_checkpoint_and_the_next_attempt_goes_on_from_it(new_job: Callable[..., Job]) -> None:
    undisturbed, job = new_job(), new_job()
    undisturbed.run()

    def terminate_at(tokens: int) -> Callable[[Progress], None]:
        def listener(state: Progress) -> None:
            if state.tokens == tokens:
                os.kill(os.getpid(), signal.SIGTERM)

        return listener

    for tokens in (96, 320):
        with stop_on_signals() as stop, pytest.raises(Stopped) as caught:
            job.run(should_stop=stop, listener=terminate_at(tokens))
        assert caught.value.tokens == tokens
        assert (job.output / f"checkpoints/{tokens}/checkpoint.json").exists()
        assert (job.output / f"checkpoints/{tokens}/topk/cfg.json").exists()
    seen: list[Progress] = []
    job.run(listener=seen.append)
    assert min(state.tokens for state in seen if state.total_tokens) == 320
    assert job.left() == undisturbed.left()


def test_stopped_before_the_first_step_there_is_nothing_to_keep(new_job: Callable[..., Job]) -> None:
    job = new_job()
    with pytest.raises(Stopped) as caught:
        job.run(should_stop=lambda: True)
    assert caught.value.tokens is None
    assert not (job.output / "checkpoints").exists()


def test_a_corrupt_newest_checkpoint_costs_only_the_way_back(new_job: Callable[..., Job]) -> None:
    undisturbed, job = new_job(), new_job()
    undisturbed.run()

    def stop_after(tokens: int) -> None:
        seen = [0]
        with pytest.raises(Stopped):
            job.run(
                should_stop=lambda: seen[0] >= tokens,
                listener=lambda state: seen.__setitem__(0, state.tokens),
            )

    stop_after(300)
    newest = max((job.output / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    assert newest.name == "320"
    damaged = newest / "state/standard.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00")
    seen: list[Progress] = []
    job.run(listener=seen.append)
    assert min(state.tokens for state in seen if state.total_tokens) == 256
    assert job.left() == undisturbed.left()


def test_a_broken_sae_stays_frozen_over_an_interruption(new_job: Callable[..., Job]) -> None:
    broken = {
        "name": "broken",
        "architecture": {"type": "topk", "k": 3},
        "dSae": 24,
        "training": {"learningRate": 1e9},
    }
    sound = {"name": "sound", "architecture": {"type": "topk", "k": 3}, "dSae": 24}
    undisturbed, job = new_job(saes=[broken, sound]), new_job(saes=[broken, sound])
    expected = undisturbed.run()
    assert [(sae.name, sae.phase) for sae in expected.saes or []] == [("broken", "Failed"), ("sound", "Succeeded")]
    assert expected.exit_code == 0
    with stop_on_signals() as stop, pytest.raises(Stopped):
        job.run(
            should_stop=stop,
            listener=lambda state: os.kill(os.getpid(), signal.SIGTERM) if state.tokens == 320 else None,
        )
    result = job.run()
    assert result.saes == expected.saes
    assert job.left() == undisturbed.left()
    assert not (job.output / "broken").exists()


def test_finished_results_are_adopted(new_job: Callable[..., Job]) -> None:
    job = new_job()
    first = job.run()
    before = folder_bytes(job.output)
    again = job.run()
    assert (first.adopted, again.adopted) == (False, True)
    assert (again.saes, again.tokens) == (first.saes, first.tokens)
    assert folder_bytes(job.output) == before


def test_raised_tokens_train_again_as_if_asked_for_at_first(new_job: Callable[..., Job]) -> None:
    job = new_job()
    job.run()
    more = {"training": {"tokens": 900, "batchSize": 32, "logEverySteps": 3, "learningRate": 0.01}}
    result = replace(job, step=train_step(**more)).run()
    directly = new_job(**more)
    directly.run()
    assert result.tokens == 928
    assert job.left() == directly.left()


def test_raised_tokens_lengthen_a_training_that_is_not_finished(new_job: Callable[..., Job]) -> None:
    job = new_job()
    assert run_in_child(lambda: job.run(FaultPlan("put checkpoints/384"))) == KILLED
    assert (job.output / "checkpoints").exists()
    seen: list[Progress] = []
    more = {"training": {"tokens": 900, "batchSize": 32, "logEverySteps": 3, "learningRate": 0.01}}
    result = replace(job, step=train_step(**more)).run(listener=seen.append)
    assert result.tokens == 928
    assert min(state.tokens for state in seen if state.total_tokens) == 256


@pytest.mark.parametrize(
    ("parts", "field", "told"),
    [
        ({"normalization": "none"}, "spec.normalization", 'is "none", and "centered_rms" in file://out: set it back'),
        ({"saes": [{**TOPK, "seed": 3}, STANDARD]}, "spec.saes[0].seed", "is 3, and left out in file://out"),
        ({"saes": [TOPK]}, "spec.saes", 'is [{"name": "topk"'),
        ({"evaluation": {"heldOutTokens": 48}}, "spec.evaluation.heldOutTokens", "is 48, and 40 in file://out"),
        ({"activations": {"uri": "file://other"}}, "spec.activations", "differs from file://out"),
    ],
)
def test_another_spec_is_refused_by_what_was_changed_and_nothing_is_overwritten(
    new_job: Callable[..., Job], parts: dict[str, Any], field: str, told: str
) -> None:
    job = new_job()
    claim_output(FileStore(job.output, "file://out"), job.step)
    before = folder_bytes(job.output)
    with pytest.raises(InvalidInput) as caught:
        replace(job, step=train_step(**parts)).run()
    assert (caught.value.reason, caught.value.field) == ("OutputTaken", field)
    assert caught.value.message.startswith(told)
    assert folder_bytes(job.output) == before
