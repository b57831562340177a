"""Caching and training on a GPU, beside what bounds them. Needs a CUDA device; ends with 2 without one.

    caching_vs_bare_forward  tokens per second of a cache worker over those of the forward loop alone, to the same layer
    n8_file_vs_memory        steps per second of training 8 SAEs from a cache in files over those from batches in memory

The model is a Llama of random weights (2048 wide, 16 layers), run to layer 11 in bfloat16, so nothing is fetched.

    python bench/gpu_caching.py [--quick] [--directory DIR]
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.stored_model import build_cache
from sae_job.activations.contexts import ContextReader
from sae_job.activations.harvest import ActivationModel
from sae_job.activations.manifest import read_manifest
from sae_job.activations.reader import CachedActivations
from sae_job.evaluation.metrics import HeldOutRows
from sae_job.models.load import load_hooked_model
from sae_job.saes.config import Provenance
from sae_job.steps.cache import write_shards
from sae_job.storage.file_store import FileStore
from sae_job.training.plan import resolve_plan
from sae_job.training.trainer import ActivationStream, Trainer
from sae_operator.api.activation_cache import ModelSource
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.caches import VOCABULARY, cache_spec, cache_step, prepare_tokens, step_context


@dataclass(frozen=True)
class Sizes:
    """What is measured on.

    Attributes:
        width, layers: of the model.
        hook_layer: the layer whose output is cached.
        context_size: tokens per context.
        contexts: contexts per forward pass.
        tokens: rows that are cached.
        shard_bytes: of a shard, when caching and when training.
        latents, k, batch: of each SAE, and rows per step.
        rows: of the cache that is trained from.
        steps: of a turn of training.
        turns: of each side, after one that warms up.
    """

    width: int = 2048
    layers: int = 16
    hook_layer: int = 11
    context_size: int = 512
    contexts: int = 32
    tokens: int = 2_000_000
    shard_bytes: int = 2**28
    latents: int = 16_384
    k: int = 32
    batch: int = 4096
    rows: int = 500_000
    steps: int = 100
    turns: int = 3

    @property
    def hook(self) -> str:
        return f"model.layers.{self.hook_layer}"


SAES = 8
# A stored context is read from its block; the forward loop is given them from memory.
CONTEXTS_PER_BLOCK = 512


def write_model(directory: Path, sizes: Sizes) -> None:
    """Save a Llama of random weights in bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=sizes.context_size,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


class CountedModel:
    """Counts the tokens that a model is given: a worker stops where a shard is full."""

    def __init__(self, model: ActivationModel) -> None:
        self._model = model
        self.tokens = 0

    def activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        self.tokens += tokens.numel()
        return self._model.activations(tokens)

    def run(self, batches: Iterable[torch.Tensor]) -> None:
        """The forward loop alone."""
        for batch in batches:
            self.activations(batch)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time until the GPU has done the work."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def caching_vs_bare_forward(directory: Path, sizes: Sizes) -> float:
    """Median over turns of the cache worker's rate over the forward loop's, in tokens that the model is given."""
    write_model(directory / "model", sizes)
    source = ModelSource(name=os.fspath(directory / "model"), batch_size=sizes.contexts)
    model = CountedModel(load_hooked_model(source, [sizes.hook]))
    hooks = {sizes.hook: sizes.width}
    spec = cache_spec(
        directory,
        hooks=hooks,
        tokens=sizes.tokens,
        context_size=sizes.context_size,
        shard_bytes=sizes.shard_bytes,
        batch_size=sizes.contexts,
        max_norm_ratio=10.0,
    )
    step = cache_step(spec)

    def rate(work: Callable[[], object]) -> float:
        before = model.tokens
        seconds = seconds_of(work)
        return (model.tokens - before) / seconds

    bare: list[float] = []
    caching: list[float] = []
    for turn in range(sizes.turns + 1):
        store = FileStore(directory / f"cache-{turn}")
        index = prepare_tokens(store, spec, hooks, contexts_per_block=CONTEXTS_PER_BLOCK)
        contexts = ContextReader(store, index).read(0, index.shards[-1].stop).split(sizes.contexts)
        context = step_context(open_store=lambda location, store=store: store)
        bare.append(rate(lambda contexts=contexts: model.run(contexts)))
        caching.append(rate(lambda context=context: write_shards(step, context, lambda _: model, device="GPU")))
        shutil.rmtree(store.root)
    for side, rates in {"bare forward loop": bare, "cache worker": caching}.items():
        print(f"{side}, tokens per second (the first warms up): {', '.join(f'{value:,.0f}' for value in rates)}")
    return statistics.median(ours / loop for ours, loop in zip(caching[1:], bare[1:], strict=True))


