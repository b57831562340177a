"""The step `prepare`: text to contexts on the store, and the plan that cache workers follow; no weights, no GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sae_job.activations.codecs import CODECS
from sae_job.activations.format import MANIFEST_KEY, SHARDS_PREFIX, TAKEN_NAMES, shard_key, sidecar_key
from sae_job.activations.manifest import CacheManifest, parse_manifest
from sae_job.activations.marker import mark
from sae_job.activations.stored_parts import proved_groups
from sae_job.errors import InvalidInput
from sae_job.models.facts import ModelFacts, check_batch_size, check_context_size
from sae_job.models.mirror import localized
from sae_job.steps.context import StepContext
from sae_job.steps.hook_groups import CacheShape, shape_of
from sae_job.steps.memory import WorkerMemory, has_gpu
from sae_job.steps.prepare_contexts import store_contexts
from sae_job.storage.base import ObjectNotFound, ObjectStore
from sae_job.text.blocks import BlockRecord
from sae_job.text.plan import (
    INDEX_KEY,
    BlockEntry,
    CacheIndex,
    ModelRecord,
    Plan,
    contexts_per_block,
    row_bytes,
    slack_for,
)
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.steps import CacheStep, ExitCode, HookFacts, StepResult, TrainStep

logger = logging.getLogger(__name__)


def run_prepare(step: CacheStep | TrainStep, context: StepContext) -> StepResult:
    """Store contexts for `spec.tokens` rows and the plan of their shards, or adopt a finished cache.

    Contexts that are stored already, for fewer rows or by an attempt that was stopped, are kept. A finished cache that
    has fewer rows, or lacks hooks, is extended; of one whose damaged parts were deleted, these are written again.

    Raises:
        InvalidInput: model, data set or hooks do not exist or do not fit; too little text; too large a cache; too
            little memory.
        Stopped: asked to stop; whole blocks of contexts are stored.
    """
    if not isinstance(step, CacheStep):
        raise TypeError(f"the prepare step is given a {type(step).__name__}")
    spec = step.spec
    store = context.open_store(step.location)
    context.reporter.update(total_tokens=spec.tokens)
    manifest = finished_manifest(store, step.cache_identity)
    whole = manifest is not None and _is_whole(store, manifest)
    if manifest is not None and holds(manifest, spec):
        if whole:
            return _adopt(spec, manifest)
        logger.info("parts of the finished cache are missing below %s: they are written again", store.uri)
    facts, index = prepare_contexts_for(
        spec, store, context, identity=step.cache_identity, manifest=manifest, whole=whole
    )
    shape = CacheShape(index.groups, index.model.d_in, index.rows_per_shard, index.tokens)
    memory = _memory_of(spec, facts, shape, manifest if whole else None)
    logger.info("%s", "\n  ".join(_plan_lines(spec, index, memory)))
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
        plan={"bytes": planned_bytes(spec, index), "gpuSeconds": None, "memoryBytes": memory.total},
    )


def prepare_contexts_for(
    spec: ActivationCacheSpec,
    store: ObjectStore,
    context: StepContext,
    *,
    identity: str,
    manifest: CacheManifest | None = None,
    whole: bool = True,
) -> tuple[ModelFacts, CacheIndex]:
    """Store contexts for `spec.tokens` rows and the plan of their shards, after those that are stored already.

    Args:
        spec: the cache, or what a live source would be as a cache.
        store: its folder, which is marked as ours.
        context: for stopping, and for progress.
        identity: of the cache.
        manifest: the finished cache that is extended, where there is one.
        whole: whether it has all of its parts.

    Returns:
        Facts of the model, of the hooks whose parts are to be written, and the plan.

    Raises:
        InvalidInput, Stopped: as `run_prepare`.
    """
    _check_names(spec)
    if not mark(store, identity):
        logger.info("continuing what is there below %s", store.uri)
    there = store.head(INDEX_KEY)
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
    proved = set[int]()
    if manifest is None and earlier is not None and not _covers(spec, earlier):
        proved = proved_groups(store, earlier, CODECS[spec.storage.dtype])
    shape = shape_of(spec, facts.d_in, earlier, manifest, proved=proved)
    _check_bytes(spec, shape.tokens, shape.row_bytes(spec.storage.dtype))
    finished = manifest if whole else None
    written = shape.missing_hooks(finished)
    if written and set(written) != set(facts.d_in):
        # What other resources asked for is written, too.
        facts = model.inspect(written)
    if spec.run.resources.limits:
        _memory_of(spec, facts, shape, finished).check(spec)
    asked = spec.model_copy(update={"tokens": shape.tokens})
    records, plan = store_contexts(asked, facts, store, context, shard_rows=shape.rows_per_shard)
    index = _index(spec, facts, shape, records, plan)
    if index != earlier:
        # Two caches of one folder that are prepared at the same time must not lose what either adds: the one that
        # comes second is tried again.
        index.save(store, over=there, first=there is None)
    return facts, index


def finished_manifest(store: ObjectStore, identity: str) -> CacheManifest | None:
    """The manifest of a cache that is complete, for however many rows; None when there is none.

    Raises:
        InvalidInput: it is damaged, or another cache's.
    """
    try:
        data = store.get(MANIFEST_KEY)
    except ObjectNotFound:
        return None
    manifest = parse_manifest(data, store.uri)
    if manifest.identity != identity:
        raise InvalidInput(
            "CacheTaken", f"{store.uri} holds a cache of another spec; choose another uri", field="spec.storage.uri"
        )
    return manifest


def _is_whole(store: ObjectStore, manifest: CacheManifest) -> bool:
    """Whether all parts that a manifest lists are there, in their sizes."""
    sizes = {info.key: info.size for info in store.list(SHARDS_PREFIX)}
    return all(sizes.get(part.key) == part.bytes for entry in manifest.shards for part in entry.parts)


def holds(manifest: CacheManifest, spec: ActivationCacheSpec) -> bool:
    """Whether a finished cache has all rows and hooks that a spec asks for."""
    return manifest.tokens >= spec.tokens and {hook.key for hook in spec.hooks} <= {
        hook.name for hook in manifest.hooks
    }


def _covers(spec: ActivationCacheSpec, index: CacheIndex) -> bool:
    """Whether a spec asks for all rows and hooks that are planned."""
    return spec.tokens >= index.tokens and {hook.key for hook in spec.hooks} >= {
        hook for group in index.groups for hook in group.hooks
    }


def planned_bytes(spec: ActivationCacheSpec, index: CacheIndex) -> int:
    """Size of the rows of a planned cache."""
    groups = range(len(index.groups))
    return index.tokens * sum(row_bytes(index.group_widths(group), spec.storage.dtype, group) for group in groups)


def check_size(spec: ActivationCacheSpec, facts: ModelFacts) -> None:
    """Raises InvalidInput when the cache would be larger than the spec allows."""
    _check_bytes(spec, spec.tokens, row_bytes(facts.d_in, spec.storage.dtype))


def _check_names(spec: ActivationCacheSpec) -> None:
    for number, hook in enumerate(spec.hooks):
        if hook.key in TAKEN_NAMES:
            raise InvalidInput(
                "HookNameTaken",
                f"{hook.key!r} cannot be cached: shards hold {', '.join(TAKEN_NAMES)} of their own; choose another "
                "layer, or rename the model's module",
                field=f"spec.hooks[{number}].name",
            )


def _check_bytes(spec: ActivationCacheSpec, tokens: int, bytes_of_row: int) -> None:
    size, limit = tokens * bytes_of_row, spec.storage.max_bytes
    if limit is not None and size > limit:
        raise InvalidInput(
            "CacheTooLarge",
            f"{tokens} rows are {size} bytes, more than maxBytes {limit}; lower spec.tokens or raise maxBytes",
            field="spec.storage.maxBytes",
        )


def _memory_of(
    spec: ActivationCacheSpec, facts: ModelFacts, shape: CacheShape, finished: CacheManifest | None
) -> WorkerMemory:
    rows = min(shape.tokens, shape.rows_per_shard)
    return WorkerMemory.of(spec, facts, rows * shape.missing_row_bytes(spec.storage.dtype, finished))


def _adopt(spec: ActivationCacheSpec, manifest: CacheManifest) -> StepResult:
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
        hooks=hook_facts(spec, manifest),
    )


def hook_facts(spec: ActivationCacheSpec, manifest: CacheManifest) -> list[HookFacts]:
    """What the manifest says of the spec's hooks; it may hold more."""
    hooks = [manifest.hook(hook.key) for hook in spec.hooks]
    return [HookFacts(name=hook.name, d_in=hook.d_in, mean_norm=hook.mean_norm) for hook in hooks]


