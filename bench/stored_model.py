"""A model whose activations lie in memory, its caches, and their readers: what is measured beside a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sae_job.activations.reader import CachedActivations
from sae_job.steps.cache import write_shards
from sae_job.steps.finalize import run_finalize
from sae_job.storage.base import ObjectStore
from sae_operator.api.activation_cache import StorageDtype
from tests.caches import cache_spec, cache_step, prepare_tokens, step_context

WIDTH = 576
CONTEXT_SIZE = 128
BATCH_SIZE = 16
CONTEXTS_PER_BLOCK = 2048
DEVICE = "memory"


class StoredModel:
    """Gives activations from memory; enough different ones that they do not stay in a core's cache."""

    def __init__(self, hooks: Mapping[str, int], *, batches: int = 8, dtype: torch.dtype = torch.bfloat16) -> None:
        self._batches = [
            {hook: torch.randn(BATCH_SIZE, CONTEXT_SIZE, width).to(dtype) for hook, width in hooks.items()}
            for _ in range(batches)
        ]
        self._next = 0

    def activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        self._next = (self._next + 1) % len(self._batches)
        return {hook: values[: len(tokens)] for hook, values in self._batches[self._next].items()}


def hooks_of(count: int) -> dict[str, int]:
    """Names and widths of so many hooks."""
    return {f"model.layers.{layer}": WIDTH for layer in range(count)}


def build_cache(
    store: ObjectStore,
    directory: Path,
    *,
    rows: int,
    shard_bytes: int,
    dtype: StorageDtype = "bfloat16",
    hooks: Mapping[str, int] | None = None,
) -> None:
    """A finished cache of a stored model in a folder; `directory` is scratch."""
    hooks = hooks_of(1) if hooks is None else hooks
    spec = cache_spec(
        directory,
        hooks=hooks,
        tokens=rows,
        context_size=CONTEXT_SIZE,
        shard_bytes=shard_bytes,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        batch_size=BATCH_SIZE,
    )
    prepare_tokens(store, spec, hooks, contexts_per_block=CONTEXTS_PER_BLOCK)
    step, context = cache_step(spec), step_context(open_store=lambda location: store)
    model_dtype = torch.float32 if dtype == "float32" else torch.bfloat16
    write_shards(step, context, lambda index: StoredModel(hooks, dtype=model_dtype), device=DEVICE)
    run_finalize(step, context)


def open_reader(store: ObjectStore, *, batch: int, shard_bytes: int) -> CachedActivations:
    """A reader of all rows of the first hook that mixes four shards and reads two ahead."""
    return CachedActivations.open(
        store,
        hooks=list(hooks_of(1)),
        batch_size=batch,
        seed=0,
        held_out_contexts=0,
        mix_shards=4,
        read_ahead_bytes=2 * shard_bytes + 2**20,
    )
