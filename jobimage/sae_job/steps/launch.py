"""Starting the processes that train together: one per GPU of each pod, by torchrun, and one result of them all.

python -m sae_job.steps.launch STEP SPEC RESULTS_FOLDER     (what each of the processes runs)
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from sae_job.reporting.endpoint import serve_progress
from sae_job.reporting.log import set_up_logging
from sae_job.reporting.progress import ProgressReporter
from sae_job.reporting.termination import write_result
from sae_job.steps.meeting import POLL_SECONDS, AlreadyFinished, Meeting
from sae_job.steps.output_marker import check_output, finished_results, result_of
from sae_job.steps.step import outcome, read_step_spec, run_rank, store_opener, tell
from sae_job.steps.stopping import stop_on_signals
from sae_job.training.place import Place
from sae_operator.api.steps import (
    ENV_COMPLETION_INDEX,
    ENV_POD_IP,
    ENV_PODS,
    ENV_PROCESSES,
    ENV_RENDEZVOUS,
    PEER_LOST,
    PROGRESS_PORT,
    ExitCode,
    StepResult,
    TrainStep,
)

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
# Processes that were asked to stop store a checkpoint first; whoever asked them ends them if it takes too long.
STOP_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Group:
    """The processes of one training.

    Attributes:
        processes: how many run in this pod.
        pods: how many pods there are, each with as many processes.
        pod: which of them this is, from 0.
        rendezvous: host and port of the first pod; None where there is one pod.
    """

    processes: int = 1
    pods: int = 1
    pod: int = 0
    rendezvous: tuple[str, int] | None = None

    @property
    def size(self) -> int:
        return self.processes * self.pods


def group_of(environment: Mapping[str, str], count_gpus: Callable[[], int]) -> Group:
    """The group that this pod is part of.

    Args:
        environment: of the pod.
        count_gpus: GPUs of this pod; each gets a process.
    """
    told = environment.get(ENV_PROCESSES)
    processes = int(told) if told else max(1, count_gpus())
    pods = int(environment.get(ENV_PODS, "1"))
    if pods == 1:
        return Group(processes)
    host, _, port = environment[ENV_RENDEZVOUS].rpartition(":")
    return Group(processes, pods, int(environment.get(ENV_COMPLETION_INDEX, "0")), (host, int(port)))


def gpu_count() -> int:
    """GPUs that this process sees; asking takes none of their memory."""
    import torch

    return torch.cuda.device_count()


def run_launcher(name: str, path: Path, group: Group, message: Path | None) -> int:
    """Run one step in this pod's processes, beside those of the other pods; returns the exit code.

    Args:
        name: of the step.
        path: of its spec.
        group: the processes; more than one.
        message: where the pod's result goes.
    """
    set_up_logging()
    with stop_on_signals() as stop:
        result = outcome(name, lambda: launch(name, path, group, stop))
        tell(result)
        if message is not None:
            write_result(result, message)
    return result.exit_code


def launch(name: str, path: Path, group: Group, should_stop: Callable[[], bool]) -> StepResult:
    """Run a step in all processes of this pod and tell how it ended.

    Args:
        name, path, group: as of `run_launcher`.
        should_stop: whether this process was asked to stop; looked at until the processes run.

    Raises:
        InvalidInput: the spec is not valid, or the output another job's.
        Stopped: asked to stop before they ran.
        PeerLost: the other pods did not come.
        StoreError: the output cannot be read.
    """
    met = None
    if group.rendezvous is not None:
        host, port = group.rendezvous
        meeting = Meeting(group.pods, group.pod, host, port, should_stop, partial(_finished, name, path))
        try:
            with _waiting_is_shown(name):
                met = meeting.store()
        except AlreadyFinished as finished:
            return finished.result
        logger.info("all of %d pods are there", group.pods)
    with tempfile.TemporaryDirectory(prefix="sae-job-ranks-") as folder:
        ended = _run_processes(group, name, path, Path(folder), should_stop)
        results = {index: _read_result(Path(folder) / f"{index}.json") for index in _indices(group)}
    # Until here: the other pods ask the first one's how the training ended.
    del met
    return merged(name, results, ended)


def _indices(group: Group) -> range:
    return range(group.pod * group.processes, (group.pod + 1) * group.processes)


@contextmanager
def _waiting_is_shown(name: str) -> Iterator[None]:
    """Answer the operator while there is no process yet that does."""
    host = os.environ.get(ENV_POD_IP)
    if not host:
        yield
        return
    with serve_progress(ProgressReporter(name), host, PROGRESS_PORT):
        yield


def _finished(name: str, path: Path) -> StepResult | None:
    """What the training has left, when it is finished."""
    from sae_job.training.plan import tokens_asked_for

    step = read_step_spec(name, path)
    assert isinstance(step, TrainStep)
    output = store_opener()(step.spec.output)
    results = finished_results(output) if check_output(output, step) else None
    if results is None or results["tokens"] < tokens_asked_for(step.spec):
        return None
    return result_of(name, results, adopted=True)


def _run_processes(
    group: Group, step: str, spec: Path, folder: Path, should_stop: Callable[[], bool]
) -> Mapping[int, int]:
    """Run the processes by torchrun's agent; returns the exit codes of those that did not end well, where known."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # It tells at length what our own result tells in a line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // group.processes)))
    alone = group.rendezvous is None
    host, port = (LOOPBACK, _free_port()) if group.rendezvous is None else group.rendezvous
    config = LaunchConfig(
        min_nodes=group.pods,
        max_nodes=group.pods,
        nproc_per_node=group.processes,
        run_id="sae-job",
        rdzv_backend="static",
        rdzv_endpoint=f"{host}:{port}",
        rdzv_configs={"rank": group.pod, "timeout": 120},
        local_addr=LOOPBACK if alone else None,
        # A lost process costs the whole group its state; the pods are started again by their Job.
        max_restarts=0,
        shutdown_timeout=STOP_SECONDS,
    )
    arguments = ("-m", "sae_job.steps.launch", step, str(spec), str(folder))
    with _stop_passed_on(should_stop):
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            return {index: failure.exitcode for index, failure in error.failures.items()}
        except SignalException:
            return {}
    return {}


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        return taken.getsockname()[1]


