"""A step's process: how it ends decides its exit code, its termination message and its log."""

import json
import os
import signal
from pathlib import Path

import pytest

from sae_job.errors import InvalidInput, Stopped
from sae_job.steps import step as step_module
from sae_job.steps.context import StepContext
from sae_job.steps.output_marker import claim_output
from sae_job.steps.step import STEPS, outcome, read_step_spec, run_step_process, step_function
from sae_job.steps.stopping import stop_on_signals
from sae_job.storage.base import StoreError
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import cache_location
from sae_operator.api.steps import CacheStep, ExitCode, StepResult, TrainStep
from sae_operator.api.store import StoreLocation
from sae_operator.api.training_job import SAETrainingJobSpec


@pytest.fixture
def cache_step(tmp_path: Path) -> CacheStep:
    spec = ActivationCacheSpec.model_validate(
        {
            "model": {"name": "gpt2"},
            "dataset": {"path": "text"},
            "hooks": [{"name": "transformer.h.7"}],
            "tokens": 1000,
            "storage": {"uri": f"file://{tmp_path}/caches"},
        }
    )
    location = cache_location(spec, "default")
    return CacheStep(step="prepare", namespace="default", name="c", uid="u", spec=spec, location=location)


@pytest.fixture
def spec_file(tmp_path: Path, cache_step: CacheStep) -> Path:
    path = tmp_path / "step.json"
    path.write_text(json.dumps(cache_step.to_manifest()))
    return path


def raising(error: BaseException):
    def run() -> StepResult:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "exit_code", "reason"),
    [
        (InvalidInput("HookNotFound", "no such hook", field="spec.hooks[0].name"), ExitCode.INVALID, "HookNotFound"),
        (Stopped("checkpoint at 100 tokens", tokens=100), ExitCode.STOPPED, "Stopped"),
        (StoreError("s3://bucket did not answer"), ExitCode.FAILED, "StoreFailed"),
        (RuntimeError("CUDA is out of memory"), ExitCode.FAILED, "StepFailed"),
    ],
)
def test_each_kind_of_end_has_its_exit_code_and_reason(error: Exception, exit_code: int, reason: str) -> None:
    result = outcome("train", raising(error))
    assert (result.exit_code, result.reason) == (exit_code, reason)


def test_a_users_mistake_names_the_field() -> None:
    result = outcome("prepare", raising(InvalidInput("HookNotFound", "nearest: a.b", field="spec.hooks[0].name")))
    assert result.message == "spec.hooks[0].name: nearest: a.b"


def test_a_stop_tells_the_tokens_of_its_checkpoint() -> None:
    assert outcome("train", raising(Stopped("checkpointed", tokens=512))).checkpoint_tokens == 512


def test_the_spec_that_the_operator_writes_is_read_back_equal(spec_file: Path, cache_step: CacheStep) -> None:
    assert read_step_spec("prepare", spec_file) == cache_step


def test_a_spec_of_another_step_is_refused(spec_file: Path) -> None:
    with pytest.raises(InvalidInput, match="is for step 'prepare', not 'cache'"):
        read_step_spec("cache", spec_file)


def test_a_spec_with_an_unknown_field_is_refused_with_its_path(spec_file: Path) -> None:
    content = json.loads(spec_file.read_text())
    content["spec"]["tokenz"] = 3
    spec_file.write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=r"spec\.tokenz"):
        read_step_spec("prepare", spec_file)


def test_a_missing_spec_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read"):
        read_step_spec("prepare", tmp_path / "none.json")


def test_an_unknown_step_names_those_that_exist() -> None:
    with pytest.raises(InvalidInput, match="preflight, prepare, cache, finalize, train"):
        step_function("bake")


@pytest.mark.parametrize("name", STEPS)
def test_every_step_in_the_table_can_be_loaded(name: str) -> None:
    assert callable(step_function(name))


def test_the_process_writes_its_result_as_termination_message(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = tmp_path / "termination"
    message.touch()
    monkeypatch.setenv("SAE_JOB_TERMINATION_MESSAGE", str(message))
    monkeypatch.setattr(
        step_module,
        "step_function",
        lambda name: raising_step(InvalidInput("NoTokens", "the data set holds no text", field="spec.dataset.path")),
    )
    assert run_step_process("prepare", spec_file) == ExitCode.INVALID
    result = StepResult.model_validate_json(message.read_bytes())
    assert result.reason == "NoTokens"
    assert result.message == "spec.dataset.path: the data set holds no text"


def run_failing_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    spec = SAETrainingJobSpec.model_validate(
        {
            "activations": {"uri": f"file://{folder}/cache"},
            "saes": [{"name": "k4", "architecture": {"type": "topk", "k": 4}, "dSae": 8}],
            "output": {"uri": f"file://{folder}/out"},
        }
    )
    step = TrainStep(
        step="train",
        namespace="ns",
        name="job",
        uid="u",
        spec=spec,
        activations=StoreLocation(uri=f"file://{folder}/cache"),
    )
    (folder / "train.json").write_text(json.dumps(step.to_manifest()))

    def fail(step: TrainStep, context: StepContext) -> StepResult:
        claim_output(context.open_store(step.spec.output), step)
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(step_module, "step_function", lambda name: fail)
    return run_step_process("train", folder / "train.json")


def test_a_training_that_fails_leaves_its_log_with_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_failing_training(tmp_path, monkeypatch) == ExitCode.FAILED
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Traceback" in log
    assert "StepFailed: RuntimeError: the device is lost" in log.splitlines()[-1]


def test_the_logs_of_earlier_attempts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        run_failing_training(tmp_path, monkeypatch)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("StepFailed: RuntimeError: the device is lost") == 3
    assert log.count("--- the next attempt ---") == 2


def test_no_log_is_written_into_the_output_of_another_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sae-operator.json").write_text('{"kind": "SAETrainingJob", "specHash": "other"}')
    assert run_failing_training(tmp_path, monkeypatch) == ExitCode.INVALID
    assert not (tmp_path / "out" / "log.txt").exists()


def raising_step(error: Exception):
    def run(step: object, context: object) -> StepResult:
        raise error

    return run


def test_sigterm_becomes_a_question_and_the_former_handler_returns() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_ends_at_once() -> None:
    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with stop_on_signals(), pytest.raises(KeyboardInterrupt):
        interrupt_twice()
