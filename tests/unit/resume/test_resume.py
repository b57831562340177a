"""A training that is killed at any call to its store, or stopped, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sae_job.errors import InvalidInput, Stopped
from sae_job.reporting.progress import ProgressReporter
from sae_job.run.context import StepContext
from sae_job.run.stopping import stop_on_signals
from sae_job.run.train import run_train
from sae_job.storage.base import ObjectInfo, ObjectStore
from sae_job.storage.file_store import FileStore
from sae_operator.api.steps import Progress, StepResult, TrainStep
from sae_operator.api.store import StoreLocation
from tests.small_cache import write_small_cache
from tests.small_training import files_below, small_spec

KILLED = 77
# What the time of day may change: rates.
NOT_COMPARED = ("results.json", "report.html")


class Calls:
    """Numbers the calls to all stores of a process; at the given one the process ends without a farewell."""

    def __init__(self, kill_at: int | None) -> None:
        self.count = 0
        self._kill_at = kill_at
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.count += 1
            if self.count == self._kill_at:
                os._exit(KILLED)


class CountingStore:
    """A store that tells `Calls` of each call before it is made."""

    def __init__(self, store: ObjectStore, calls: Calls) -> None:
        self._store = store
        self._calls = calls

    @property
    def uri(self) -> str:
        return self._store.uri

    def get(self, key: str) -> bytes:
        self._calls()
        return self._store.get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self._calls()
        return self._store.get_range(key, start, length)

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        self._calls()
        return self._store.read_into(key, start, buffer)

    def head(self, key: str) -> ObjectInfo | None:
        self._calls()
        return self._store.head(key)

    def put(self, key: str, data: Any, *, if_absent: bool = False, if_match: str | None = None) -> ObjectInfo:
        self._calls()
        return self._store.put(key, data, if_absent=if_absent, if_match=if_match)

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        self._calls()
        return self._store.put_file(key, path)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._calls()
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        self._calls()
        self._store.delete(key)


@dataclass(frozen=True)
class Job:
    """A training job on the small cache, with its output in a folder of its own."""

    cache: Path
    output: Path
    step: TrainStep

    def run(
        self,
        calls: Calls,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        listener: Callable[[Progress], None] = lambda state: None,
    ) -> StepResult:
        folders = {"file://cache": self.cache, "file://out": self.output}

        def open_store(location: StoreLocation) -> ObjectStore:
            return CountingStore(FileStore(folders[location.uri], location.uri), calls)

        context = StepContext(
            reporter=ProgressReporter("train", listeners=(listener,)),
            should_stop=should_stop,
            open_store=open_store,
            work_directory=self.output,
            now=time.monotonic,
        )
        return run_train(self.step, context)

    def left(self) -> dict[str, bytes]:
        return {name: data for name, data in files_below(self.output).items() if name not in NOT_COMPARED}


def train_step(**parts: Any) -> TrainStep:
    spec = small_spec(**{"checkpoints": {"everyTokens": 128, "keep": 2}, **parts})
    location = StoreLocation(uri="file://cache")
    return TrainStep(step="train", namespace="ns", name="job", uid="uid", spec=spec, activations=location)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_small_cache(FileStore(folder))
    return folder


@pytest.fixture(autouse=True)
def _no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to disk guards against losing power; a process that is killed loses nothing that was written."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def new_job(cache: Path, tmp_path: Path) -> Callable[..., Job]:
    numbers = iter(range(10**6))

    def make(**parts: Any) -> Job:
        return Job(cache, tmp_path / f"out{next(numbers)}", train_step(**parts))

    return make


def in_child(work: Callable[[], None]) -> int:
    """Exit code of a forked process that does this; 0 when it comes to its end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_at_every_call_the_results_are_the_same(new_job: Callable[..., Job]) -> None:
    undisturbed = new_job()
    calls = Calls(None)
    undisturbed.run(calls)
    expected = undisturbed.left()
    assert {"topk/sae_weights.safetensors", "standard/cfg.json", "metrics.jsonl"} <= expected.keys()
    assert not [name for name in expected if name.startswith("checkpoints/")]
    assert calls.count >= 60
    continued = 0
    for number in range(1, calls.count + 1):
        job = new_job()
        code = in_child(lambda job=job, number=number: job.run(Calls(number)) and None)
        # The order of calls of several threads may differ: the last ones may not be reached.
        assert code == KILLED or (code == 0 and number > calls.count - 10), number
        continued += (job.output / "checkpoints").exists()
        assert in_child(lambda job=job: job.run(Calls(None)) and None) == 0, number
        assert job.left() == expected, number
    assert continued > calls.count // 4


def test_killed_again_and_again_it_still_comes_to_its_end(new_job: Callable[..., Job]) -> None:
    undisturbed, job = new_job(), new_job()
    undisturbed.run(Calls(None))
    attempts = 0
    # Later each time: an attempt must come far enough to store its first checkpoint.
    while in_child(lambda allowed=30 + attempts: job.run(Calls(allowed)) and None) == KILLED:
        attempts += 1
        assert attempts < 200
    assert attempts > 3
    assert job.left() == undisturbed.left()


