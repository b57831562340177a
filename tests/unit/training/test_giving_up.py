"""SAEs that are given up: by `stopEarly`, or because something is not finite; the others go on, and nothing good is
lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.errors import InvalidInput
from sae_job.saes.base import SAE
from sae_job.storage.file_store import FileStore
from sae_job.training.checkpoints import Checkpoints
from sae_job.training.loop import sae_progress
from sae_job.training.stop_early import reason_to_stop
from sae_job.training.trainer import Trainer
from sae_operator.api.sae import StopEarly
from tests.faults import folder_bytes
from tests.small_cache import write_small_cache
from tests.small_training import EVERY_KIND, TWO_HOOKS

TOPK, STANDARD = EVERY_KIND["topk"], EVERY_KIND["standard"]
HOPELESS = {"stopEarly": {"afterTokens": 100, "l0Above": 0.5}}


def run(trainer: Trainer) -> Trainer:
    while not trainer.finished:
        trainer.step()
    return trainer


def break_weights(trainer: Trainer, index: int) -> None:
    parameters = trainer.saes[index]._trainable.parameters_by_name
    with torch.no_grad():
        parameters["b_dec"][0] = math.nan


@pytest.mark.parametrize(
    ("rule", "figures", "told"),
    [
        ({"explainedVarianceBelow": 0.5}, {"explained_variance": 0.4}, "explained_variance 0.4 is below 0.5"),
        ({"explainedVarianceBelow": 0.5}, {"explained_variance": 0.5}, None),
        ({"explainedVarianceBelow": 0.5}, {"explained_variance": None}, None),
        ({"l0Below": 2}, {"l0": 1.5}, "l0 1.5 is below 2"),
        ({"l0Above": 2}, {"l0": 2.5}, "l0 2.5 is above 2"),
        ({"l0Above": 2, "l0Below": 1}, {"l0": 1.5}, None),
        ({"deadFractionAbove": 0.25}, {"dead_fraction": 0.5}, "dead_fraction 0.5 is above 0.25"),
    ],
)
def test_bounds(rule: dict[str, float], figures: dict[str, float | None], told: str | None) -> None:
    stop_early = StopEarly.model_validate({"afterTokens": 100, **rule})
    assert reason_to_stop(stop_early, figures, tokens=99) is None
    reason = reason_to_stop(stop_early, figures, tokens=100)
    assert reason is None if told is None else reason is not None and told in reason
    assert reason_to_stop(None, figures, tokens=100) is None


def test_a_hopeless_one_is_frozen_and_the_others_go_on(new_trainer: Callable[..., Trainer]) -> None:
    """Evaluations are after 64, 128, ... tokens: the first that counts is the second."""
    trainer = new_trainer([{**TOPK, **HOPELESS}, STANDARD])
    while trainer.steps_done < 4:
        trainer.step()
    frozen = trainer.saes[0].tensors()
    run(trainer)
    topk, standard = trainer.saes
    assert (topk.phase, standard.phase) == ("Stopped", "Running")
    assert topk.message is not None
    assert topk.message.startswith("stopped after 128 tokens: l0")
    after = topk.tensors()
    assert all(torch.equal(tensor, after[name]) for name, tensor in frozen.items())
    alone = run(new_trainer([STANDARD]))
    ours, theirs = standard.tensors(), alone.saes[0].tensors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert trainer.tokens_of("topk") == 128
    assert trainer.tokens_of("standard") == trainer.tokens == trainer.plan.tokens
    assert trainer.record.last_evaluation("topk") == trainer.record.evaluation_after(4, "topk")
    assert [(sae.name, sae.phase) for sae in sae_progress(trainer)] == [("topk", "Stopped"), ("standard", "Running")]


def test_it_stays_frozen_over_an_interruption_and_is_saved(new_trainer: Callable[..., Trainer]) -> None:
    saes = [{**TOPK, **HOPELESS}, STANDARD]
    trainer = new_trainer(saes)
    while trainer.steps_done < 8:
        trainer.step()
    snapshot = trainer.snapshot({})
    assert set(snapshot.saes) == {"topk", "standard"}
    again = new_trainer(saes)
    again.restore(snapshot)
    run(again)
    run(trainer)
    assert again.saes[0].message == trainer.saes[0].message
    assert again.record.lines == trainer.record.lines
    assert [sae.name for sae in again.sound()] == ["topk", "standard"]


def test_a_training_whose_saes_are_all_stopped_is_finished(new_trainer: Callable[..., Trainer]) -> None:
    trainer = run(new_trainer([{**TOPK, **HOPELESS}, {**STANDARD, **HOPELESS}]))
    assert trainer.tokens == 128
    assert all(sae.phase == "Stopped" for sae in trainer.saes)


def test_one_stopped_and_one_failed_is_finished_too(new_trainer: Callable[..., Trainer]) -> None:
    trainer = new_trainer([{**TOPK, **HOPELESS}, STANDARD])
    while trainer.steps_done < 5:
        trainer.step()
    break_weights(trainer, 1)
    trainer.step()
    assert [sae.phase for sae in trainer.saes] == ["Stopped", "Failed"]
    assert trainer.finished


def test_the_last_good_weights_of_one_that_broke_outlive_all_checkpoints(
    new_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    store = FileStore(tmp_path)
    checkpoints = Checkpoints(store, keep=1)
    trainer = new_trainer([TOPK, STANDARD])
    good: dict[int, SAE] = {}
    for _ in range(3):
        trainer.step()
        checkpoints.write(trainer.snapshot({}))
        good[trainer.tokens] = trainer.saes[0].inference()
    break_weights(trainer, 0)
    # Nobody knows yet: no loss has seen these weights.
    checkpoints.write(trainer.snapshot({}) if trainer.saes[0].failure else _moved(trainer))
    assert checkpoints.last_good("topk") == 96
    for _ in range(3):
        trainer.step()
        checkpoints.write(trainer.snapshot({}))
    assert trainer.saes[0].phase == "Failed"
    assert checkpoints.last_good("topk") == 96
    assert checkpoints.last_good("standard") == trainer.tokens
    checkpoints.remove_all(keep=["topk"])
    assert {name.rsplit("/", 1)[0] for name in folder_bytes(tmp_path)} == {"checkpoints/96/topk"}
    kept = SAE.load_from_store(store, "checkpoints/96/topk")
    assert torch.equal(kept.W_dec, good[96].W_dec)
    assert checkpoints.newest(lambda state: True) is None
    assert checkpoints.last_good("standard") is None


def _moved(trainer: Trainer) -> Any:
    """A snapshot that goes to a folder of its own, as one of the next step would."""
    snapshot = trainer.snapshot({})
    return type(snapshot)(**{**vars(snapshot), "tokens": snapshot.tokens + 1})


def test_a_snapshot_after_the_step_that_broke_it_goes_on_to_the_same_end(new_trainer: Callable[..., Trainer]) -> None:
    trainer = new_trainer([TOPK, STANDARD])
    for _ in range(3):
        trainer.step()
    break_weights(trainer, 0)
    snapshot = trainer.snapshot({})
    assert set(snapshot.saes) == {"standard"}
    again = new_trainer([TOPK, STANDARD])
    again.restore(snapshot)
    run(trainer)
    run(again)
    assert trainer.saes[0].failure == again.saes[0].failure
    assert trainer.saes[0].failure is not None
    assert "from step 3 of 19" in trainer.saes[0].failure
    assert trainer.record.lines == again.record.lines


def cache_with(folder: Path, value: float, hook: str) -> FileStore:
    """A cache with two rows of a hook that hold something that is no number."""
    store = FileStore(folder)
    write_small_cache(store, hooks=tuple(TWO_HOOKS), d_in=TWO_HOOKS, broken={hook: ((2, 7, value), (2, 150, value))})
    return store


def on_broken_rows(new_trainer: Callable[..., Trainer], store: FileStore, **parts: Any) -> Trainer:
    settings: dict[str, Any] = {
        "normalization": "none",
        "training": {"tokens": 3000, "batchSize": 8},
        "evaluation": {"heldOutTokens": 8},
        **parts,
    }
    return new_trainer([EVERY_KIND["transcoder"], EVERY_KIND["jumprelu"]], store=store, **settings)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("hook", ["layer", "other"])
def test_activations_that_are_not_finite_are_told_with_their_rows(
    new_trainer: Callable[..., Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    hook: str,
) -> None:
    # So few that the sample holds none of the broken ones.
    monkeypatch.setattr("sae_job.training.sae_training.MOST_SAMPLE_ROWS", 8)
    trainer = on_broken_rows(new_trainer, cache_with(tmp_path, value, hook))
    with pytest.raises(InvalidInput) as caught:
        run(trainer)
    error = caught.value
    step = trainer.steps_done - 1
    assert step > 0
    assert (error.reason, error.field) == ("ActivationsNotFinite", "spec.activations")
    assert f"activations of {hook} hold NaN or infinity in step {step} of 375: row " in error.message
    assert "row 7 of shard 2" in error.message or "row 150 of shard 2" in error.message
    # Nobody is blamed for what the data did.
    assert [sae.phase for sae in trainer.saes] == ["Running", "Running"]


def test_so_are_inputs_of_a_transcoder_whose_latents_leave_them_out(
    new_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is no number is not above any bar, and its row's target is as it should be: the loss itself is finite."""
    monkeypatch.setattr("sae_job.training.sae_training.MOST_SAMPLE_ROWS", 8)
    trainer = new_trainer(
        [{**EVERY_KIND["transcoder"], "architecture": {"type": "batchtopk", "k": 3}, "skipConnection": False}],
        store=cache_with(tmp_path, math.nan, "layer"),
        normalization="none",
        training={"tokens": 3000, "batchSize": 8},
        evaluation={"heldOutTokens": 8},
    )
    with pytest.raises(InvalidInput, match="activations of layer hold NaN or infinity in step"):
        run(trainer)


