"""The launcher of processes that train together: exit codes, messages, signals, lost processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sae_job.storage.file_store import PARTIAL_SUFFIX, FileStore
from sae_operator.api.steps import TrainStep
from sae_operator.api.store import StoreLocation
from tests.faults import folder_bytes
from tests.rank_processes import free_port
from tests.small_cache import write_small_cache
from tests.small_training import NOT_COMPARED, TRAINING, small_spec
from tests.testbed.waiting import wait_for

RUN = "import sys; from sae_job.entry import main; sys.exit(main())"
SECONDS = 240


@dataclass
class Launched:
    """`sae-job step train` on the small cache, as a pod runs it."""

    folder: Path
    output: Path

    def start(self, processes: int, tokens: int = 600, batch: int = 32, **environment: Any) -> subprocess.Popen[str]:
        location = f"file://{self.folder / 'cache'}"
        spec = small_spec(
            output={"uri": f"file://{self.output}"},
            activations={"uri": location},
            training=TRAINING | {"tokens": tokens, "batchSize": batch},
            checkpoints={"everyTokens": 1600, "keep": 2},
        )
        step = TrainStep(
            step="train", namespace="ns", name="job", uid="uid", spec=spec, activations=StoreLocation(uri=location)
        )
        path = self.folder / f"{self.output.name}.json"
        path.write_text(step.model_dump_json(by_alias=True, exclude_none=True))
        own = {
            "SAE_JOB_PROCESSES": str(processes),
            "SAE_JOB_TERMINATION_MESSAGE": str(self.message_path),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-c", RUN, "step", "train", str(path)],
            env={**os.environ, **own, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, processes: int, **settings: Any) -> tuple[int, dict[str, Any]]:
        with self.running(processes, **settings) as process:
            _, log = process.communicate(timeout=SECONDS)
            assert self.message_path.exists(), log
            return process.returncode, self.message

    @contextmanager
    def running(self, processes: int, **settings: Any) -> Iterator[subprocess.Popen[str]]:
        process = self.start(processes, **settings)
        try:
            yield process
        finally:
            for child in (*children_of(process.pid), process.pid):
                with_signal(child, signal.SIGKILL)
            process.communicate()

    @property
    def message_path(self) -> Path:
        return self.folder / f"{self.output.name}.message"

    @property
    def message(self) -> dict[str, Any]:
        return json.loads(self.message_path.read_text())

    def checkpoints(self) -> list[Path]:
        return list(self.output.glob("checkpoints/*/checkpoint.json"))

    def left(self) -> dict[str, bytes]:
        left_out = (*NOT_COMPARED, "log.txt", "sae-operator.json")
        return {
            name: data
            for name, data in folder_bytes(self.output).items()
            if name not in left_out and not name.endswith(PARTIAL_SUFFIX)
        }


def children_of(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def with_signal(process: int, number: signal.Signals) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def ranks_of(process: int) -> dict[int, int]:
    """Rank -> process of those that a launcher has started."""
    found: dict[int, int] = {}
    for child in children_of(process):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [variable.removeprefix(b"RANK=") for variable in variables if variable.startswith(b"RANK=")]
        found |= {int(rank): child for rank in ranks}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    write_small_cache(FileStore(folder / "cache"))
    return folder


def test_results_of_two_processes_are_told_once(folder: Path) -> None:
    launched = Launched(folder, folder / "whole")
    code, message = launched.run(2)
    assert (code, message["reason"], message["tokens"]) == (0, "Completed", 608)
    assert {sae["name"] for sae in message["saes"]} == {"topk", "standard"}
    assert "2 processes" in (launched.output / "log.txt").read_text()


def test_wrong_input_ends_with_2_and_its_message(folder: Path) -> None:
    code, message = Launched(folder, folder / "uneven").run(2, batch=33)
    assert (code, message["reason"]) == (2, "BatchNotDivisible")
    assert message["message"].startswith("spec.training.batchSize: 2 processes")


# Long enough that it is still going on when it is disturbed, and two checkpoints are kept.
LONG = 16_000
# For trainings that nobody waits for the end of.
ENDLESS = 100 * LONG


def test_sigterm_stops_all_after_a_checkpoint(folder: Path) -> None:
    launched = Launched(folder, folder / "stopped")
    with launched.running(2, tokens=ENDLESS) as process:
        wait_for(lambda: launched.checkpoints(), SECONDS, what="a checkpoint")
        process.terminate()
        process.communicate(timeout=SECONDS)
    assert (process.returncode, launched.message["reason"]) == (143, "Stopped")
    stored = launched.message["checkpointTokens"]
    assert (launched.output / f"checkpoints/{stored}/checkpoint.json").exists()
    assert 0 < stored < ENDLESS


def test_when_one_is_killed_all_end_soon_and_training_goes_on_from_the_checkpoint(folder: Path) -> None:
    launched = Launched(folder, folder / "killed")
    with launched.running(2, tokens=LONG) as process:
        wait_for(lambda: launched.checkpoints(), SECONDS, what="a checkpoint")
        children = children_of(process.pid)
        with_signal(ranks_of(process.pid)[1], signal.SIGKILL)
        process.communicate(timeout=SECONDS)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert (process.returncode, launched.message["reason"]) == (1, "ProcessKilled")
    assert "process 1 by signal SIGKILL" in launched.message["message"]
    undisturbed = Launched(folder, folder / "undisturbed")
    assert [each.run(2, tokens=LONG)[0] for each in (launched, undisturbed)] == [0, 0]
    assert launched.left() == undisturbed.left()


@dataclass
class Pods:
    """Two pods of one process each, which find each other on this machine."""

    launched: Launched

    @contextmanager
    def running(self, **settings: Any) -> Iterator[list[subprocess.Popen[str]]]:
        together: dict[str, Any] = {"SAE_JOB_PODS": "2", "SAE_JOB_RENDEZVOUS": f"127.0.0.1:{free_port()}"}
        with ExitStack() as stack:
            yield [
                stack.enter_context(
                    self.launched.running(
                        1,
                        JOB_COMPLETION_INDEX=str(index),
                        SAE_JOB_TERMINATION_MESSAGE=str(self.message_path(index)),
                        **settings,
                        **together,
                    )
                )
                for index in range(2)
            ]

    def message_path(self, index: int) -> Path:
        return self.launched.folder / f"{self.launched.output.name}-{index}.message"

    def ends(self, processes: list[subprocess.Popen[str]]) -> list[tuple[int, dict[str, Any]]]:
        """Exit codes and messages, once both have ended."""
        logs = [process.communicate(timeout=SECONDS)[1] for process in processes]
        assert self.message_path(0).exists(), logs
        paths = [self.message_path(index) for index in range(2)]
        messages = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
        return [(process.returncode, message) for process, message in zip(processes, messages, strict=True)]


def test_a_pod_that_is_evicted_takes_the_other_one_along_after_a_checkpoint(folder: Path) -> None:
    pods = Pods(Launched(folder, folder / "evicted"))
    with pods.running(tokens=ENDLESS) as processes:
        wait_for(lambda: pods.launched.checkpoints(), SECONDS, what="a checkpoint")
        processes[1].terminate()
        (first, told), (second, beside) = pods.ends(processes)
    assert (first, second) == (143, 143)
    assert (told["reason"], beside["reason"]) == ("Stopped", "Stopped")
    assert 0 < told["checkpointTokens"] < ENDLESS


def test_a_pod_that_is_lost_ends_the_other_one_and_both_go_on_when_they_are_there_again(folder: Path) -> None:
    pods = Pods(Launched(folder, folder / "lost"))
    with pods.running(tokens=LONG) as processes:
        wait_for(lambda: pods.launched.checkpoints(), SECONDS, what="a checkpoint")
        for process in (processes[1].pid, *children_of(processes[1].pid)):
            with_signal(process, signal.SIGKILL)
        (first, told), _ = pods.ends(processes)
    assert (first, told["reason"]) == (1, "PeerLost")
    with pods.running(tokens=LONG) as processes:
        (first, told), (second, beside) = pods.ends(processes)
    assert (first, second) == (0, 0)
    assert told["tokens"] == LONG
    assert beside["reason"] == "Completed"
    assert "saes" not in beside