def test_sigterm_leaves_a_checkpoint_and_the_next_attempt_goes_on_from_it(new_job: Callable[..., Job]) -> None:
    undisturbed, job = new_job(), new_job()
    undisturbed.run(Calls(None))

    def terminate_at(tokens: int) -> Callable[[Progress], None]:
        def listener(state: Progress) -> None:
            if state.tokens == tokens:
                os.kill(os.getpid(), signal.SIGTERM)

        return listener

    for tokens in (96, 320):
        with stop_on_signals() as stop, pytest.raises(Stopped) as caught:
            job.run(Calls(None), should_stop=stop, listener=terminate_at(tokens))
        assert caught.value.tokens == tokens
        assert (job.output / f"checkpoints/{tokens}/checkpoint.json").exists()
        assert (job.output / f"checkpoints/{tokens}/topk/cfg.json").exists()
    seen: list[Progress] = []
    job.run(Calls(None), listener=seen.append)
    assert min(state.tokens for state in seen if state.total_tokens) == 320
    assert job.left() == undisturbed.left()


def test_stopped_before_the_first_step_there_is_nothing_to_keep(new_job: Callable[..., Job]) -> None:
    job = new_job()
    with pytest.raises(Stopped) as caught:
        job.run(Calls(None), should_stop=lambda: True)
    assert caught.value.tokens is None
    assert not (job.output / "checkpoints").exists()


def test_a_corrupt_newest_checkpoint_costs_only_the_way_back(new_job: Callable[..., Job]) -> None:
    undisturbed, job = new_job(), new_job()
    undisturbed.run(Calls(None))

    def stop_after(tokens: int) -> None:
        seen = [0]
        with pytest.raises(Stopped):
            job.run(
                Calls(None),
                should_stop=lambda: seen[0] >= tokens,
                listener=lambda state: seen.__setitem__(0, state.tokens),
            )

    stop_after(300)
    newest = max((job.output / "checkpoints").iterdir(), key=lambda folder: int(folder.name))
    assert newest.name == "320"
    damaged = newest / "state/standard.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00")
    seen: list[Progress] = []
    job.run(Calls(None), listener=seen.append)
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
    expected = undisturbed.run(Calls(None))
    assert [(sae.name, sae.phase) for sae in expected.saes or []] == [("broken", "Failed"), ("sound", "Succeeded")]
    assert expected.exit_code == 0
    with stop_on_signals() as stop, pytest.raises(Stopped):
        job.run(
            Calls(None),
            should_stop=stop,
            listener=lambda state: os.kill(os.getpid(), signal.SIGTERM) if state.tokens == 320 else None,
        )
    result = job.run(Calls(None))
    assert result.saes == expected.saes
    assert job.left() == undisturbed.left()
    assert not (job.output / "broken").exists()


def test_finished_results_are_adopted(new_job: Callable[..., Job]) -> None:
    job = new_job()
    first = job.run(Calls(None))
    before = files_below(job.output)
    again = job.run(Calls(None))
    assert (first.adopted, again.adopted) == (False, True)
    assert (again.saes, again.tokens) == (first.saes, first.tokens)
    assert files_below(job.output) == before


def test_raised_tokens_train_again_as_if_asked_for_at_first(new_job: Callable[..., Job]) -> None:
    job = new_job()
    job.run(Calls(None))
    more = {"training": {"tokens": 900, "batchSize": 32, "logEverySteps": 3, "learningRate": 0.01}}
    result = replace(job, step=train_step(**more)).run(Calls(None))
    directly = new_job(**more)
    directly.run(Calls(None))
    assert result.tokens == 928
    assert job.left() == directly.left()


def test_raised_tokens_lengthen_a_training_that_is_not_finished(new_job: Callable[..., Job]) -> None:
    job = new_job()
    assert in_child(lambda: job.run(Calls(80)) and None) == KILLED
    assert (job.output / "checkpoints").exists()
    seen: list[Progress] = []
    more = {"training": {"tokens": 900, "batchSize": 32, "logEverySteps": 3, "learningRate": 0.01}}
    result = replace(job, step=train_step(**more)).run(Calls(None), listener=seen.append)
    assert result.tokens == 928
    assert min(state.tokens for state in seen if state.total_tokens) >= 128


def test_another_spec_is_refused_and_nothing_is_overwritten(new_job: Callable[..., Job]) -> None:
    job = new_job()
    job.run(Calls(None))
    before = files_below(job.output)
    other = replace(job, step=train_step(normalization="none"))
    with pytest.raises(InvalidInput) as caught:
        other.run(Calls(None))
    assert (caught.value.reason, caught.value.field) == ("OutputTaken", "spec.output.uri")
    assert files_below(job.output) == before


def test_results_tell_what_was_trained(new_job: Callable[..., Job]) -> None:
    job = new_job()
    job.run(Calls(None))
    results = json.loads((job.output / "results.json").read_text())
    assert results["tokens"] == 608
    topk, standard = results["saes"]
    assert (topk["name"], standard["name"]) == ("topk", "standard")
    assert topk["explained_variance"] > topk["explained_variance_at_10_percent"]
    assert topk["ce_loss_score"] is None
    assert results["provenance"]["cache"]["identity"] == "0123456789abcdef"
    assert results["provenance"]["resolved"]["saes"]["topk"]["scale"] > 0
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["sae"] == "topk" and "evaluation" in line][-1]
    assert last["evaluation"]["explained_variance"] == topk["explained_variance"]
    assert "<html" in (job.output / "report.html").read_text()