def test_so_are_those_that_initial_weights_would_be_made_of(
    new_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput) as caught:
        on_broken_rows(new_trainer, cache_with(tmp_path, math.nan, "other"))
    assert "activations of other hold NaN or infinity in step" in caught.value.message
    assert "of shard 2" in caught.value.message


def test_and_those_that_are_held_out(new_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """Row 20 of the first shard, which is shuffled, is of some context; all of that shard are held out here."""
    store = FileStore(tmp_path)
    write_small_cache(store, hooks=tuple(TWO_HOOKS), d_in=TWO_HOOKS, broken={"layer": ((0, 20, math.nan),)})
    trainer = on_broken_rows(new_trainer, store, evaluation={"heldOutTokens": 192})
    with pytest.raises(InvalidInput) as caught:
        run(trainer)
    assert "of the held-out activations of layer 1 rows hold NaN or infinity" in caught.value.message


def test_rows_are_looked_for_only_once_a_loss_is_not_finite(
    new_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr("sae_job.training.trainer.check_rows", lambda *arguments, **named: calls.append(named["step"]))
    trainer = new_trainer([TOPK, STANDARD])
    for _ in range(4):
        trainer.step()
    assert calls == []
    break_weights(trainer, 0)
    run(trainer)
    assert calls == [4]