@contextmanager
def _stop_passed_on(should_stop: Callable[[], bool]) -> Iterator[None]:
    """Hand on to torchrun a SIGTERM that came before it listened to signals itself."""
    ours, done = signal.getsignal(signal.SIGTERM), threading.Event()

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            if should_stop() and signal.getsignal(signal.SIGTERM) is not ours:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True, name="stop")
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _read_result(path: Path) -> StepResult | None:
    try:
        return StepResult.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def merged(step: str, results: Mapping[int, StepResult | None], ended: Mapping[int, int]) -> StepResult:
    """One result of the processes of a pod: what went wrong first of all, or what the first of them says.

    Args:
        step: name of the step.
        results: process -> what it left; None when it left nothing.
        ended: process -> exit code of those that did not end well, negative for a signal.
    """
    said = [result for _, result in sorted(results.items()) if result is not None]
    invalid = [result for result in said if result.exit_code == ExitCode.INVALID]
    failed = [result for result in said if result.exit_code == ExitCode.FAILED]
    causes = [result for result in failed if result.reason != PEER_LOST]
    silent = [index for index, result in sorted(results.items()) if result is None]
    # SIGTERM is how torchrun ends those that are left.
    killed = [index for index in silent if ended.get(index) not in (None, -signal.SIGTERM, ExitCode.STOPPED)]
    for found in (invalid, causes):
        if found:
            return found[0]
    if killed:
        return _killed(step, killed, ended)
    if failed:
        return failed[0]
    stopped = [result for result in said if result.exit_code == ExitCode.STOPPED]
    if stopped:
        return stopped[0]
    if silent:
        return StepResult(step=step, exit_code=ExitCode.STOPPED, reason="Stopped", message="stopped before it began")
    return said[0]


def _killed(step: str, indices: Sequence[int], ended: Mapping[int, int]) -> StepResult:
    def how(index: int) -> str:
        code = ended[index]
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    text = ", ".join(f"process {index} by {how(index)}" for index in indices)
    return StepResult(
        step=step,
        exit_code=ExitCode.FAILED,
        reason="ProcessKilled",
        message=f"ended without a word: {text}; SIGKILL most often means that memory ran out",
    )


def main() -> int:
    """One of the processes."""
    step, spec, folder = sys.argv[1:]
    place = Place.of(os.environ)
    return run_rank(step, Path(spec), place, Path(folder) / f"{place.index}.json")


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    # What is told is written. Threads of torch.distributed could only turn a good end into an abort.
    os._exit(code)
