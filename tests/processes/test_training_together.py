"""The step `train` in several processes: the same curve, weights and files as in one, stopped and resumed together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae_job.storage.file_store import FileStore
from sae_job.training.place import ALONE, Place
from tests.rank_processes import in_processes
from tests.small_cache import write_small_cache
from tests.small_training import EVERY_KIND, STANDARD, TOPK, TWO_HOOKS, Job, train_step

# Processes draw noise of their own for their own rows: without it.
KINDS = {
    name: sae | {"architecture": {key: value for key, value in sae["architecture"].items() if key != "noiseScale"}}
    for name, sae in EVERY_KIND.items()
}
TWO_SAES = [{**TOPK, "hook": "layer"}, {**STANDARD, "hook": "layer"}]
TOLERANCE = 1e-5
# Of weights, after the rounding of some steps.
WEIGHT_TOLERANCE = 1e-4


def trained(place: Place, job: Job) -> Any:
    result = job.run(place=place)
    return result.exit_code, result.tokens


def stopped(place: Place, job: Job) -> Any:
    """Train until the last of the processes is asked to stop, halfway."""
    seen: list[int] = []

    def asked() -> bool:
        return place.index == place.size - 1 and bool(seen) and seen[-1] >= 320

    return job.run(place=place, should_stop=asked, listener=lambda state: seen.append(state.tokens))


def metrics(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """The line's figures, those of its parts by path."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            found |= {f"{name}.{part}": number for part, number in numbers(value).items()}
        elif isinstance(value, int | float):
            found[name] = value
    return found


def weights(job: Job, sae: str) -> dict[str, torch.Tensor]:
    return load_file(job.output / sae / "sae_weights.safetensors")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_small_cache(FileStore(folder), hooks=tuple(TWO_HOOKS), d_in=TWO_HOOKS)
    return folder


def folder_of(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def jobs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Job]:
    """The same job, trained in one process, in two and in four: SAEs of all kinds on the same batches."""
    step = train_step(saes=list(KINDS.values()))
    jobs = {size: Job(cache, tmp_path_factory.mktemp(f"out{size}"), step) for size in (1, 2, 4)}
    for size, job in jobs.items():
        together = size > 1
        meeting = tmp_path_factory.mktemp(f"meeting{size}")
        first = in_processes(size, trained, meeting, job)[0] if together else trained(ALONE, job)
        assert first == (0, 608)
    return jobs


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_is_that_of_one_process(jobs: dict[int, Job], size: int, kind: str) -> None:
    alone, together = ([line for line in metrics(jobs[n]) if line["sae"] == kind] for n in (1, size))
    assert len(alone) == len(together) > 0
    for expected, found in zip(alone, together, strict=True):
        assert numbers(found) == pytest.approx(numbers(expected), rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_so_are_the_weights(jobs: dict[int, Job], kind: str) -> None:
    alone, together = weights(jobs[1], kind), weights(jobs[4], kind)
    assert alone.keys() == together.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=WEIGHT_TOLERANCE, atol=WEIGHT_TOLERANCE)


def test_the_first_process_alone_leaves_files(jobs: dict[int, Job]) -> None:
    assert jobs[1].left().keys() == jobs[4].left().keys()
    results = json.loads((jobs[4].output / "results.json").read_text())
    assert results["provenance"]["processes"] == 4


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(cache, tmp_path_factory.mktemp("undisturbed"), train_step(saes=TWO_SAES))
    assert in_processes(2, trained, tmp_path_factory.mktemp("first"), job) == [(0, 608), (0, None)]
    return job


def test_stopped_and_resumed_the_bits_are_those_of_the_undisturbed_training(
    cache: Path, tmp_path: Path, undisturbed: Job
) -> None:
    job = Job(cache, folder_of(tmp_path, "out"), train_step(saes=TWO_SAES))
    first, second = in_processes(2, stopped, folder_of(tmp_path, "second"), job)
    assert first[0] == second[0] == "Stopped"
    assert "a checkpoint is stored" in first[1]
    assert list((job.output / "checkpoints").glob("*/checkpoint.json"))
    assert in_processes(2, trained, folder_of(tmp_path, "third"), job) == [(0, 608), (0, None)]
    assert job.left() == undisturbed.left()


@pytest.mark.parametrize("sizes", [(2, 1), (1, 4)])
def test_another_number_of_processes_goes_on_from_the_checkpoint(
    cache: Path, tmp_path: Path, undisturbed: Job, sizes: tuple[int, int]
) -> None:
    job = Job(cache, folder_of(tmp_path, "out"), train_step(saes=TWO_SAES))
    in_processes(sizes[0], stopped, folder_of(tmp_path, "second"), job)
    assert list((job.output / "checkpoints").glob("*/checkpoint.json"))
    assert in_processes(sizes[1], trained, folder_of(tmp_path, "third"), job)[0] == (0, 608)
    for sae in ("topk", "standard"):
        expected, found = weights(undisturbed, sae), weights(job, sae)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=WEIGHT_TOLERANCE, atol=WEIGHT_TOLERANCE)
    for expected, found in zip(metrics(undisturbed), metrics(job), strict=True):
        assert numbers(found) == pytest.approx(numbers(expected), rel=TOLERANCE, abs=TOLERANCE)


def test_batches_that_cannot_be_shared_are_refused_by_all(cache: Path, tmp_path: Path) -> None:
    job = Job(cache, folder_of(tmp_path, "out"), train_step(saes=TWO_SAES))
    told = in_processes(3, trained, folder_of(tmp_path, "meeting"), job)
    assert {kind for kind, _ in told} == {"InvalidInput"}
    assert all("3 processes cannot share batches of 32 rows" in text for _, text in told)


def test_a_finished_training_is_found_by_all(cache: Path, tmp_path: Path, undisturbed: Job) -> None:
    told = in_processes(2, trained, folder_of(tmp_path, "again"), undisturbed)
    assert told == [(0, 608), (0, None)]


def test_a_shard_that_one_process_cannot_read_ends_all_with_its_message(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "cache")
    write_small_cache(store)
    job = Job(tmp_path / "cache", folder_of(tmp_path, "out"), train_step())
    shard = next(info.key for info in store.list("shards/") if "0002" in info.key and info.key.endswith("tensors"))
    data = bytearray(store.get(shard))
    data[-8:] = b"\xff" * 8
    store.put(shard, bytes(data))
    told = in_processes(2, trained, folder_of(tmp_path, "meeting"), job)
    assert [kind for kind, _ in told] == ["InvalidInput", "InvalidInput"]
    assert told[0] == told[1]
