"""One step as a pod runs it: spec in, progress served, result and exit code out."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path

from pydantic import ValidationError

from sae_job.errors import InvalidInput, PeerLost, Stopped
from sae_job.reporting.endpoint import serve_progress
from sae_job.reporting.log import LogTail, set_up_logging, with_earlier_attempts
from sae_job.reporting.progress import ProgressReporter
from sae_job.reporting.termination import write_result
from sae_job.steps.context import StepContext
from sae_job.steps.output_marker import check_output
from sae_job.steps.stopping import stop_on_signals
from sae_job.storage.base import ObjectNotFound, ObjectStore, StoreError
from sae_job.storage.open import open_store
from sae_job.training.place import ALONE, Place
from sae_operator.api.steps import (
    ENV_COMPLETION_INDEX,
    ENV_POD_IP,
    ENV_SECRETS_DIRECTORY,
    ENV_TERMINATION_MESSAGE,
    PEER_LOST,
    PROGRESS_PORT,
    CacheStep,
    ExitCode,
    StepResult,
    SweepStep,
    TrainStep,
)
from sae_operator.api.store import StoreLocation

logger = logging.getLogger(__name__)

# Each step's module is imported only when it runs: most need torch.
STEPS: dict[str, tuple[str, str]] = {
    "preflight": ("sae_job.steps.preflight", "run_preflight"),
    "prepare": ("sae_job.steps.prepare", "run_prepare"),
    "cache": ("sae_job.steps.cache", "run_cache"),
    "finalize": ("sae_job.steps.finalize", "run_finalize"),
    "train": ("sae_job.steps.train", "run_train"),
    "report": ("sae_job.steps.sweep_report", "run_report"),
}
LOG_KEY = "log.txt"
CACHE_STEPS = ("prepare", "cache", "finalize")
SWEEP_STEPS = ("report",)

AnyStep = CacheStep | TrainStep | SweepStep
StepFunction = Callable[[AnyStep, StepContext], StepResult]


def step_function(name: str) -> StepFunction:
    """The function that runs a step.

    Raises:
        InvalidInput: no step has this name.
    """
    if name not in STEPS:
        raise InvalidInput("UnknownStep", f"no step is named {name!r}; there are {', '.join(STEPS)}")
    module, function = STEPS[name]
    return getattr(import_module(module), function)


def read_step_spec(name: str, path: Path) -> AnyStep:
    """The spec that a pod is given, validated by the models that the operator wrote it with.

    Raises:
        InvalidInput: the file cannot be read, is not valid, or is another step's.
    """
    model = CacheStep if name in CACHE_STEPS else SweepStep if name in SWEEP_STEPS else TrainStep
    try:
        step = model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InvalidInput("SpecUnreadable", f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(
            "SpecInvalid",
            f"{first['msg']}; operator and job image may be of different versions",
            field=".".join(str(part) for part in first["loc"]),
        ) from error
    if step.step != name:
        raise InvalidInput("SpecInvalid", f"{path} is for step {step.step!r}, not {name!r}")
    return step


def outcome(name: str, run: Callable[[], StepResult]) -> StepResult:
    """Run a step and turn how it ends into a result: the one place that maps errors to exit codes."""
    try:
        return run()
    except InvalidInput as error:
        return StepResult(step=name, exit_code=ExitCode.INVALID, reason=error.reason, message=str(error))
    except Stopped as error:
        return StepResult(
            step=name,
            exit_code=ExitCode.STOPPED,
            reason="Stopped",
            message=error.message,
            checkpoint_tokens=error.tokens,
        )
    except PeerLost as error:
        return StepResult(step=name, exit_code=ExitCode.FAILED, reason=PEER_LOST, message=str(error))
    except StoreError as error:
        logger.exception("the object store failed")
        return StepResult(step=name, exit_code=ExitCode.FAILED, reason="StoreFailed", message=str(error))
    except Exception as error:
        # The last resort of a process: told whole in the log, in one line in the message, and as an exit code.
        logger.exception("the step failed")
        return StepResult(
            step=name, exit_code=ExitCode.FAILED, reason="StepFailed", message=f"{type(error).__name__}: {error}"
        )


def store_log(step: TrainStep, open_output: Callable[[StoreLocation], ObjectStore], tail: LogTail) -> None:
    """Keep the log beside the results, behind those of earlier attempts, in an output that is this job's; a store that
    cannot take it must not change the step's outcome."""
    try:
        output = open_output(step.spec.output)
        if check_output(output, step):
            output.put(LOG_KEY, with_earlier_attempts(_stored_log(output), tail.text()))
    except (StoreError, InvalidInput) as error:
        logger.warning("%s could not be stored: %s", LOG_KEY, error)


def _stored_log(output: ObjectStore) -> bytes:
    try:
        return output.get(LOG_KEY)
    except ObjectNotFound:
        return b""


def run_step_process(name: str, path: Path) -> int:
    """Run one step as a pod does, in as many processes as it takes; returns the exit code."""
    told = os.environ.get(ENV_TERMINATION_MESSAGE)
    message = Path(told) if told else None
    if name == "train":
        # Not for other steps: it asks torch for GPUs.
        from sae_job.steps.launch import gpu_count, group_of, run_launcher

        group = group_of(os.environ, gpu_count)
        if group.size > 1:
            return run_launcher(name, path, group, message)
    return run_rank(name, path, ALONE, message)


def run_rank(name: str, path: Path, place: Place, message: Path | None) -> int:
    """Run one step in this process; returns the exit code.

    Args:
        name: of the step.
        path: of its spec.
        place: which of the processes that run it together this is.
        message: where its result goes.
    """
    # What all processes tell alike, the first one tells.
    tail = set_up_logging(logging.INFO if place.index == 0 else logging.WARNING)
    reporter = ProgressReporter(name)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        host = os.environ.get(ENV_POD_IP)
        if host and place.local_index == 0:
            stack.enter_context(serve_progress(reporter, host, PROGRESS_PORT))
        context = StepContext(
            # All processes are equally far: the first one tells it for all.
            reporter=reporter if place.index == 0 else ProgressReporter(name),
            should_stop=stop,
            open_store=store_opener(),
            now=time.time,
            completion_index=int(os.environ.get(ENV_COMPLETION_INDEX, "0")),
            place=place,
        )
        steps: list[AnyStep] = []

        def run() -> StepResult:
            step = read_step_spec(name, path)
            steps.append(step)
            logger.info("step %s of %s/%s", name, step.namespace, step.name)
            return step_function(name)(step, context)

        result = outcome(name, run)
        for step in steps:
            if isinstance(step, TrainStep) and name == "train" and place.index == 0:
                tell(result)
                store_log(step, context.open_store, tail)
                break
        else:
            tell(result)
        # Before signals are let through again: what is done must be told.
        if message is not None:
            write_result(result, message)
    return result.exit_code


def tell(result: StepResult) -> None:
    """Log how a step ended."""
    log = logger.info if result.exit_code == ExitCode.DONE else logger.error
    log("%s: %s", result.reason, result.message or "done")


def store_opener() -> Callable[[StoreLocation], ObjectStore]:
    """Opens stores with the Secrets that this process is given."""
    secrets = os.environ.get(ENV_SECRETS_DIRECTORY)
    return partial(open_store, secrets_directory=Path(secrets) if secrets else None)
