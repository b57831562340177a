"""The step `prepare`: text to contexts on the store, and the plan that cache workers follow; no weights, no GPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from sae_job.activations.format import MANIFEST_KEY, SHARDS_PREFIX, shard_key, sidecar_key
from sae_job.activations.manifest import CacheManifest, parse_manifest
from sae_job.activations.writer import IN_FLIGHT
from sae_job.errors import InvalidInput
from sae_job.models.facts import ModelFacts, check_batch_size, check_context_size
from sae_job.models.mirror import localized
from sae_job.steps.context import StepContext
from sae_job.steps.prepare_contexts import store_contexts
from sae_job.storage.base import ObjectNotFound, ObjectStore, PreconditionFailed
from sae_job.text.blocks import BlockRecord
from sae_job.text.plan import (
    ITEM_BYTES,
    BlockEntry,
    CacheIndex,
    ModelRecord,
    Plan,
    contexts_per_block,
    row_bytes,
    rows_per_shard,
    slack_for,
)
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import CACHE_FORMAT_VERSION, cache_identity
from sae_operator.api.steps import CacheStep, ExitCode, HookFacts, StepResult, TrainStep

logger = logging.getLogger(__name__)

MARKER_KEY = "sae-operator.json"
# Interpreter and libraries.
_PROCESS_BYTES = 2**30
# Tensors of a layer's width that a forward pass holds at a time, beside what the hooks keep.
_FORWARD_WIDTHS = 16
# Shards in memory: one being filled, the others being stored.
_SHARDS_IN_MEMORY = IN_FLIGHT + 1


def run_prepare(step: CacheStep | TrainStep, context: StepContext) -> StepResult:
    """Store contexts for `spec.tokens` rows and the plan of their shards, or adopt a finished cache.

    Contexts that are stored already, for fewer rows or by an attempt that was stopped, are kept.

    Raises:
        InvalidInput: model, data set or hooks do not exist or do not fit; too little text; too large a cache.
        Stopped: asked to stop; whole blocks of contexts are stored.
    """
    if not isinstance(step, CacheStep):
        raise TypeError(f"the prepare step is given a {type(step).__name__}")
    spec = step.spec
    store = context.open_store(step.location)
    context.reporter.update(total_tokens=spec.tokens)
    manifest = finished_manifest(store, spec)
    if manifest is not None and manifest.tokens >= spec.tokens:
        return _adopt(manifest)
    facts, index = prepare_contexts_for(spec, store, context)
    context.reporter.update(tokens=spec.tokens)
    complete = _complete_shards(store, index)
    logger.info("%d contexts, %d shards, of which %d are stored", index.contexts, len(index.shards), complete)
    return StepResult(
        step="prepare",
        exit_code=ExitCode.DONE,
        reason="Completed",
        message=f"{len(index.shards)} shards from {index.contexts} contexts, of which {complete} are stored already",
        adopted=False,
        shards_total=len(index.shards),
        shards_complete=complete,
        plan={"bytes": cache_bytes(spec, facts), "gpuSeconds": None, "memoryBytes": memory_bytes(spec, facts)},
    )


def prepare_contexts_for(
    spec: ActivationCacheSpec, store: ObjectStore, context: StepContext
) -> tuple[ModelFacts, CacheIndex]:
    """Store contexts for `spec.tokens` rows and the plan of their shards, after those that are stored already.

    Args:
        spec: the cache, or what a live source would be as a cache.
        store: its folder, which is marked as ours.
        context: for stopping, and for progress.

    Raises:
        InvalidInput, Stopped: as `run_prepare`.
    """
    _mark(store, spec)
    earlier = CacheIndex.load(store)
    model = localized(
        spec.model,
        open_store=context.open_store,
        mirror=store,
        make_mirror=True,
        revision=None if earlier is None else earlier.model.revision,
        weights=False,
        should_stop=context.should_stop,
    )
    facts = model.inspect([hook.key for hook in spec.hooks])
    check_context_size(facts, spec.context_size)
    check_batch_size(spec.model, spec.context_size)
    check_size(spec, facts)
    records, plan = store_contexts(spec, facts, store, context)
    index = _index(spec, facts, records, plan)
    if index != earlier:
        index.save(store)
    return facts, index


def finished_manifest(store: ObjectStore, spec: ActivationCacheSpec) -> CacheManifest | None:
    """The manifest of a cache that is complete, for however many rows; None when there is none.

    Raises:
        InvalidInput: it is damaged, or another cache's.
    """
    try:
        data = store.get(MANIFEST_KEY)
    except ObjectNotFound:
        return None
    manifest = parse_manifest(data, store.uri)
    if manifest.identity != cache_identity(spec):
        raise InvalidInput(
            "CacheTaken", f"{store.uri} holds a cache of another spec; choose another uri", field="spec.storage.uri"
        )
    return manifest


def cache_bytes(spec: ActivationCacheSpec, facts: ModelFacts) -> int:
    """Size of the finished cache's rows."""
    return spec.tokens * row_bytes(facts.d_in, spec.storage.dtype)