class MemoryStream:
    """A few batches in memory (pinned where there is a GPU), again and again."""

    def __init__(self, hook: str, batches: list[torch.Tensor]) -> None:
        self._hook = hook
        self._batches = [batch.pin_memory() if torch.cuda.is_available() else batch for batch in batches]
        self._next = 0

    @property
    def training_rows(self) -> int:
        return sum(len(batch) for batch in self._batches)

    def next_batch(self) -> dict[str, torch.Tensor]:
        self._next += 1
        return {self._hook: self._batches[self._next % len(self._batches)]}

    def next_places(self) -> list[tuple[int, int]]:
        return []

    def state(self) -> dict[str, Any]:
        return {"next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


def n8_file_vs_memory(directory: Path, sizes: Sizes) -> float:
    """Median over turns of the time from memory over the time from files, of the same number of steps."""
    hook, folder = sizes.hook, directory / "training"
    store = FileStore(folder)
    hooks = {hook: sizes.width}
    build_cache(store, directory, rows=sizes.rows, shard_bytes=sizes.shard_bytes, hooks=hooks)
    saes = [
        {"name": f"sae-{seed}", "architecture": {"type": "topk", "k": sizes.k}, "dSae": sizes.latents, "seed": seed}
        for seed in range(SAES)
    ]
    # So long a training that no turn comes to an evaluation or a line of metrics.
    tokens = sizes.batch * 10**6
    spec = SAETrainingJobSpec.model_validate(
        {
            "activations": {"uri": f"file://{folder}"},
            "saes": saes,
            "training": {"batchSize": sizes.batch, "tokens": tokens, "logEverySteps": 10**6},
            "evaluation": {"heldOutTokens": 0},
            "output": {"uri": f"file://{directory}/unused"},
        }
    )
    manifest = read_manifest(store)
    plan = resolve_plan(spec, cache_rows=manifest.tokens, widths={hook: manifest.hook(hook).d_in})
    plan = plan.scaled_by({hook: manifest.hook(hook)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = CachedActivations.open(store, hooks=[hook], batch_size=sizes.batch, seed=0, held_out_contexts=0)
    memory = MemoryStream(hook, [reader.next_batch()[hook].clone() for _ in range(8)])

    def trainer(stream: ActivationStream) -> Trainer:
        made = Trainer(
            plan,
            stream,
            {hook: HeldOutRows(torch.empty(0, sizes.width), device=device)},
            metrics=frozenset(),
            provenance={hook: Provenance()},
            device=device,
        )
        made.initialize()
        return made

    trainers = {"files": trainer(reader), "memory": trainer(memory)}
    found: dict[str, list[float]] = {side: [] for side in trainers}
    for _ in range(sizes.turns + 1):
        for side, one in trainers.items():
            found[side].append(seconds_of(lambda one=one: [one.step() for _ in range(sizes.steps)]))
    reader.close()
    for side, seconds in found.items():
        rates = ", ".join(f"{sizes.steps * sizes.batch / value:,.0f}" for value in seconds)
        print(f"{SAES} SAEs from {side}, tokens per second (the first warms up): {rates}")
    turns = zip(found["memory"][1:], found["files"][1:], strict=True)
    return statistics.median(one / other for one, other in turns)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens, steps and turns")
    parser.add_argument("--directory", type=Path, help="folder for what is written, on a fast disk")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and there is none", file=sys.stderr)
        return 2
    sizes = Sizes(tokens=500_000, rows=250_000, steps=40, turns=2) if options.quick else Sizes()
    print(f"{torch.cuda.get_device_name()}; {sizes}")
    with tempfile.TemporaryDirectory(prefix="sae-bench-", dir=options.directory) as name:
        figures = {
            "caching_vs_bare_forward": caching_vs_bare_forward(Path(name), sizes),
            "n8_file_vs_memory": n8_file_vs_memory(Path(name), sizes),
        }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
