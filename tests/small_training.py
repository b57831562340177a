"""A small training job on a small cache: what tests of the trainer, of checkpoints and of resuming start from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sae_job.activations.manifest import read_manifest
from sae_job.activations.reader import CachedActivations, held_out_contexts_for
from sae_job.evaluation.metrics import HeldOutRows
from sae_job.reporting.progress import ProgressReporter
from sae_job.saes.base import SAE
from sae_job.saes.config import Provenance
from sae_job.steps.context import StepContext
from sae_job.steps.train import run_train
from sae_job.storage.base import ObjectStore
from sae_job.storage.file_store import PARTIAL_SUFFIX, FileStore
from sae_job.training.observer import TrainingObserver
from sae_job.training.place import ALONE, Place
from sae_job.training.plan import TrainingPlan, resolve_plan
from sae_job.training.trainer import Trainer
from sae_operator.api.steps import Progress, StepResult, TrainStep
from sae_operator.api.store import StoreLocation
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.faults import FaultPlan, folder_bytes

# What the time of day may change: rates.
NOT_COMPARED = ("results.json", "report.html")

TOPK: dict[str, Any] = {"name": "topk", "architecture": {"type": "topk", "k": 3}, "dSae": 24}
STANDARD: dict[str, Any] = {
    "name": "standard",
    "architecture": {"type": "standard", "l1Coefficient": 0.1, "l1WarmUpSteps": 4},
    "dSae": 16,
    "seed": 1,
}
# One of each architecture, with what each keeps between steps: noise, thresholds, skip connections, dead latents.
EVERY_KIND: dict[str, dict[str, Any]] = {
    "topk": {"architecture": {"type": "topk", "k": 3, "noiseScale": 0.01}},
    "batchtopk": {"architecture": {"type": "batchtopk", "k": 3}},
    "matryoshka": {"architecture": {"type": "matryoshka_batchtopk", "k": 3, "widths": [6, 12]}},
    "standard": {
        "architecture": {"type": "standard", "l1Coefficient": 0.1, "l1WarmUpSteps": 4, "ghostGradients": True}
    },
    "gated": {"architecture": {"type": "gated", "l1Coefficient": 0.1, "l1WarmUpSteps": 4}},
    "jumprelu": {"architecture": {"type": "jumprelu", "l0Coefficient": 0.1, "preActivationCoefficient": 0.01}},
    "transcoder": {
        "architecture": {"type": "topk", "k": 3},
        "targetHook": "other",
        "skipConnection": True,
        "normalizeDecoder": False,
    },
    "gated-transcoder": {
        "architecture": {"type": "gated", "l1Coefficient": 0.1},
        "targetHook": "other",
    },
}
for _seed, (_name, _sae) in enumerate(EVERY_KIND.items()):
    _sae |= {"name": _name, "hook": "layer", "dSae": 20 + _seed, "seed": _seed}
# Widths of the hooks of `EVERY_KIND`.
TWO_HOOKS = {"layer": 6, "other": 5}

TRAINING: dict[str, Any] = {"tokens": 600, "batchSize": 32, "logEverySteps": 3, "learningRate": 0.01}


def small_spec(saes: list[dict[str, Any]] | None = None, **parts: Any) -> SAETrainingJobSpec:
    """A spec of 19 steps on 32 rows each; `parts` replace parts of it."""
    document = {
        "activations": {"uri": "file://cache"},
        "saes": [TOPK, STANDARD] if saes is None else saes,
        "training": TRAINING,
        "evaluation": {"heldOutTokens": 40},
        "output": {"uri": "file://out"},
        **parts,
    }
    return SAETrainingJobSpec.model_validate(document)


@dataclass
class SmallJob:
    """A trainer with its data."""

    plan: TrainingPlan
    reader: CachedActivations
    trainer: Trainer


def small_job(
    store: ObjectStore,
    spec: SAETrainingJobSpec,
    *,
    device: str = "cpu",
    starts: Mapping[str, SAE] | None = None,
    observers: Sequence[TrainingObserver] = (),
) -> SmallJob:
    """A trainer on the cache in `store`, not yet initialised."""
    manifest = read_manifest(store)
    statistics = {hook.name: hook for hook in manifest.hooks}
    widths = {name: hook.d_in for name, hook in statistics.items()}
    plan = resolve_plan(spec, cache_rows=manifest.tokens, widths=widths).scaled_by(statistics)
    reader = CachedActivations.open(
        store,
        hooks=plan.hooks,
        batch_size=plan.batch_size,
        seed=0,
        held_out_contexts=held_out_contexts_for(store, manifest, plan.held_out_rows),
    )
    held_out = reader.held_out(plan.held_out_rows).activations
    trainer = Trainer(
        plan,
        reader,
        {hook: HeldOutRows(rows, device=device) for hook, rows in held_out.items()},
        metrics=frozenset(spec.evaluation.metrics),
        provenance={hook: Provenance(hook_name=hook) for hook in plan.hooks},
        device=torch.device(device),
        starts=starts,
        observers=observers,
    )
    return SmallJob(plan, reader, trainer)


@dataclass(frozen=True)
class Job:
    """A training job on the small cache, with its output in a folder of its own."""

    cache: Path
    output: Path
    step: TrainStep

    def run(
        self,
        faults: FaultPlan | None = None,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        listener: Callable[[Progress], None] = lambda state: None,
        place: Place = ALONE,
    ) -> StepResult:
        faults = faults or FaultPlan()
        folders = {"file://cache": self.cache, "file://out": self.output}

        def open_store(location: StoreLocation) -> ObjectStore:
            path = folders.get(location.uri) or Path(location.uri.removeprefix("file://"))
            return faults.wrap(FileStore(path, location.uri))

        context = StepContext(
            reporter=ProgressReporter("train", listeners=(listener,)),
            should_stop=should_stop,
            open_store=open_store,
            now=time.monotonic,
            place=place,
        )
        return run_train(self.step, context)

    def left(self) -> dict[str, bytes]:
        """What readers find: where a kill catches another thread amid a write, nobody reads its unfinished file."""
        return {
            name: data
            for name, data in folder_bytes(self.output).items()
            if name not in NOT_COMPARED and not name.endswith(PARTIAL_SUFFIX)
        }


def train_step(**parts: Any) -> TrainStep:
    spec = small_spec(**{"checkpoints": {"everyTokens": 128, "keep": 2}, **parts})
    location = StoreLocation(uri="file://cache")
    return TrainStep(step="train", namespace="ns", name="job", uid="uid", spec=spec, activations=location)
