"""What observers of a training are told, and that telling changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_job.errors import Stopped
from sae_job.evaluation.cross_entropy import CrossEntropy
from sae_job.reporting.progress import ProgressReporter
from sae_job.saes.base import SAE
from sae_job.steps.model_evaluation import figures_of
from sae_job.storage.file_store import FileStore
from sae_job.training.checkpoints import Checkpoints
from sae_job.training.loop import TrainingLoop
from sae_job.training.observer import Moment, SparsityWindow
from sae_job.training.sae_training import noise_seed
from sae_job.training.trainer import Trainer
from tests.small_training import EVERY_KIND, TRAINING

TOPK, STANDARD = EVERY_KIND["topk"], EVERY_KIND["standard"]


class Diary:
    """Notes everything."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.inferences: list[SAE] = []
        self.windows: list[SparsityWindow] = []

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.events if event[0] == kind]

    def started(self, moment: Moment, lines: Sequence[Mapping[str, Any]]) -> None:
        self.events.append(("started", moment, len(lines)))

    def logged(self, sae: str, moment: Moment, figures: Mapping[str, float | str]) -> None:
        self.events.append(("logged", sae, moment, dict(figures)))

    def evaluated(self, sae: str, moment: Moment, figures: Mapping[str, float | None], inference: SAE) -> None:
        self.events.append(("evaluated", sae, moment, dict(figures)))
        self.inferences.append(inference)

    def window(self, sae: str, moment: Moment, window: SparsityWindow) -> None:
        self.events.append(("window", sae, moment))
        self.windows.append(window)

    def phase(self, sae: str, moment: Moment, phase: str, message: str) -> None:
        self.events.append(("phase", sae, moment, phase, message))

    def checkpointed(self, moment: Moment, saes: Mapping[str, tuple[SAE, Tensor | None]]) -> None:
        self.events.append(("checkpointed", moment, sorted(saes)))

    def finished(self) -> None:
        self.events.append(("finished",))


def loop_of(trainer: Trainer, folder: Path, should_stop: Callable[[], bool] = lambda: False) -> TrainingLoop:
    return TrainingLoop(
        trainer,
        Checkpoints(FileStore(folder), keep=2),
        ProgressReporter("train"),
        should_stop=should_stop,
        now=lambda: 0.0,
    )


