"""Small caches for tests: contexts in the store as prepare leaves them, a model that computes closed forms, and
finished caches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sae_job.activations.format import layout_of
from sae_job.activations.manifest import CacheManifest
from sae_job.reporting.progress import ProgressReporter
from sae_job.steps.cache import write_shards
from sae_job.steps.context import StepContext
from sae_job.steps.finalize import hook_of, run_finalize
from sae_job.storage.base import ObjectStore
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_job.text.plan import (
    BlockEntry,
    CacheIndex,
    DatasetRecord,
    HookGroup,
    ModelRecord,
    TokenizerRecord,
    block_key,
    plan_shards,
    rows_per_shard,
)
from sae_job.text.usable import excluded_token_ids, usable_positions
from sae_operator.api.activation_cache import (
    ActivationCacheSpec,
    CacheStorage,
    DatasetSource,
    Hook,
    ModelSource,
    Sampling,
    StorageDtype,
)
from sae_operator.api.identity import cache_location
from sae_operator.api.steps import CacheStep
from sae_operator.api.store import StoreLocation

VOCABULARY = 97
BOS = 0
# What `LookupModel` computes in for a cache of each format.
MODEL_DTYPES: dict[StorageDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float32,
    "int8": torch.float32,
}


class LookupModel:
    """A model without weights: the activation of a token is its row of a fixed random table, plus a little of its
    position; in float32 the first value also tells the contexts apart, so that no two rows are equal.

    Attributes:
        calls: how many batches it was given.
    """

    def __init__(self, hooks: Mapping[str, int], *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._tables = {hook: torch.randn(VOCABULARY, width, generator=generator) for hook, width in hooks.items()}
        self._dtype = dtype
        self.calls = 0

    def activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        position = torch.arange(tokens.shape[1]).reshape(1, -1, 1) / 64
        context = (tokens.double() * torch.arange(1, tokens.shape[1] + 1).sqrt()).sum(dim=1).sin().float() / 16
        found = {hook: table[tokens.long()] + position for hook, table in self._tables.items()}
        for values in found.values():
            values[:, :, 0] += context[:, None]
        return {hook: values.to(self._dtype) for hook, values in found.items()}


def cache_spec(
    root: Path,
    *,
    hooks: Mapping[str, int] | None = None,
    tokens: int = 1000,
    context_size: int = 16,
    shard_bytes: int = 2**14,
    dtype: StorageDtype = "bfloat16",
    seed: int = 0,
    batch_size: int = 4,
    max_norm_ratio: float = 0.0,
) -> ActivationCacheSpec:
    return ActivationCacheSpec(
        model=ModelSource(name="lookup", batch_size=batch_size),
        dataset=DatasetSource(path="numbers"),
        hooks=[Hook.model_validate(hook_of(hook)) for hook in hooks or {"layer.0": 16}],
        context_size=context_size,
        tokens=tokens,
        seed=seed,
        sampling=Sampling(max_norm_ratio=max_norm_ratio),
        storage=CacheStorage(uri=f"file://{root}", shard_bytes=shard_bytes, dtype=dtype),
    )


def prepare_tokens(
    store: ObjectStore,
    spec: ActivationCacheSpec,
    hooks: Mapping[str, int],
    *,
    contexts: int | None = None,
    contexts_per_block: int = 32,
    groups: list[HookGroup] | None = None,
) -> CacheIndex:
    """Store random contexts that begin with BOS, and a plan, as the prepare step does; more tokens extend them.

    Args:
        store: the cache's folder.
        spec: the cache.
        hooks: width of every hook.
        contexts: how many contexts there are; enough for the spec when None.
        contexts_per_block: contexts of a block.
        groups: the hooks in groups; one group when None.
    """
    wanted = contexts or 2 * (-(-spec.tokens // (spec.context_size - 1)) + 2 * spec.context_size)
    blocks, found = [], list[torch.Tensor]()
    for block in range(-(-wanted // contexts_per_block)):
        # A block is a function of its number, so that a longer cache begins with the same contexts.
        generator = torch.Generator().manual_seed(1000 * spec.seed + block)
        tokens = torch.randint(1, VOCABULARY, (contexts_per_block, spec.context_size), generator=generator)
        tokens[:, 0] = BOS
        excluded = excluded_token_ids(spec.sampling, [BOS])
        found.append(usable_positions(tokens, excluded, spec.sampling.positions.of(spec.context_size)).sum(dim=1))
        layout = layout_of([("contexts", torch.int32, (contexts_per_block, spec.context_size))])
        data = bytearray(layout.size)
        data[: len(layout.header)] = layout.header
        layout.tensor(memoryview(data), "contexts").copy_(tokens)
        store.put(block_key(block), data)
        blocks.append(BlockEntry(contexts=contexts_per_block, sha256=hashlib.sha256(data).hexdigest()))
    first = hooks if groups is None else {hook: hooks[hook] for hook in groups[0].hooks}
    shard_rows = rows_per_shard(spec, first)
    usable = torch.cat(found).tolist()
    plan = plan_shards(usable, spec.tokens, spec, shard_rows=shard_rows)
    index = CacheIndex(
        context_size=spec.context_size,
        contexts_per_block=contexts_per_block,
        blocks=blocks,
        tokenizer=TokenizerRecord(name="numbers", sha256="", bos_token_id=BOS, special_token_ids=[BOS]),
        model=ModelRecord(name="lookup", revision=None, d_in=dict(hooks)),
        dataset=DatasetRecord(path="numbers"),
        exhausted=False,
        rows_per_shard=shard_rows,
        slack=0,
        shards=plan.shards,
        tokens=plan.rows,
        groups=groups or [HookGroup(hooks=list(hooks))],
    )
    index.save(store)
    return index


def cache_step(spec: ActivationCacheSpec, *, completions: int = 1) -> CacheStep:
    return CacheStep(
        step="cache",
        namespace="team",
        name="numbers",
        uid="6c1b",
        spec=spec,
        location=cache_location(spec, "team"),
        completions=completions,
    )


def step_context(
    *,
    open_store: Callable[[StoreLocation], ObjectStore] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    completion_index: int = 0,
) -> StepContext:
    return StepContext(
        reporter=ProgressReporter("cache", clock=lambda: 0.0),
        should_stop=should_stop,
        open_store=open_store or (lambda location: FileStore(path_of_file_uri(location.uri))),
        now=lambda: 0.0,
        completion_index=completion_index,
    )


def finished_cache(
    root: Path,
    *,
    hooks: Mapping[str, int] | None = None,
    tokens: int = 1000,
    context_size: int = 16,
    shard_bytes: int = 2**14,
    dtype: StorageDtype = "bfloat16",
    seed: int = 0,
    max_norm_ratio: float = 0.0,
) -> tuple[FileStore, CacheManifest]:
    """A finished cache of `LookupModel`'s activations, through the real steps; returns its folder and manifest."""
    from sae_job.activations.manifest import read_manifest

    hooks = hooks or {"layer.0": 16}
    spec = cache_spec(
        root,
        hooks=hooks,
        tokens=tokens,
        context_size=context_size,
        shard_bytes=shard_bytes,
        dtype=dtype,
        seed=seed,
        max_norm_ratio=max_norm_ratio,
    )
    step = cache_step(spec)
    store = FileStore(path_of_file_uri(step.location.uri))
    prepare_tokens(store, spec, hooks)
    context = step_context()
    write_shards(step, context, lambda _: LookupModel(hooks, dtype=MODEL_DTYPES[dtype], seed=seed), device="cpu")
    run_finalize(step, context)
    return store, read_manifest(store)