def _plan_lines(spec: ActivationCacheSpec, index: CacheIndex, memory: WorkerMemory) -> list[str]:
    """What the cache will take, for people."""
    hooks = [hook for group in index.groups for hook in group.hooks]
    return [
        "plan of the cache:",
        f"rows           {index.tokens:,} in {len(index.shards):,} shards, of {index.contexts:,} contexts",
        f"hooks          {', '.join(hooks)}",
        f"store          {planned_bytes(spec, index):,} bytes",
        *memory.lines(gpu=has_gpu(spec.run)),
        f"a worker takes {memory.total / 2**20:,.1f} MiB in all",
    ]


def _index(
    spec: ActivationCacheSpec, facts: ModelFacts, shape: CacheShape, records: Sequence[BlockRecord], plan: Plan
) -> CacheIndex:
    return CacheIndex(
        context_size=spec.context_size,
        contexts_per_block=contexts_per_block(spec.context_size),
        blocks=[BlockEntry(contexts=record.contexts, sha256=record.sha256) for record in records],
        tokenizer=records[0].tokenizer,
        model=ModelRecord(name=facts.name, revision=facts.revision, d_in=shape.d_in),
        dataset=records[0].dataset,
        exhausted=records[-1].exhausted,
        rows_per_shard=shape.rows_per_shard,
        slack=slack_for(shape.rows_per_shard, spec),
        shards=plan.shards,
        tokens=plan.rows,
        groups=shape.groups,
    )


def _complete_shards(store: ObjectStore, index: CacheIndex) -> int:
    """Shards of the plan whose parts all have their sidecars."""
    there = {info.key for info in store.list(SHARDS_PREFIX)}
    return sum(
        all(
            sidecar_key(shard_key(number, shard.rows, index.rows_per_shard, group)) in there
            for group in range(len(index.groups))
        )
        for number, shard in enumerate(index.shards)
    )
