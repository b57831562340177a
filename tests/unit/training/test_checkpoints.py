"""Checkpoints: whole or not there, verified, as many as asked for, and ready for use."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.errors import InvalidInput
from sae_job.saes.base import SAE
from sae_job.storage.base import StoreError
from sae_job.storage.file_store import FileStore
from sae_job.training.checkpoint_writer import CheckpointWriter
from sae_job.training.checkpoints import Checkpoints, Snapshot
from sae_job.training.continuation import continues
from tests.faults import FaultPlan, folder_bytes
from tests.small_cache import write_small_cache
from tests.small_training import STANDARD, TOPK, small_job, small_spec


def snapshots(folder: Path, tokens: list[int]) -> list[Snapshot]:
    """Snapshots of one small training after so many tokens."""
    store = FileStore(folder)
    write_small_cache(store)
    job = small_job(store, small_spec())
    job.trainer.initialize()
    taken = []
    while not job.trainer.finished:
        job.trainer.step()
        if job.trainer.tokens in tokens:
            taken.append(job.trainer.snapshot({"seconds": 1.5}))
    job.reader.close()
    return taken


@pytest.fixture
def three(tmp_path: Path) -> list[Snapshot]:
    return snapshots(tmp_path / "cache", [64, 96, 128])


@pytest.fixture
def output(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "out")


def anything(state: dict[str, Any]) -> bool:
    return True


def test_what_is_loaded_is_what_was_written(three: list[Snapshot], output: FileStore) -> None:
    checkpoints = Checkpoints(output, keep=2)
    checkpoints.write(three[0])
    loaded = checkpoints.newest(anything)
    assert loaded is not None
    assert (loaded.tokens, loaded.state, loaded.metrics) == (64, three[0].state, three[0].metrics)
    for name, tensors in three[0].tensors.items():
        assert tensors.keys() == loaded.tensors[name].keys()
        assert all(torch.equal(tensor, loaded.tensors[name][key]) for key, tensor in tensors.items())
    assert {"optimizer.W_dec.exp_avg", "optimizer.W_dec.exp_avg_sq", "optimizer.W_dec.step"} <= loaded.tensors[
        "topk"
    ].keys()
    assert torch.equal(loaded.random["cpu"], three[0].random["cpu"])


def test_the_last_ones_are_kept(three: list[Snapshot], output: FileStore) -> None:
    checkpoints = Checkpoints(output, keep=2)
    for snapshot in three:
        checkpoints.write(snapshot)
    assert {name.split("/")[1] for name in folder_bytes(output.root)} == {"96", "128"}
    Checkpoints(output, keep=1).write(three[2])
    assert {name.split("/")[1] for name in folder_bytes(output.root)} == {"128"}


def test_what_an_interrupted_write_left_is_cleared_away(three: list[Snapshot], output: FileStore) -> None:
    output.put("checkpoints/32/state/topk.safetensors", b"half")
    checkpoints = Checkpoints(output, keep=2)
    assert checkpoints.newest(anything) is None
    checkpoints.write(three[0])
    assert {name.split("/")[1] for name in folder_bytes(output.root)} == {"64"}


@pytest.mark.parametrize("name", ["state.json", "state/topk.safetensors", "metrics.jsonl", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    three: list[Snapshot], output: FileStore, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(output, keep=2)
    for snapshot in three[1:]:
        checkpoints.write(snapshot)
    key = f"checkpoints/128/{name}"
    data = output.get(key)
    if damage == "delete":
        output.delete(key)
    else:
        output.put(key, data[: len(data) // 2] if damage == "truncate" else b"\xff" + data[1:])
    with caplog.at_level(logging.WARNING):
        loaded = checkpoints.newest(anything)
    assert loaded is not None
    assert loaded.tokens == 96
    # Without its marker there is no checkpoint to warn about.
    if (name, damage) != ("checkpoint.json", "delete"):
        assert "checkpoints/128" in caplog.text
    # What is written next must not be taken for older than the damaged one.
    assert output.head("checkpoints/128/checkpoint.json") is None


def test_every_file_is_covered_by_a_checksum(three: list[Snapshot], output: FileStore) -> None:
    Checkpoints(output, keep=2).write(three[0])
    marker = json.loads(output.get("checkpoints/64/checkpoint.json"))
    files = {name.removeprefix("checkpoints/64/") for name in folder_bytes(output.root)}
    assert set(marker["sha256"]) == files - {"checkpoint.json"}


def test_a_checkpoint_holds_saes_ready_for_use(three: list[Snapshot], output: FileStore) -> None:
    Checkpoints(output, keep=2).write(three[0])
    sae = SAE.load(str(output.root / "checkpoints/64/topk"))
    expected, log_sparsity = three[0].saes["topk"]
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae(x), expected(x))
    assert log_sparsity is not None
    assert log_sparsity.shape == (24,)


def test_removing_all_leaves_nothing(three: list[Snapshot], output: FileStore) -> None:
    checkpoints = Checkpoints(output, keep=2)
    for snapshot in three:
        checkpoints.write(snapshot)
    output.put("results.json", b"{}")
    checkpoints.remove_all()
    assert list(folder_bytes(output.root)) == ["results.json"]


def test_a_training_goes_on_only_with_the_same_saes_and_batches(three: list[Snapshot], tmp_path: Path) -> None:
    store = FileStore(tmp_path / "cache")

    def goes_on(**parts: Any) -> bool:
        job = small_job(store, small_spec(**parts))
        job.reader.close()
        return continues(job.plan, three[0].state)

    training = {"tokens": 600, "batchSize": 32}
    assert goes_on(training=training)
    assert goes_on(training={**training, "tokens": 1200})
    assert not goes_on(training={**training, "tokens": 32})
    assert not goes_on(training={**training, "batchSize": 16})
    assert not goes_on(training={**training, "optimizer": "adamw"})
    assert not goes_on(evaluation={"heldOutTokens": 41})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"architecture": {"type": "batchtopk", "k": 3}}, "spec.saes[0].architecture.type"),
        ({"dSae": 25}, "spec.saes[0].dSae"),
        ({"name": "renamed"}, "spec.saes"),
    ],
)
def test_checkpoints_of_other_saes_are_refused_before_their_weights_are_read(
    three: list[Snapshot], tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    faults = FaultPlan()
    checkpoints = Checkpoints(faults.wrap(FileStore(tmp_path / "out")), keep=2)
    checkpoints.write(three[0])
    before = folder_bytes(tmp_path / "out")
    job = small_job(FileStore(tmp_path / "cache"), small_spec([{**TOPK, **changes}, STANDARD]))
    job.reader.close()
    written = len(faults.names)
    with pytest.raises(InvalidInput) as caught:
        checkpoints.newest(lambda state: continues(job.plan, state))
    assert (caught.value.reason, caught.value.field) == ("CheckpointDiffers", field)
    assert not [name for name in faults.names[written:] if name.endswith(".safetensors")]
    assert folder_bytes(tmp_path / "out") == before


def test_a_checkpoint_that_does_not_fit_is_not_read_either(three: list[Snapshot], tmp_path: Path) -> None:
    faults = FaultPlan()
    checkpoints = Checkpoints(faults.wrap(FileStore(tmp_path / "out")), keep=2)
    checkpoints.write(three[0])
    written = len(faults.names)
    assert checkpoints.newest(lambda state: False) is None
    assert not [name for name in faults.names[written:] if name.endswith(".safetensors")]


class FullDisk(FileStore):
    def put(self, *arguments: Any, **options: Any) -> Any:
        raise StoreError("no space left")


def test_an_error_of_the_writing_thread_ends_the_training(three: list[Snapshot], tmp_path: Path) -> None:
    stored: list[Snapshot] = []
    writer = CheckpointWriter(Checkpoints(FullDisk(tmp_path), keep=2), stored.append)
    writer.submit(three[0])
    with pytest.raises(StoreError, match="no space left"):
        writer.wait()
    assert stored == []


def test_a_writer_tells_what_is_stored(three: list[Snapshot], output: FileStore) -> None:
    stored: list[Snapshot] = []
    with CheckpointWriter(Checkpoints(output, keep=2), stored.append) as writer:
        for snapshot in three:
            writer.submit(snapshot)
    assert stored == three
    assert not writer.busy
