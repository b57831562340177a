"""What compact storage of activations costs SAEs: the same SAEs, trained from caches in each number format.

TopK SAEs (k 32, 8 times as many latents as dimensions, all else as it is by default) are trained on one layer in the
middle and one late of SmolLM2-135M, from caches in float32 (forward pass in float32), bfloat16, float8 and int8
(forward pass in bfloat16), with attention sinks kept and with them filtered. All are evaluated on the same held-out
rows: those of the float32 cache, so that what storage loses is counted; the cross-entropies are a float32 model's.

A markdown table on standard output; the last line of it is JSON: mean explained variance of each format without sinks.
With a folder given by --work, what an earlier run has finished is used again.

    python bench/storage_quality.py [--quick] [--work DIR] [--tokens N]
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from sae_job.activations.contexts import ContextReader
from sae_job.activations.harvest import ActivationModel
from sae_job.activations.manifest import CacheManifest, read_manifest
from sae_job.activations.reader import CachedActivations, HeldOut, held_out_contexts_for
from sae_job.evaluation.cross_entropy import Splice, cross_entropies
from sae_job.evaluation.metrics import HeldOutRows, reconstruction_metrics
from sae_job.models.load import load_full_model, load_hooked_model
from sae_job.saes.base import SAE
from sae_job.steps.cache import write_shards
from sae_job.steps.finalize import run_finalize
from sae_job.steps.local import read_results, run_resources
from sae_job.steps.prepare import run_prepare
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_job.text.plan import CacheIndex
from sae_operator.api.activation_cache import (
    ActivationCacheSpec,
    CacheStorage,
    DatasetSource,
    Dtype,
    Hook,
    ModelSource,
    Sampling,
    StorageDtype,
)
from sae_operator.api.resources import SAE_TRAINING_JOB, Resource
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.caches import cache_step, step_context
from tests.testbed.data import ensure_english_text, ensure_small_model

HOOKS = ("model.layers.15", "model.layers.26")
STORED: tuple[StorageDtype, ...] = ("float32", "bfloat16", "float8", "int8")
FORWARD: tuple[Dtype, ...] = ("float32", "bfloat16")
# Whether attention sinks are kept -> sampling.maxNormRatio.
SINKS = {"kept": 0.0, "filtered": 10.0}
CONTEXT_SIZE, BATCH_SIZE, SHARD_BYTES = 128, 16, 2**25
K = 32


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        tokens: rows of each cache.
        held_out: of these, rows that are evaluated on.
        cross_entropy: tokens of the contexts that cross-entropies are taken of.
        seeds: SAEs per cache and hook.
    """

    tokens: int
    held_out: int
    cross_entropy: int
    seeds: int


class RememberedModel:
    """A model that runs each context once, however many caches ask for it."""

    def __init__(self, load: Callable[[], ActivationModel]) -> None:
        self._load = load
        self._model: ActivationModel | None = None
        self._known: dict[bytes, dict[str, torch.Tensor]] = {}

    def activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        keys = [context.numpy().tobytes() for context in tokens]
        new = [number for number, key in enumerate(keys) if key not in self._known]
        if new:
            self._model = self._model or self._load()
            found = self._model.activations(tokens[new])
            for place, number in enumerate(new):
                self._known[keys[number]] = {hook: values[place].clone() for hook, values in found.items()}
        return {hook: torch.stack([self._known[key][hook] for key in keys]) for hook in HOOKS}


def forward_dtype(stored: StorageDtype) -> Dtype:
    return "float32" if stored == "float32" else "bfloat16"


@cache
def model_source(dtype: Dtype) -> ModelSource:
    return ModelSource(name=os.fspath(ensure_small_model()), dtype=dtype, batch_size=BATCH_SIZE)


