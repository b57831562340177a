"""Caching a real model beside SAELens: the same contexts, hook and number format, in turns, CPU seconds.

Both are given token ids, run SmolLM2 to layer 15 in float32 and keep every position; ours uploads to a real S3 server,
theirs writes to a folder. What both have cached is compared first.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.object_store import S3Place
from bench.peers import Peer, peer_environment
from bench.worker import Worker
from sae_job.activations.contexts import ContextReader
from sae_job.activations.reader import CachedActivations
from sae_job.models.load import load_hooked_model
from sae_job.steps.cache import write_shards
from sae_job.steps.finalize import run_finalize
from sae_job.steps.prepare import run_prepare
from sae_job.text.plan import CacheIndex
from sae_operator.api.activation_cache import (
    ActivationCacheSpec,
    CacheStorage,
    DatasetSource,
    Hook,
    ModelSource,
    Sampling,
)
from tests.caches import cache_step, step_context
from tests.testbed.data import ensure_english_text, ensure_small_model

HOOK, WIDTH = "model.layers.15", 576
CONTEXT_SIZE, BATCH_SIZE = 128, 16
# Of activations, relative to their norm: the two environments may have other kernels for attention.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class CachingRates:
    """Tokens per CPU second of both sides, one figure a turn; and ours over theirs, turn by turn."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))


class Ours:
    """The product's steps on an S3 server, with the model loaded once."""

    def __init__(self, place: S3Place, model: str, contexts: int) -> None:
        self._store = place.store("real-model")
        self._spec = ActivationCacheSpec(
            model=ModelSource(name=model, dtype="float32", batch_size=BATCH_SIZE),
            dataset=DatasetSource(path=os.fspath(ensure_english_text())),
            hooks=[Hook(name=HOOK)],
            context_size=CONTEXT_SIZE,
            tokens=contexts * CONTEXT_SIZE,
            # Every position becomes a row, as in the peer's cache.
            sampling=Sampling(exclude_special_tokens=False, max_norm_ratio=0),
            storage=CacheStorage(uri=self._store.uri, dtype="float32"),
        )
        self._step = cache_step(self._spec)
        self._context = step_context(open_store=lambda location: self._store)
        run_prepare(self._step.model_copy(update={"step": "prepare"}), self._context)
        self.contexts = self._read_contexts(contexts)
        self._model = load_hooked_model(self._spec.model, [HOOK], device="cpu")

    def _read_contexts(self, count: int) -> torch.Tensor:
        index = CacheIndex.load(self._store)
        assert index is not None
        return ContextReader(self._store, index).read(0, count)

    def cache(self) -> float:
        """Write the cache's shards anew; returns CPU seconds."""
        for stored in list(self._store.list("shards/")):
            self._store.delete(stored.key)
        start = time.process_time()
        write_shards(self._step, self._context, lambda index: self._model, device="cpu")
        return time.process_time() - start

    def rows(self) -> torch.Tensor:
        """What was cached, in order of context and position: [contexts, context_size, d_in]."""
        run_finalize(self._step.model_copy(update={"step": "finalize"}), self._context)
        count = self.contexts.numel()
        reader = CachedActivations.open(
            self._store, hooks=[HOOK], batch_size=1, seed=0, held_out_contexts=len(self.contexts) - 1
        )
        held_out = reader.held_out(count).activations[HOOK]
        reader.close()
        return held_out.reshape(-1, CONTEXT_SIZE, WIDTH)


def compare_caching(peer: Peer, place: S3Place, directory: Path, *, contexts: int, turns: int) -> CachingRates:
    """Cache in turns.

    Args:
        peer: a release of SAELens.
        place: where ours stores.
        directory: scratch folder.
        contexts: contexts of each turn; a multiple of the batch.
        turns: of each side, after one that warms up.

    Raises:
        RuntimeError: the two sides have cached different activations.
    """
    folder = directory / peer.name
    folder.mkdir()
    model = os.fspath(ensure_small_model())
    ours = Ours(place, model, contexts)
    save_file({"contexts": ours.contexts.to(torch.int64)}, folder / "contexts.safetensors")
    arguments = ["caching", model, os.fspath(folder / "contexts.safetensors"), HOOK, str(WIDTH), str(BATCH_SIZE)]
    with Worker(peer.name, peer.python(), "saelens_worker.py", arguments, peer_environment()) as theirs:
        theirs.answer()
        ours.cache()
        theirs.ask(f"cache {folder / 'first'}")
        theirs.ask(f"export {folder / 'first.safetensors'}")
        _check(ours.rows(), load_file(folder / "first.safetensors")["rows"])
        tokens = contexts * CONTEXT_SIZE
        rates = CachingRates([], [])
        for turn in range(turns):
            rates.ours.append(tokens / ours.cache())
            rates.theirs.append(tokens / theirs.ask(f"cache {folder / str(turn)}")["cpu_seconds"])
    return rates


def _check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Ours lack a context: what is held out of a cache is never all of it. Theirs are in shuffled order."""
    same = theirs[torch.cdist(ours.mean(dim=1), theirs.mean(dim=1)).argmin(dim=1)]
    error = torch.linalg.vector_norm(same - ours, dim=(1, 2)) / torch.linalg.vector_norm(ours, dim=(1, 2))
    print(f"largest relative difference of a context's activations: {float(error.max()):.1e}")
    if not float(error.max()) <= TOLERANCE:
        raise RuntimeError("the two sides have cached different activations: their costs cannot be compared")
