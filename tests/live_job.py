"""A training job whose (tiny) model runs beside it, and the same job on a cache: run step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_job.reporting.progress import ProgressReporter
from sae_job.steps.cache import run_cache
from sae_job.steps.context import StepContext
from sae_job.steps.finalize import run_finalize
from sae_job.steps.preflight import run_preflight
from sae_job.steps.prepare import run_prepare
from sae_job.steps.train import run_train
from sae_job.storage.base import ObjectStore
from sae_job.storage.file_store import PARTIAL_SUFFIX, FileStore, path_of_file_uri
from sae_job.training.place import ALONE, Place
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import cache_location, cache_of, live_location
from sae_operator.api.steps import CacheStep, CacheStepName, Progress, StepResult, TrainStep
from sae_operator.api.store import StoreLocation
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.faults import FaultPlan, folder_bytes
from tests.small_training import NOT_COMPARED, STANDARD, TOPK
from tests.tiny_model import write_tiny_model, write_tiny_text

Step = Callable[[CacheStep | TrainStep, StepContext], StepResult]

# The least that a live source may have; of 140 bytes a row, its shards hold 748 rows.
BUFFER_BYTES = 2**20
TOKENS = 9000
HOOK = "model.layers.1"


def write_inputs(folder: Path) -> None:
    """The tiny model and text."""
    write_tiny_model(folder / "model")
    write_tiny_text(folder / "text", documents=60)


def source(inputs: Path, **changes: Any) -> dict[str, Any]:
    """What a live source and a cache have in common."""
    return {
        "model": {"name": str(inputs / "model"), "dtype": "float32"},
        "dataset": {"path": str(inputs / "text")},
        "hooks": [{"name": HOOK}],
        "contextSize": 16,
        "tokens": TOKENS,
        **changes,
    }


@dataclass(frozen=True)
class LiveJob:
    """Steps of one job, with its output in a folder."""

    output: Path
    spec: SAETrainingJobSpec

    @classmethod
    def make(cls, inputs: Path, output: Path, *, hooks: Sequence[str] = (HOOK,), **parts: Any) -> LiveJob:
        """A live job; `parts` replace parts of its spec."""
        changes = {"hooks": [{"name": hook} for hook in hooks], "dtype": "float32", "bufferBytes": BUFFER_BYTES}
        return cls._of({"live": source(inputs, **changes)}, output, parts)

    @classmethod
    def make_cached(cls, inputs: Path, output: Path, caches: Path, **parts: Any) -> LiveJob:
        """The same on a cache with shards of the same size."""
        storage = {"uri": f"file://{caches}", "dtype": "float32", "shardBytes": BUFFER_BYTES // 10}
        return cls._of({"cache": {**source(inputs), "storage": storage}}, output, parts)

    @classmethod
    def _of(cls, activations: dict[str, Any], output: Path, parts: dict[str, Any]) -> LiveJob:
        document = {
            "activations": activations,
            "saes": [TOPK, STANDARD],
            "training": {"tokens": 1600, "batchSize": 64, "logEverySteps": 5, "learningRate": 0.01},
            "evaluation": {"heldOutTokens": 100},
            "checkpoints": {"everyTokens": 320, "keep": 2},
            "output": {"uri": f"file://{output}"},
            **parts,
        }
        return cls(output, SAETrainingJobSpec.model_validate(document))

    @property
    def cache(self) -> ActivationCacheSpec:
        cache = cache_of(self.spec)
        assert cache is not None
        return cache

    @property
    def location(self) -> StoreLocation:
        return live_location(self.spec) if self.spec.activations.live else cache_location(self.cache, "ns")

    def train_step(self) -> TrainStep:
        return TrainStep(
            step="train",
            namespace="ns",
            name="job",
            uid="uid",
            spec=self.spec,
            activations=self.location,
            cache=self.cache,
        )

    def build_cache(self) -> None:
        steps: dict[CacheStepName, Step] = {"prepare": run_prepare, "cache": run_cache, "finalize": run_finalize}
        for name, run in steps.items():
            step = CacheStep(
                step=name, namespace="ns", name="cache", uid="uid", spec=self.cache, location=self.location
            )
            run(step, context())

    def preflight(self, faults: FaultPlan | None = None, **options: Any) -> StepResult:
        return run_preflight(self.train_step(), context(faults, **options))

    def train(self, faults: FaultPlan | None = None, **options: Any) -> StepResult:
        return run_train(self.train_step(), context(faults, **options))

    def left(self) -> dict[str, bytes]:
        """What readers find of the training; the contexts are the preflight's. Where a kill catches another thread amid
        a write, nobody reads its unfinished file."""
        return {
            name: data
            for name, data in folder_bytes(self.output).items()
            if name not in NOT_COMPARED and not name.startswith("activations/") and not name.endswith(PARTIAL_SUFFIX)
        }


def context(
    faults: FaultPlan | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    listener: Callable[[Progress], None] = lambda state: None,
    place: Place = ALONE,
) -> StepContext:
    plan = faults or FaultPlan()

    def open_store(location: StoreLocation) -> ObjectStore:
        return plan.wrap(FileStore(path_of_file_uri(location.uri)))

    return StepContext(
        reporter=ProgressReporter("test", listeners=(listener,)),
        should_stop=should_stop,
        open_store=open_store,
        now=time.monotonic,
        place=place,
    )