class Trial:
    """One cache and the SAEs trained from it.

    Args:
        work: folder of all trials.
        sinks: a key of `SINKS`.
    """

    def __init__(self, work: Path, sizes: Sizes, stored: StorageDtype, sinks: str) -> None:
        self.stored: StorageDtype = stored
        self.sinks = sinks
        self._sizes = sizes
        spec = ActivationCacheSpec(
            model=model_source(forward_dtype(stored)),
            dataset=DatasetSource(path=os.fspath(ensure_english_text())),
            hooks=[Hook(name=hook) for hook in HOOKS],
            context_size=CONTEXT_SIZE,
            tokens=sizes.tokens,
            sampling=Sampling(max_norm_ratio=SINKS[sinks]),
            storage=CacheStorage(uri=f"file://{work}/caches", dtype=stored, shard_bytes=SHARD_BYTES),
        )
        self._step = cache_step(spec)
        self.store = FileStore(path_of_file_uri(self._step.location.uri))
        # A run of other sizes trains other SAEs.
        size = f"{sizes.tokens}-{sizes.held_out}-{sizes.seeds}"
        self._job = SAETrainingJobSpec.model_validate(
            {
                "activations": {"uri": self._step.location.uri},
                "saes": [
                    {"name": name, "hook": hook, "seed": seed, "architecture": {"type": "topk", "k": K}}
                    for name, hook, seed in self.saes()
                ],
                # A folder of an earlier run may hold longer caches.
                "training": {"tokens": sizes.tokens - sizes.held_out},
                # Evaluations on the way cost more than the training, and nobody looks at them.
                "evaluation": {"heldOutTokens": sizes.held_out, "everyTokens": sizes.tokens},
                "output": {"uri": f"file://{work}/saes/{stored}-{sinks}-{size}"},
            }
        )

    @property
    def name(self) -> str:
        return f"{self.stored}-{self.sinks}"

    def saes(self) -> Iterator[tuple[str, str, int]]:
        """Name, hook and seed of each SAE."""
        for hook, seed in itertools.product(HOOKS, range(self._sizes.seeds)):
            yield f"layer-{hook.rsplit('.', 1)[1]}-{seed}", hook, seed

    def cache(self, model: ActivationModel) -> CacheManifest:
        """Build the cache, unless it is there."""
        context = step_context()
        if not run_prepare(self._step.model_copy(update={"step": "prepare"}), context).adopted:
            write_shards(self._step, context, lambda index: model, device="cpu")
            run_finalize(self._step.model_copy(update={"step": "finalize"}), context)
        return read_manifest(self.store)

    def train(self) -> None:
        """Train the SAEs, unless they are there."""
        run_resources([Resource(SAE_TRAINING_JOB, self.name, "bench", self._job)])

    def sae(self, name: str) -> SAE:
        return SAE.load(f"{self._job.output.uri}/{name}")

    def own_explained_variance(self) -> dict[str, float]:
        """SAE -> explained variance of the held-out rows as its own cache holds them."""
        results = read_results(self._job.output, store_root=None)
        return {sae["name"]: sae["explained_variance"] for sae in results["saes"]}

    def held_out(self) -> HeldOut:
        """The cache's held-out rows."""
        contexts = held_out_contexts_for(self.store, read_manifest(self.store), self._sizes.held_out)
        reader = CachedActivations.open(self.store, hooks=list(HOOKS), batch_size=1, seed=0, held_out_contexts=contexts)
        rows = reader.held_out(self._sizes.held_out)
        reader.close()
        return rows


@dataclass(frozen=True)
class Figures:
    """What one SAE reaches: on the float32 cache's held-out rows, and on those of its own cache."""

    trial: Trial
    hook: str
    explained_variance: float
    own_explained_variance: float
    l0: float
    ce_loss_score: float