def check_size(spec: ActivationCacheSpec, facts: ModelFacts) -> None:
    """Raises InvalidInput when the cache would be larger than the spec allows."""
    size, limit = cache_bytes(spec, facts), spec.storage.max_bytes
    if limit is not None and size > limit:
        raise InvalidInput(
            "CacheTooLarge",
            f"{spec.tokens} rows are {size} bytes, more than maxBytes {limit}; lower spec.tokens or raise maxBytes",
            field="spec.storage.maxBytes",
        )


def memory_bytes(spec: ActivationCacheSpec, facts: ModelFacts) -> int:
    """What a cache worker needs: weights, one forward pass, and the shards being filled and stored."""
    item = ITEM_BYTES[spec.model.dtype]
    width = sum(facts.d_in.values()) + _FORWARD_WIDTHS * max(facts.d_in.values())
    forward = spec.model.batch_size * spec.context_size * width * item
    shard = min(spec.tokens, rows_per_shard(spec, facts.d_in)) * row_bytes(facts.d_in, spec.storage.dtype)
    return _PROCESS_BYTES + facts.parameter_bytes + forward + _SHARDS_IN_MEMORY * shard


def _adopt(manifest: CacheManifest) -> StepResult:
    logger.info("a finished cache of %d rows is there already", manifest.tokens)
    return StepResult(
        step="prepare",
        exit_code=ExitCode.DONE,
        reason="Completed",
        message=f"a finished cache of {manifest.tokens} rows is there already",
        adopted=True,
        shards_total=len(manifest.shards),
        shards_complete=len(manifest.shards),
        tokens=manifest.tokens,
        bytes=manifest.bytes,
        hooks=[HookFacts(name=hook.name, d_in=hook.d_in, mean_norm=hook.mean_norm) for hook in manifest.hooks],
    )


def _mark(store: ObjectStore, spec: ActivationCacheSpec) -> None:
    """Say that this folder is a cache of ours: nothing without the marker is ever deleted."""
    marker = {"kind": "ActivationCache", "formatVersion": CACHE_FORMAT_VERSION, "identity": cache_identity(spec)}
    try:
        store.put(MARKER_KEY, (json.dumps(marker, sort_keys=True) + "\n").encode(), if_absent=True)
    except PreconditionFailed:
        logger.info("continuing what is there below %s", store.uri)


def _index(spec: ActivationCacheSpec, facts: ModelFacts, records: Sequence[BlockRecord], plan: Plan) -> CacheIndex:
    shard_rows = rows_per_shard(spec, facts.d_in)
    return CacheIndex(
        context_size=spec.context_size,
        contexts_per_block=contexts_per_block(spec.context_size),
        blocks=[BlockEntry(contexts=record.contexts, sha256=record.sha256) for record in records],
        tokenizer=records[0].tokenizer,
        model=ModelRecord(name=facts.name, revision=facts.revision, d_in=facts.d_in),
        dataset=records[0].dataset,
        exhausted=records[-1].exhausted,
        rows_per_shard=shard_rows,
        slack=slack_for(shard_rows, spec),
        shards=plan.shards,
        tokens=plan.rows,
    )


def _complete_shards(store: ObjectStore, index: CacheIndex) -> int:
    """Shards of the plan whose sidecar is stored."""
    there = {info.key for info in store.list(SHARDS_PREFIX)}
    keys = (
        sidecar_key(shard_key(number, shard.rows, index.rows_per_shard)) for number, shard in enumerate(index.shards)
    )
    return sum(key in there for key in keys)
