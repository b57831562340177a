"""Runs of Weights & Biases, with its real client: what offline files hold, what an attempt that goes on adds, and that
no trouble with the network reaches the training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.reporting import wandb_runs
from sae_job.reporting.wandb_file import history, last_step, messages, name_after, run_files
from sae_job.reporting.wandb_runs import RunOfSae, WandbRuns, check_wandb, run_id
from sae_operator.api.training_job import WandbSettings
from tests.wandb_server import Behaviour, WandbServer

OFFLINE = WandbSettings(project="p", mode="offline", tags=["t"])
ONLINE = WandbSettings(project="p")
LAST = 12
# Whoever waits for a server that does not answer waits longer: it never does. Nothing else takes so long.
HELD_UP_SECONDS = 30


@dataclass(frozen=True)
class At:
    step: int

    @property
    def tokens(self) -> int:
        return 32 * self.step


class Sae:
    def state_dict(self) -> dict[str, Tensor]:
        return {"W_dec": torch.eye(4), "b_enc": torch.arange(4.0), "threshold": torch.ones(4)}


class Window:
    log10_frequencies = torch.tensor([-1.0, -2.0, -6.5])

    def figures(self) -> dict[str, float]:
        return {"mean_log10_feature_sparsity": -9.5 / 3, "below_1e-5": 1, "below_1e-6": 1, "rows": 64}


class Files:
    """What is stored of runs: attempt and key below wandb/ -> content. The client's names have whole seconds; attempts
    of a test are quicker."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.attempt = 0

    def last_step(self, id: str) -> int:
        logs = (data for key, data in self.objects.items() if key.endswith(f"/run-{id}.wandb"))
        return max((last_step(data) for data in logs), default=-1)

    def store(self, folder: Path) -> bool:
        self.objects |= {f"{self.attempt}/{folder.name}/{file}": path.read_bytes() for file, path in run_files(folder)}
        return True

    def rows(self, id: str) -> list[tuple[int, dict[str, Any]]]:
        """Rows of all attempts, in the order in which `wandb sync` of the folders would send them."""
        logs = [data for key, data in sorted(self.objects.items()) if key.endswith(f"/run-{id}.wandb")]
        return [
            (step, {key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
            for data in logs
            for step, items in history(data)
        ]


def save_sae(sae: Any, log10_frequencies: Any, folder: Path) -> tuple[list[Path], list[Path]]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text("{}")
    return [folder / "cfg.json"], []


@dataclass
class World:
    folder: Path
    files: Files

    def runs(self, settings: WandbSettings) -> WandbRuns:
        self.files.attempt += 1
        described = [
            RunOfSae(name, f"id{name}", f"job-{name}", {"d_sae": 4, "training": {"batchSize": 32}}, f"sae_m_h_{name}")
            for name in ("a", "b")
        ]
        return WandbRuns(
            settings,
            described,
            group="job",
            directory=self.folder / f"attempt{self.files.attempt}",
            files=self.files,
            save_sae=save_sae,
            last_step=LAST,
            now=time.monotonic,
        )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield World(tmp_path, Files())
    import wandb

    wandb.teardown()


def figures(step: int) -> dict[str, float]:
    return {"loss": 1 / step, "mse_loss": 0.5 / step, "l0": 3.0, "learning_rate": 1e-3, "dead_features": 0}


def line(sae: str, step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 32 * step, "sae": sae, **values}


def train(runs: WandbRuns, steps: range, *, lines: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """What a trainer that logs every step and evaluates every fourth tells; gives the lines so far."""
    lines = list(lines or [])
    runs.started(At(steps.start - 1), list(lines))
    for step in steps:
        for sae in ("a", "b"):
            runs.logged(sae, At(step), figures(step))
            lines.append(line(sae, step, **figures(step)))
        if step % 4 == 0:
            for sae in ("a", "b"):
                found = {"explained_variance": 1 - 1 / step, "mse": 2.0}
                runs.evaluated(sae, At(step), found, Sae())
                lines.append(line(sae, step, evaluation=found))
    return lines


def test_offline_files_hold_what_metrics_jsonl_holds(world: World) -> None:
    runs = world.runs(OFFLINE)
    lines = train(runs, range(1, LAST + 1))
    runs.window("a", At(LAST), Window())
    runs.finished()
    runs.close()
    for sae in ("a", "b"):
        rows = dict(world.files.rows(f"id{sae}"))
        assert list(rows) == list(range(1, LAST + 1))
        for told in (line for line in lines if line["sae"] == sae):
            row = rows[told["step"]]
            assert row["details/n_training_tokens"] == told["tokens"]
            if "evaluation" in told:
                assert row["reconstruction_quality.explained_variance"] == told["evaluation"]["explained_variance"]
                assert row["weights/W_dec_norms._type"] == "histogram"
                assert sum(row["weights/thresholds.values"]) == 4
            else:
                assert row["losses/overall_loss"] == told["loss"]
                assert row["losses/mse_loss"] == told["mse_loss"]
                assert row["metrics/l0"] == told["l0"]
    final = dict(world.files.rows("ida"))[LAST]
    assert final["sparsity/below_1e-6"] == 1
    assert sum(final["plots/feature_density_line_chart.values"]) == 3


def test_the_run_is_opened_with_the_whole_configuration(world: World) -> None:
    from wandb.proto import wandb_internal_pb2 as protocol

    runs = world.runs(OFFLINE)
    train(runs, range(1, 2))
    runs.close()
    (data,) = (data for key, data in world.files.objects.items() if key.endswith("run-ida.wandb"))
    record_type: Any = protocol.Record  # pyright: ignore[reportAttributeAccessIssue]
    records = [record_type.FromString(message) for message in messages(data)]
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.run_group, run.display_name) == ("ida", "p", "job", "job-a")
    assert list(run.tags) == ["t"]
    configuration = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert configuration["training"] == {"batchSize": 32}
    assert configuration["d_sae"] == 4


@pytest.mark.parametrize("cut_off_after", [6, 8, 9, 11])
@pytest.mark.parametrize("told_the_end", [False, True])
def test_an_attempt_that_goes_on_neither_doubles_nor_loses_a_step(
    world: World, cut_off_after: int, told_the_end: bool
) -> None:
    first = world.runs(OFFLINE)
    lines = train(first, range(1, 7))
    first.checkpointed(At(6), {})
    for step in range(7, cut_off_after + 1):
        first.logged("a", At(step), figures(step))
    if told_the_end:
        first.close(stopped=True)
    else:
        # Nothing more of it reaches the store.
        first._files = Files()
        first.close()
    second = world.runs(OFFLINE)
    train(second, range(7, LAST + 1), lines=lines)
    second.finished()
    second.close()
    for sae in ("a", "b"):
        rows = world.files.rows(f"id{sae}")
        assert [step for step, _ in rows] == list(range(1, LAST + 1))
        assert [row["losses/overall_loss"] for _, row in rows] == [1 / step for step in range(1, LAST + 1)]


def test_an_evaluation_that_was_cut_off_is_in_the_row_of_its_step(world: World) -> None:
    first = world.runs(OFFLINE)
    lines = train(first, range(1, 4))
    for sae in ("a", "b"):
        first.logged(sae, At(4), figures(4))
        lines.append(line(sae, 4, **figures(4)))
    first.close(stopped=True)  # while it evaluated
    second = world.runs(OFFLINE)
    second.started(At(4), lines)
    for sae in ("a", "b"):
        second.evaluated(sae, At(4), {"explained_variance": 0.75}, Sae())
    second.finished()
    second.close()
    rows = world.files.rows("ida")
    assert [step for step, _ in rows] == [1, 2, 3, 4]
    assert rows[-1][1]["losses/overall_loss"] == 0.25
    assert rows[-1][1]["reconstruction_quality.explained_variance"] == 0.75


def test_an_attempt_that_goes_on_repeats_figures_of_the_language_model(world: World) -> None:
    found = {"ce_loss_score": 0.75}
    lines = [line("a", 4, **figures(4)), line("a", 4, model_evaluation=found)]
    runs = world.runs(OFFLINE)
    runs.started(At(4), lines)
    runs.finished()
    runs.close()
    ((step, row),) = world.files.rows("ida")
    assert (step, row["model_performance_preservation.ce_loss_score"]) == (4, 0.75)


@pytest.mark.parametrize("ended", [{"stopped": True}, {"failed": True}])
def test_figures_that_follow_the_end_are_in_the_row_of_the_last_step(world: World, ended: dict[str, bool]) -> None:
    """The model's, of an attempt that found the training done."""
    first = world.runs(OFFLINE)
    lines = train(first, range(1, LAST + 1))
    first.finished()
    first.close(**ended)
    second = world.runs(OFFLINE)
    second.started(At(LAST), lines)
    second.finished()
    second.evaluated("a", At(LAST), {"ce_loss_score": 0.75}, Sae())
    second.close()
    rows = world.files.rows("ida")
    assert [step for step, _ in rows] == list(range(1, LAST + 1))
    assert rows[-1][1]["model_performance_preservation.ce_loss_score"] == 0.75
    assert rows[-1][1]["reconstruction_quality.mse"] == 2.0


def test_files_are_stored_again_only_when_they_have_grown(world: World) -> None:
    runs = world.runs(OFFLINE)
    train(runs, range(1, 9))
    stored: list[Path] = []
    world.files.store = lambda folder: bool(stored.append(folder)) or True  # type: ignore[method-assign]
    deadline = time.monotonic() + 60
    while len(stored) < 2 and time.monotonic() < deadline:
        runs.checkpointed(At(8), {})  # the client writes in its own time
    count = len(stored)
    runs.checkpointed(At(8), {})
    assert len(stored) == count == 2
    runs.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield running


@pytest.fixture
def soon_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a server that does not take all; one that does has as long as it needs."""
    monkeypatch.setattr(wandb_runs, "FINISH_SECONDS", 2.0)


def measured(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


@pytest.mark.usefixtures("soon_finished")
@pytest.mark.parametrize("trouble", ["refuse", "stall"])
def test_a_server_that_does_not_answer_at_the_start_makes_the_runs_offline(
    world: World, server: WandbServer, trouble: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_runs, "INIT_SECONDS", 2.0)
    server.behaviour = trouble
    runs = world.runs(ONLINE)
    assert measured(lambda: train(runs, range(1, LAST + 1))) < HELD_UP_SECONDS
    runs.finished()
    assert measured(runs.close) < HELD_UP_SECONDS
    assert [step for step, _ in world.files.rows("ida")] == list(range(1, LAST + 1))


@pytest.mark.usefixtures("soon_finished")
@pytest.mark.parametrize("trouble", ["refuse", "stall"])
def test_a_server_that_breaks_down_meanwhile_stops_nothing_and_the_files_are_kept(
    world: World, server: WandbServer, trouble: Behaviour
) -> None:
    runs = world.runs(ONLINE)
    lines = train(runs, range(1, 5))
    server.behaviour = trouble
    seconds = [
        measured(lambda sae=sae, step=step: runs.logged(sae, At(step), figures(step)))
        for step in range(5, LAST + 1)
        for sae in ("a", "b")
    ]
    # The machine may pause for a while, but not at every other step.
    assert median(seconds) < 1
    assert max(seconds) < HELD_UP_SECONDS
    runs.finished()
    assert measured(runs.close) < HELD_UP_SECONDS
    assert len(lines) == 10
    assert [step for step, _ in world.files.rows("ida")] == list(range(1, LAST + 1))


@pytest.mark.usefixtures("soon_finished")
def test_an_artifact_that_the_server_does_not_take_holds_nothing_up(world: World, server: WandbServer) -> None:
    runs = world.runs(ONLINE.model_copy(update={"log_artifacts": True}))
    train(runs, range(1, 3))
    server.behaviour = "stall"
    assert measured(lambda: runs.checkpointed(At(2), {"a": (Sae(), torch.zeros(4))})) < HELD_UP_SECONDS
    assert measured(lambda: runs.checkpointed(At(3), {"a": (Sae(), torch.zeros(4))})) < HELD_UP_SECONDS
    runs.finished()
    assert measured(runs.close) < HELD_UP_SECONDS


def test_the_final_sae_is_uploaded_once(world: World, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = world.runs(ONLINE.model_copy(update={"log_artifacts": True}))
    uploaded: list[str] = []
    monkeypatch.setattr(runs, "_log_artifact", lambda name, *rest, alias: uploaded.append(f"{name} {alias}"))
    train(runs, range(1, LAST + 1))
    runs.finished()
    runs.evaluated("a", At(LAST), {"ce_loss_score": 0.75}, Sae())  # by the language model
    runs.close()
    assert uploaded == ["a final_model", "b final_model"]


def test_a_run_that_goes_on_begins_after_the_servers_last_step(world: World, server: WandbServer) -> None:
    server.last_steps = {"ida": 5, "idb": 7}
    runs = world.runs(ONLINE)
    lines = [line(sae, step, **figures(step)) for step in range(1, 7) for sae in ("a", "b")]
    train(runs, range(7, 10), lines=lines)
    runs.finished()
    runs.close()
    assert server.steps("ida") == [6, 7, 8, 9]
    assert server.steps("idb") == [8, 9]


def test_an_error_of_the_client_ends_logging_and_not_the_training(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = world.runs(OFFLINE)
    train(runs, range(1, 3))

    def broken(*arguments: object, **options: object) -> None:
        raise BrokenPipeError("the service is gone")

    monkeypatch.setattr("wandb.Run.log", broken)
    train_on = [runs.logged("a", At(step), figures(step)) for step in range(3, 6)]
    assert train_on == [None] * 3
    assert caplog.text.count("logging to Weights & Biases ends, the training goes on") == 1
    runs.close()


@pytest.mark.parametrize(
    "values", [[1.0, 1.0 + 2**-23, 1.0 - 2**-24], [0.0], [-5.0, 7.0], [1e-30, 2e-30], [3e8, 3e8 + 32]]
)
def test_values_that_are_alike_but_for_rounding_can_be_drawn(values: list[float]) -> None:
    histogram = wandb_runs._histogram(torch.tensor(values))
    assert sum(histogram.histogram) == len(values)
    assert len(histogram.bins) == len(histogram.histogram) + 1


def test_a_folder_of_a_later_attempt_has_a_later_name() -> None:
    first = "offline-run-20261231_235959-ida"
    assert name_after(first, {"runs.json"}) == first
    assert name_after(first, {first}) == "offline-run-20270101_000000-ida"
    assert name_after(first, {first, "offline-run-20270101_000000-ida"}) == "offline-run-20270101_000001-ida"


def test_an_id_is_stable_and_of_one_sae_of_one_training() -> None:
    assert run_id("uid", "salt", "a") == run_id("uid", "salt", "a")
    others = {run_id("uid", "salt", "b"), run_id("uid", "other", "a"), run_id("other", "salt", "a")}
    assert len(others | {run_id("uid", "salt", "a")}) == 4


def test_a_key_is_needed_online_and_only_there() -> None:
    with pytest.raises(InvalidInput, match="WANDB_API_KEY is not set") as error:
        check_wandb(ONLINE, {})
    assert error.value.field == "spec.wandb"
    check_wandb(ONLINE, {"WANDB_API_KEY": "key"})
    check_wandb(OFFLINE, {})
    check_wandb(None, {})


def test_a_missing_client_is_told_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_runs, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"pip install 'sae-operator\[wandb\]'"):
        check_wandb(OFFLINE, {})