def evaluate(trials: list[Trial], exact: Trial, *, cross_entropy_tokens: int) -> list[Figures]:
    """Figures of all SAEs of trials that treat sinks alike.

    Args:
        exact: the one whose cache is in float32.
    """
    held_out = exact.held_out()
    rows = {hook: HeldOutRows(held_out.activations[hook], device="cpu") for hook in HOOKS}
    saes = {(trial.name, name): (hook, trial.sae(name)) for trial in trials for name, hook, _ in trial.saes()}
    index = CacheIndex.load(exact.store)
    assert index is not None
    count = min(int(held_out.sequence.max()) + 1, cross_entropy_tokens // CONTEXT_SIZE)
    contexts = ContextReader(exact.store, index).read(0, count)
    # Attention sinks that were filtered stay as the model has them.
    replaced = torch.zeros(contexts.shape, dtype=torch.bool)
    inside = held_out.sequence < count
    replaced[held_out.sequence[inside].long(), held_out.position[inside].long()] = True
    scores = cross_entropies(
        load_full_model(model_source("float32"), device="cpu"),
        contexts,
        replaced,
        {"/".join(key): Splice(hook, sae) for key, (hook, sae) in saes.items()},
        ignore_token_ids=index.tokenizer.special_token_ids,
        batch_size=BATCH_SIZE,
    )
    found: list[Figures] = []
    for trial in trials:
        own = trial.own_explained_variance()
        for name, hook, _ in trial.saes():
            metrics = reconstruction_metrics(saes[trial.name, name][1], rows[hook])
            score = scores[f"{trial.name}/{name}"].score
            assert metrics.explained_variance is not None
            assert metrics.l0 is not None
            assert score is not None
            found.append(Figures(trial, hook, metrics.explained_variance, own[name], metrics.l0, score))
    return found


def print_table(figures: list[Figures], manifests: dict[str, CacheManifest]) -> None:
    """Means over seeds, ± half the range."""
    print(
        "| hook | sinks | stored as | bytes per token and hook | explained variance | of its own rows | L0 | CE score |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for hook, sinks, stored in itertools.product(HOOKS, SINKS, STORED):
        mine = [one for one in figures if (one.hook, one.trial.sinks, one.trial.stored) == (hook, sinks, stored)]
        manifest = manifests[mine[0].trial.name]
        cells = [
            hook,
            sinks,
            stored,
            f"{manifest.bytes / manifest.tokens / len(HOOKS):.0f}",
            _mean([one.explained_variance for one in mine]),
            _mean([one.own_explained_variance for one in mine]),
            f"{statistics.mean(one.l0 for one in mine):.1f}",
            _mean([one.ce_loss_score for one in mine]),
        ]
        print(f"| {' | '.join(cells)} |")


def _mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ± {(max(values) - min(values)) / 2:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tokens, one seed")
    parser.add_argument("--work", type=Path, help="folder for caches and SAEs; a temporary one when left out")
    parser.add_argument("--tokens", type=int, help="rows of each cache")
    options = parser.parse_args()
    sizes = Sizes(6_000, 1_000, 512, 1) if options.quick else Sizes(options.tokens or 150_000, 10_000, 4_096, 3)
    with tempfile.TemporaryDirectory(prefix="sae-bench-") as scratch:
        work = (options.work or Path(scratch)).absolute()
        start = time.perf_counter()

        def say(text: str) -> None:
            print(f"storage quality: {time.perf_counter() - start:.0f} s: {text}", file=sys.stderr, flush=True)

        trials = [Trial(work, sizes, stored, sinks) for stored, sinks in itertools.product(STORED, SINKS)]
        manifests: dict[str, CacheManifest] = {}
        for dtype in FORWARD:
            model = RememberedModel(lambda dtype=dtype: load_hooked_model(model_source(dtype), HOOKS, device="cpu"))
            for trial in (trial for trial in trials if forward_dtype(trial.stored) == dtype):
                manifests[trial.name] = trial.cache(model)
                say(f"cache {trial.name} is there")
        for trial in trials:
            trial.train()
            say(f"SAEs of {trial.name} are there")
        figures: list[Figures] = []
        for sinks in SINKS:
            alike = [trial for trial in trials if trial.sinks == sinks]
            (exact,) = (trial for trial in alike if trial.stored == "float32")
            figures += evaluate(alike, exact, cross_entropy_tokens=sizes.cross_entropy)
            say(f"SAEs with sinks {sinks} are evaluated")
    print_table(figures, manifests)
    means = {
        f"explained_variance_{stored}": statistics.mean(
            one.explained_variance for one in figures if (one.trial.stored, one.trial.sinks) == (stored, "filtered")
        )
        for stored in STORED
    }
    print(json.dumps({name: round(mean, 4) for name, mean in means.items()}))


if __name__ == "__main__":
    main()
