"""A cache worker that is killed at any of its store calls, or stopped, or whose store fails, loses nothing and repeats
nothing that is proved to be there: in the end the cache is the same, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sae_job.errors import Stopped
from sae_job.steps.cache import write_shards
from sae_job.steps.finalize import run_finalize
from sae_job.steps.stopping import stop_on_signals
from sae_job.storage.base import NoSpaceLeft, StoreError
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_operator.api.steps import CacheStep
from tests.caches import LookupModel, cache_spec, cache_step, prepare_tokens, step_context
from tests.faults import KILLED, FaultPlan, count_calls, fail, folder_bytes, kill, run_in_child, terminate

HOOKS = {"layer.0": 8, "layer.1": 16}
STOPPED = 143


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def step(tmp_path: Path) -> CacheStep:
    """A cache of 12 shards, the last one partial, whose contexts are prepared."""
    spec = cache_spec(
        tmp_path / "store", hooks=HOOKS, tokens=3000, shard_bytes=2**14, batch_size=8, max_norm_ratio=10.0
    )
    step = cache_step(spec)
    prepare_tokens(FileStore(path_of_file_uri(step.location.uri)), spec, HOOKS)
    return step


def work(step: CacheStep, plan: FaultPlan) -> None:
    """The whole of a worker's life, and finalize's after it."""
    context = step_context(open_store=lambda location: plan.wrap(FileStore(path_of_file_uri(location.uri))))
    write_shards(step, context, lambda _: LookupModel(HOOKS), device="cpu")
    run_finalize(step, context)


def cache_folder(step: CacheStep) -> Path:
    return path_of_file_uri(step.location.uri)


@pytest.fixture
def pristine(step: CacheStep, tmp_path: Path) -> Path:
    """A copy of the store as prepare left it."""
    return Path(shutil.copytree(cache_folder(step), tmp_path / "pristine"))


@pytest.fixture
def undisturbed(step: CacheStep, pristine: Path) -> dict[str, bytes]:
    """What an undisturbed run leaves."""
    work(step, FaultPlan())
    result = folder_bytes(cache_folder(step))
    reset(step, pristine)
    return result


def reset(step: CacheStep, pristine: Path) -> None:
    shutil.rmtree(cache_folder(step))
    shutil.copytree(pristine, cache_folder(step))


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_store_call(step: CacheStep, pristine: Path, undisturbed: dict[str, bytes], when) -> None:
    calls = count_calls(lambda plan: work(step, plan))
    assert calls > 40, "a run with too few calls proves too little"
    for number in range(1, calls + 1):
        reset(step, pristine)
        assert run_in_child(lambda n=number: work(step, FaultPlan(n, kill, when))) == KILLED
        work(step, FaultPlan())
        assert folder_bytes(cache_folder(step)) == undisturbed, f"after a kill {when} call {number}"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["head", "delete", "put"])
def test_killed_while_a_damaged_part_is_written_again(
    step: CacheStep, undisturbed: dict[str, bytes], call: str, when
) -> None:
    """The sidecar of the damaged part never stands beside the new one."""
    work(step, FaultPlan())
    part = cache_folder(step) / "shards/000001.safetensors"
    whole, sidecar = part.read_bytes(), part.with_suffix(".json")
    part.write_bytes(whole[:-1])
    key = "shards/000001.safetensors" if call == "put" else "shards/000001.json"
    assert run_in_child(lambda: work(step, FaultPlan(f"{call} {key}", kill, when))) == KILLED
    assert sidecar.exists() == (call == "head" or (call, when) == ("delete", "before"))
    assert (part.read_bytes() == whole) == ((call, when) == ("put", "after"))
    work(step, FaultPlan())
    assert folder_bytes(cache_folder(step)) == undisturbed


def test_killed_twice_in_a_row(step: CacheStep, pristine: Path, undisturbed: dict[str, bytes]) -> None:
    for first, second in ((12, 9), (30, 5), (33, 20)):
        reset(step, pristine)
        for number in (first, second):
            assert run_in_child(lambda n=number: work(step, FaultPlan(n, kill, "after"))) == KILLED
        work(step, FaultPlan())
        assert folder_bytes(cache_folder(step)) == undisturbed


def test_what_is_proved_to_be_there_is_not_written_again(step: CacheStep) -> None:
    work(step, FaultPlan())
    plan = FaultPlan()
    models: list[LookupModel] = []
    context = step_context(open_store=lambda location: plan.wrap(FileStore(path_of_file_uri(location.uri))))

    def load(_: object) -> LookupModel:
        models.append(LookupModel(HOOKS))
        return models[-1]

    write_shards(step, context, load, device="cpu")
    assert not models
    assert not [name for name in plan.names if name.startswith("put")]


def test_terminated_at_every_store_call(step: CacheStep, pristine: Path, undisturbed: dict[str, bytes]) -> None:
    """SIGTERM stops the worker between batches with 143, or it was done already; finished shards stay."""

    def worker(plan: FaultPlan) -> int:
        with stop_on_signals() as should_stop:
            context = step_context(
                open_store=lambda location: plan.wrap(FileStore(path_of_file_uri(location.uri))),
                should_stop=should_stop,
            )
            try:
                write_shards(step, context, lambda _: LookupModel(HOOKS), device="cpu")
            except Stopped:
                return STOPPED
        return 0

    codes = []
    for number in range(1, count_calls(worker) + 1):
        reset(step, pristine)
        codes.append(run_in_child(lambda n=number: worker(FaultPlan(n, terminate))))
        shards = sorted(cache_folder(step).glob("shards/*.safetensors"))
        assert all(shard.with_suffix(".json").exists() for shard in shards), "a shard on its way was not finished"
        work(step, FaultPlan())
        assert folder_bytes(cache_folder(step)) == undisturbed
    assert set(codes) == {STOPPED, 0}
    assert codes[0] == STOPPED


def test_a_store_that_fails_once_at_an_upload_is_tried_again(step: CacheStep, undisturbed: dict[str, bytes]) -> None:
    work(step, FaultPlan("put shards/000002.safetensors", fail))
    assert folder_bytes(cache_folder(step)) == undisturbed


def test_a_store_that_fails_at_a_read_ends_the_attempt_and_the_next_one_goes_on(
    step: CacheStep, undisturbed: dict[str, bytes]
) -> None:
    with pytest.raises(StoreError, match="cannot be reached"):
        work(step, FaultPlan(1, fail))
    work(step, FaultPlan())
    assert folder_bytes(cache_folder(step)) == undisturbed


def test_no_space_left_is_told_at_once_and_nothing_written_is_lost(
    step: CacheStep, undisturbed: dict[str, bytes], small_disk: Path
) -> None:
    """On a real file system that is full: the message names the place, finished shards stay, and room ends the
    trouble."""
    small = cache_step(
        step.spec.model_copy(update={"storage": step.spec.storage.model_copy(update={"uri": f"file://{small_disk}"})})
    )
    shutil.copytree(cache_folder(step), cache_folder(small))
    with pytest.raises(NoSpaceLeft, match=r"file://.*shards/0.*no space left for \d+ bytes"):
        work(small, FaultPlan())
    kept = {name: data for name, data in folder_bytes(cache_folder(small)).items() if name.startswith("shards/")}
    proved = [name for name in kept if name.endswith(".json")]
    assert len(proved) >= 2, "some shards fit"
    assert all(undisturbed[name] == data for name, data in kept.items()), "what is there is whole"
    assert not (cache_folder(small) / "manifest.json").exists()
