"""Every architecture through every phase: alone or together, at one go or resumed, the same to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_job.storage.file_store import FileStore
from sae_job.training.checkpoints import Checkpoints, Snapshot
from sae_job.training.trainer import Trainer
from tests.small_training import EVERY_KIND, TRAINING, SmallJob, small_job, small_spec

FINETUNED: dict[str, Any] = {**TRAINING, "tokens": 320, "finetuning": {"method": "decoder", "tokens": 160}}
# One step before the switch, at the switch, and one step after it.
PLACES = (3, 9, 10, 11, 14)


def begun(two_hooks: FileStore, jobs: list[SmallJob], saes: list[dict[str, Any]], **parts: Any) -> Trainer:
    job = small_job(two_hooks, small_spec(saes, **parts))
    jobs.append(job)
    return job.trainer


def trained(two_hooks: FileStore, jobs: list[SmallJob], saes: list[dict[str, Any]], **parts: Any) -> Trainer:
    trainer = begun(two_hooks, jobs, saes, **parts)
    trainer.initialize()
    while not trainer.finished:
        trainer.step()
    return trainer


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def resumed_everywhere(
    two_hooks: FileStore, jobs: list[SmallJob], store: FileStore, saes: list[dict[str, Any]], **parts: Any
) -> None:
    """Go on from checkpoints of several steps: each time the end is that of the undisturbed training."""
    trainer = begun(two_hooks, jobs, saes, **parts)
    trainer.initialize()
    taken: list[Snapshot] = []
    while not trainer.finished:
        trainer.step()
        if trainer.steps_done in PLACES:
            taken.append(trainer.snapshot({}))
    assert len(taken) == len(PLACES)
    for snapshot in taken:
        checkpoints = Checkpoints(store, keep=1)
        checkpoints.write(snapshot)
        loaded = checkpoints.newest(lambda state: True)
        assert loaded is not None
        again = begun(two_hooks, jobs, saes, **parts)
        again.restore(loaded)
        while not again.finished:
            again.step()
        assert again.record.lines == trainer.record.lines, snapshot.tokens
        for ours, theirs in zip(again.saes, trainer.saes, strict=True):
            assert same(ours.tensors(), theirs.tensors()), (ours.name, snapshot.tokens)
            assert same(dict(ours.inference().state_dict()), dict(theirs.inference().state_dict()))
        checkpoints.remove_all()


def test_all_kinds_together_are_bit_for_bit_each_alone(two_hooks: FileStore, jobs: list[SmallJob]) -> None:
    together = trained(two_hooks, jobs, list(EVERY_KIND.values()), training=FINETUNED)
    for sae, training in zip(EVERY_KIND.values(), together.saes, strict=True):
        alone = trained(two_hooks, jobs, [sae], training=FINETUNED)
        assert training.failure is None
        assert same(training.tensors(), alone.saes[0].tensors()), sae["name"]
        lines = [line for line in together.record.lines if line["sae"] == sae["name"]]
        assert lines == alone.record.lines


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adafactor"])
def test_resumed_in_either_phase_the_end_is_the_same(
    two_hooks: FileStore, jobs: list[SmallJob], tmp_path: Any, optimizer: str
) -> None:
    training = {**FINETUNED, "optimizer": optimizer, "gradientClipNorm": 1.0}
    resumed_everywhere(two_hooks, jobs, FileStore(tmp_path), list(EVERY_KIND.values()), training=training)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bfloat16"},
        {"precision": "tf32"},
        {"selection": "bfloat16"},
        {"mseLossNormalization": "dense_batch"},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_resumed_with_other_products_the_end_is_the_same(
    two_hooks: FileStore, jobs: list[SmallJob], tmp_path: Any, settings: dict[str, Any]
) -> None:
    training = {**FINETUNED, **settings}
    resumed_everywhere(two_hooks, jobs, FileStore(tmp_path), list(EVERY_KIND.values()), training=training)


def test_adamw_without_decay_is_adam(two_hooks: FileStore, jobs: list[SmallJob]) -> None:
    saes = [EVERY_KIND["standard"]]
    adam, adamw = (
        trained(two_hooks, jobs, saes, training={**TRAINING, "optimizer": name}).saes[0].tensors()
        for name in ("adam", "adamw")
    )
    assert same(adam, adamw)


def test_adafactor_keeps_a_row_and_a_column_of_second_moments(two_hooks: FileStore, jobs: list[SmallJob]) -> None:
    trainer = trained(two_hooks, jobs, [EVERY_KIND["topk"]], training={**TRAINING, "optimizer": "adafactor"})
    tensors = trainer.saes[0].tensors()
    parts = {name.removeprefix("optimizer.W_dec."): tensor for name, tensor in tensors.items() if "r.W_dec." in name}
    assert set(parts) == {"step", "row_var", "col_var"}
    assert parts["row_var"].numel() + parts["col_var"].numel() == 20 + 6
    first = trainer.record.evaluation_after(trainer.plan.tenth_step, "topk")["mse"]
    last = trainer.record.last_evaluation("topk")["mse"]
    assert first is not None
    assert last is not None
    assert last < first


def test_products_in_bfloat16_train_almost_alike(two_hooks: FileStore, jobs: list[SmallJob]) -> None:
    saes = list(EVERY_KIND.values())
    exact, rounded = (
        trained(two_hooks, jobs, saes, training={**TRAINING, "precision": name}) for name in ("float32", "bfloat16")
    )
    for ours, theirs in zip(rounded.saes, exact.saes, strict=True):
        assert ours.failure is None
        tensors = ours.tensors()
        assert all(tensor.dtype == torch.float32 for name, tensor in tensors.items() if name.startswith("weights."))
        assert not same(tensors, theirs.tensors()), ours.name
        explained = [trainer.record.last_evaluation(ours.name)["explained_variance"] for trainer in (rounded, exact)]
        assert explained[0] == pytest.approx(explained[1], abs=0.1), ours.name
