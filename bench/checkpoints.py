"""How much of a training its checkpoints take: at most a hundredth, with one every 600 seconds.

stall_share        of the training's time, what is spent in its own thread on a snapshot
share_at_most      the same and all work of the writing thread, as if no processor were idle for it

python bench/checkpoints.py [--quick]
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sae_job.evaluation.metrics import HeldOutRows
from sae_job.saes.config import Provenance
from sae_job.storage.file_store import FileStore
from sae_job.training.checkpoint_writer import CheckpointWriter
from sae_job.training.checkpoints import Checkpoints, Snapshot
from sae_job.training.plan import DEFAULT_CHECKPOINT_SECONDS, resolve_plan
from sae_job.training.trainer import Trainer
from sae_operator.api.training_job import SAETrainingJobSpec

WIDTH, LATENTS, BATCH = 576, 4608, 4096
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"type": "topk", "k": 32},
    "standard": {"type": "standard", "l1Coefficient": 1.0},
}


class Rows:
    """One batch, again and again: what is read costs nothing here."""

    training_rows = BATCH

    def __init__(self, width: int, batch: int) -> None:
        self._batch = {"layer": torch.randn(batch, width, generator=torch.Generator().manual_seed(0))}

    def next_batch(self) -> dict[str, torch.Tensor]:
        return self._batch

    def next_places(self) -> list[tuple[int, int]]:
        return []

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


def trainer_of(architecture: dict[str, Any], *, width: int, latents: int, batch: int) -> Trainer:
    spec = SAETrainingJobSpec.model_validate(
        {
            "activations": {"uri": "file://cache"},
            "saes": [{"name": "sae", "architecture": architecture, "dSae": latents}],
            "normalization": "none",
            "training": {"tokens": 10_000 * batch, "batchSize": batch},
            "evaluation": {"heldOutTokens": 1},
            "output": {"uri": "file://out"},
        }
    )
    plan = resolve_plan(spec, cache_rows=10**9, widths={"layer": width})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(
        plan,
        Rows(width, batch),
        {"layer": HeldOutRows(torch.zeros(1, width), device=device)},
        metrics=frozenset(),
        provenance={"layer": Provenance()},
        device=device,
    )
    trainer.initialize()
    return trainer


def wall_and_cpu(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, CPU seconds of this thread, and what the work gave."""
    start, cpu = time.perf_counter(), time.thread_time()
    value = work()
    return time.perf_counter() - start, time.thread_time() - cpu, value


class TimedCheckpoints(Checkpoints):
    """Notes how much of a processor its thread takes."""

    cpu_seconds = 0.0

    def write(self, snapshot: Snapshot) -> None:
        _, self.cpu_seconds, _ = wall_and_cpu(lambda: super(TimedCheckpoints, self).write(snapshot))


def measure(architecture: dict[str, Any], folder: Path, *, repetitions: int, **sizes: int) -> dict[str, float]:
    """Median seconds of a step, of a snapshot, of a step while a checkpoint is written, and of writing it."""
    trainer = trainer_of(architecture, **sizes)
    checkpoints = TimedCheckpoints(FileStore(folder), keep=2)
    steps, snapshots, disturbed, writes, cpu = [], [], [], [], []
    for _ in range(3):
        trainer.step()
    for _ in range(repetitions):
        steps += [wall_and_cpu(trainer.step)[0] for _ in range(3)]
        seconds, _, snapshot = wall_and_cpu(lambda: trainer.snapshot({}))
        snapshots.append(seconds)
        start = time.perf_counter()
        with CheckpointWriter(checkpoints, lambda stored: None) as writer:
            writer.submit(snapshot)
            while writer.busy:
                disturbed.append(wall_and_cpu(trainer.step)[0])
        writes.append(time.perf_counter() - start)
        cpu.append(checkpoints.cpu_seconds)
    found = {
        "step_s": statistics.median(steps),
        "snapshot_s": statistics.median(snapshots),
        "step_beside_writing_s": statistics.median(disturbed),
        "writing_s": statistics.median(writes),
        "writing_cpu_s": statistics.median(cpu),
    }
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2
    found["checkpoint_mb"] = stored / 1e6
    found["stall_share"] = found["snapshot_s"] / DEFAULT_CHECKPOINT_SECONDS
    found["share_at_most"] = (found["snapshot_s"] + found["writing_cpu_s"]) / DEFAULT_CHECKPOINT_SECONDS
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small SAEs, once")
    quick = parser.parse_args().quick
    sizes = {"width": 64, "latents": 256, "batch": 256} if quick else {}
    sizes = {"width": WIDTH, "latents": LATENTS, "batch": BATCH} | sizes
    results: dict[str, Any] = {"every_seconds": DEFAULT_CHECKPOINT_SECONDS, **sizes}
    for name, architecture in ARCHITECTURES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure(architecture, Path(folder), repetitions=2 if quick else 5, **sizes)
        results[name] = {key: float(f"{value:.3g}") for key, value in found.items()}
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