def test_a_training_from_its_start_to_its_end(new_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    diary = Diary()
    training = {**TRAINING, "tokens": 320, "finetuning": {"method": "scale", "tokens": 128}}
    trainer = new_trainer([TOPK, STANDARD], observers=[diary], training=training, checkpoints={"everyTokens": 128})
    loop_of(trainer, tmp_path).run()
    assert diary.of("started") == [(Moment(0, 0), 0)]
    assert diary.events[-1] == ("finished",)
    moments = [moment for sae, moment, _ in diary.of("logged") if sae == "topk"]
    assert moments == [Moment(step, 32 * step, step > 10) for step in (3, 6, 9, 12, 14)]
    assert len(diary.of("evaluated")) == 2 * 10
    assert {event[0] for event in diary.of("window")} == {"topk", "standard"}
    assert diary.of("checkpointed") == [
        (Moment(4, 128), ["standard", "topk"]),
        (Moment(8, 256), ["standard", "topk"]),
        (Moment(12, 384, True), ["standard", "topk"]),
    ]
    # What is told is what metrics.jsonl holds.
    logged = [
        {"step": moment.step, "tokens": moment.tokens, "sae": sae, **figures}
        for sae, moment, figures in diary.of("logged")
    ]
    lines = [
        {key: value for key, value in line.items() if key != "phase"} for line in trainer.record.lines if "loss" in line
    ]
    assert logged == lines
    assert torch.equal(diary.inferences[-1].W_dec, trainer.saes[1].inference().W_dec)


def test_being_watched_changes_nothing(new_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainers = [new_trainer([TOPK, STANDARD], observers=observers) for observers in ([], [Diary()])]
    for number, trainer in enumerate(trainers):
        loop_of(trainer, tmp_path / str(number)).run()
    unwatched, watched = trainers
    assert unwatched.record.lines == watched.record.lines
    for ours, theirs in zip(watched.saes, unwatched.saes, strict=True):
        expected = theirs.tensors()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.tensors().items())


def test_an_interruption_tells_the_checkpoint_and_no_end(new_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    diary, asked = Diary(), iter([False] * 5 + [True])
    trainer = new_trainer([TOPK], observers=[diary])
    with pytest.raises(Stopped):
        loop_of(trainer, tmp_path, lambda: next(asked)).run()
    assert [moment.step for moment, _ in diary.of("checkpointed")] == [5]
    assert diary.of("finished") == []
    again = Diary()
    resumed = new_trainer([TOPK], observers=[again])
    loaded = Checkpoints(FileStore(tmp_path), keep=2).newest(lambda state: True)
    assert loaded is not None
    resumed.restore(loaded)
    loop_of(resumed, tmp_path).run()
    assert again.of("started") == [(Moment(5, 160), len(trainer.record.lines))]
    assert [moment.step for _, moment, _ in again.of("logged")] == [6, 9, 12, 15, 18, 19]


def test_failures_and_stops_are_told_once(new_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    diary = Diary()
    broken = {**TOPK, "name": "broken", "training": {"learningRate": 1e9}}
    hopeless = {**TOPK, "stopEarly": {"afterTokens": 64, "l0Above": 0.5}}
    trainer = new_trainer([broken, hopeless, STANDARD], observers=[diary])
    loop_of(trainer, tmp_path).run()
    assert [(sae, phase) for sae, _, phase, _ in diary.of("phase")] == [("broken", "Failed"), ("topk", "Stopped")]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_job.training.sae_training.FREQUENCY_WINDOW_TOKENS", 128)


@pytest.mark.usefixtures("small_windows")
def test_windows_are_told_when_they_are_full_and_at_the_end(new_trainer: Callable[..., Trainer]) -> None:
    """19 steps of 32 rows: windows of 128 rows end after 4, 8, 12 and 16 steps; the last is what is left."""
    diary = Diary()
    trainer = new_trainer([STANDARD], observers=[diary])
    while not trainer.finished:
        trainer.step()
    lines = [line for line in trainer.record.lines if "window" in line]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 19]
    assert [line["window"]["rows"] for line in lines] == [128, 128, 128, 128, 224]
    assert [window.figures() for window in diary.windows] == [line["window"] for line in lines]


def test_figures_of_a_window() -> None:
    window = SparsityWindow(torch.tensor([-1.0, -5.0, -5.5, -6.5]), rows=1000)
    assert window.figures() == {
        "mean_log10_feature_sparsity": pytest.approx(-4.5),
        "below_1e-5": 2,
        "below_1e-6": 1,
        "rows": 1000,
    }


def test_the_kernel_is_told_at_first_and_when_it_changes(new_trainer: Callable[..., Trainer]) -> None:
    trainer = new_trainer([STANDARD, TOPK], training={**TRAINING, "logEverySteps": 1})
    while not trainer.finished:
        trainer.step()
    for name in ("standard", "topk"):
        told = [line["kernel"] for line in trainer.record.lines if line["sae"] == name and "kernel" in line]
        assert told
        assert all(before != after for before, after in pairwise(told))
        assert "kernel" in next(line for line in trainer.record.lines if line["sae"] == name)


def test_the_coefficient_is_the_one_that_the_step_used(new_trainer: Callable[..., Trainer]) -> None:
    trainer = new_trainer([STANDARD], training={**TRAINING, "logEverySteps": 1})
    while not trainer.finished:
        trainer.step()
    coefficients = [line["coefficient"] for line in trainer.record.lines if "loss" in line]
    assert coefficients[:6] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1])


def test_noise_depends_on_seed_step_and_rank_alone() -> None:
    assert noise_seed(1, 2, 3) == noise_seed(1, 2, 3)
    seeds = {noise_seed(seed, step, rank) for seed in range(4) for step in range(4) for rank in range(4)}
    assert len(seeds) == 64
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_language_model_is_asked_about_finite_weights_alone(new_trainer: Callable[..., Trainer]) -> None:
    """What the step before its evaluation made of them no loss has seen."""
    diary, asked = Diary(), list[set[str]]()
    every = {"everyTokens": 10**6, "modelEveryTokens": 5 * 32, "metrics": ["ce_loss_score"], "heldOutTokens": 40}
    trainer = new_trainer([TOPK, STANDARD], observers=[diary], evaluation=every)
    trainer.of_model = lambda saes, _: asked.append(set(saes)) or {name: {"ce_loss_score": 0.5} for name in saes}
    for _ in range(4):
        trainer.step()
    with torch.no_grad():
        step = trainer.saes[0].step

        def breaking(*arguments: Any) -> None:
            step(*arguments)
            trainer.saes[0]._trainable.parameters_by_name["b_dec"][0] = float("nan")

        trainer.saes[0].step = breaking  # type: ignore[method-assign]
        trainer.step()
    assert asked == [{"standard"}]
    assert [event[:1] + event[2:3] for event in diary.of("phase")] == [("topk", "Failed")]


def test_figures_of_a_model_that_overflows_are_none() -> None:
    found = figures_of(CrossEntropy(clean=2.0, ablated=float("inf"), spliced=float("nan")))
    assert found["ce_loss_clean"] == 2.0
    assert [name for name, value in found.items() if value is not None] == ["ce_loss_clean"]
