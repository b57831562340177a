"""Every store call of prepare, cache and finalize fails in turn, while a cache gets more tokens and one more hook: what
is half done never looks complete, and the next attempt ends in the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_job.activations.manifest import read_manifest
from sae_job.activations.writer import ShardWriter
from sae_job.steps.cache import run_cache
from sae_job.steps.finalize import run_finalize
from sae_job.steps.prepare import run_prepare
from sae_job.storage.base import NoSpaceLeft, StoreError
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_operator.api.activation_cache import ActivationCacheSpec, CacheStorage, DatasetSource, Hook, ModelSource
from sae_operator.api.steps import CacheStep
from tests.caches import cache_step, step_context
from tests.faults import KILLED, FaultPlan, count_calls, fail, folder_bytes, kill, run_in_child
from tests.tiny_model import write_tiny_model, write_tiny_text


def no_space() -> None:
    raise NoSpaceLeft("no space left for 1 byte")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    # Uploads are tried again at once.
    monkeypatch.setitem(ShardWriter.__init__.__kwdefaults__ or {}, "pause", lambda seconds: None)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return write_tiny_model(folder / "model"), write_tiny_text(folder / "text", documents=20)


def step_for(sources: tuple[Path, Path], root: Path, *, hooks: list[str], tokens: int) -> CacheStep:
    model, text = sources
    spec = ActivationCacheSpec(
        model=ModelSource(name=str(model), dtype="float32", batch_size=8),
        dataset=DatasetSource(path=str(text)),
        hooks=[Hook(name=name) for name in hooks],
        context_size=32,
        tokens=tokens,
        storage=CacheStorage(uri=f"file://{root}", shard_bytes=2**14),
    )
    return cache_step(spec)


def run_steps(step: CacheStep, plan: FaultPlan) -> None:
    context = step_context(open_store=lambda location: plan.wrap(FileStore(path_of_file_uri(location.uri))))
    run_prepare(step.model_copy(update={"step": "prepare"}), context)
    run_cache(step, context)
    run_finalize(step.model_copy(update={"step": "finalize"}), context)


class Extension:
    """A finished cache of one hook, and the steps that add tokens and a hook to it."""

    def __init__(self, sources: tuple[Path, Path], root: Path) -> None:
        run_steps(step_for(sources, root, hooks=["model.layers.0"], tokens=500), FaultPlan())
        self.step = step_for(sources, root, hooks=["model.layers.0", "model.layers.1"], tokens=800)
        self.folder = path_of_file_uri(self.step.location.uri)
        self._pristine = root / "pristine"
        shutil.copytree(self.folder, self._pristine)
        self.before = folder_bytes(self.folder)
        self.calls = count_calls(lambda plan: run_steps(self.step, plan))
        self.expected = folder_bytes(self.folder)

    def reset(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self._pristine, self.folder)

    def check_nothing_half_done_looks_complete(self) -> None:
        there = folder_bytes(self.folder)
        assert there["manifest.json"] in (self.before["manifest.json"], self.expected["manifest.json"])
        manifest = read_manifest(FileStore(self.folder))
        for entry in manifest.shards:
            for part in entry.parts:
                assert len(there[part.key]) == part.bytes, "a manifest lists what is there in full"
        for key, data in there.items():
            if key.startswith("shards/") and key.endswith(".json"):
                part = key.replace(".json", ".safetensors")
                assert (data, there[part]) in (
                    (self.before.get(key), self.before.get(part)),
                    (self.expected.get(key), self.expected.get(part)),
                ), "a sidecar stands beside a whole part"


@pytest.fixture
def extension(sources: tuple[Path, Path], tmp_path: Path) -> Extension:
    return Extension(sources, tmp_path)


def test_the_extension_adds_tokens_and_a_hook(extension: Extension) -> None:
    manifest = read_manifest(FileStore(extension.folder))
    assert manifest.tokens == 800
    assert [group.hooks for group in manifest.groups] == [["model.layers.0"], ["model.layers.1"]]
    assert extension.calls > 40


@pytest.mark.parametrize("action", [fail, no_space], ids=["unreachable", "no space"])
def test_a_call_that_fails(extension: Extension, action: Callable[[], None]) -> None:
    """A store tells 503, a time-out and a body cut short by one error, when it has tried again itself. An upload is
    tried once more, but for a full disk; any other call ends the attempt."""
    failed = 0
    for number in range(1, extension.calls + 1):
        extension.reset()
        # In turn before the call took effect, and after: its answer was lost.
        plan = FaultPlan(number, action, "before" if number % 2 else "after")
        try:
            run_steps(extension.step, plan)
        except StoreError:
            failed += 1
            extension.check_nothing_half_done_looks_complete()
            run_steps(extension.step, FaultPlan())
        assert folder_bytes(extension.folder) == extension.expected, f"{plan.names[number - 1]} (call {number})"
    assert failed > extension.calls // 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_that_is_killed(extension: Extension, when) -> None:
    for number in range(1, extension.calls + 1):
        extension.reset()
        assert run_in_child(lambda n=number: run_steps(extension.step, FaultPlan(n, kill, when))) == KILLED
        extension.check_nothing_half_done_looks_complete()
        run_steps(extension.step, FaultPlan())
        assert folder_bytes(extension.folder) == extension.expected, f"after a kill {when} call {number}"
