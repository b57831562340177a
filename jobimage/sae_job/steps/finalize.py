"""The finalize step: the shards' sidecars become the manifest, whose presence means that the cache is complete."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sae_job.activations.codecs import CODECS
from sae_job.activations.format import MANIFEST_KEY, shard_key
from sae_job.activations.manifest import CacheManifest, ShardEntry, Sidecar, parse_manifest, part_entry
from sae_job.activations.statistics import HookTotals
from sae_job.activations.stored_parts import PartLayouts, proved_parts
from sae_job.errors import InvalidInput
from sae_job.steps.context import StepContext
from sae_job.steps.prepare import hook_facts
from sae_job.storage.base import ObjectNotFound, ObjectStore, PreconditionFailed
from sae_job.text.plan import CacheIndex
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import CACHE_FORMAT_VERSION
from sae_operator.api.steps import CacheStep, ExitCode, StepResult, TrainStep

# Another finalize can win the race for the manifest; more often than this it does not happen.
WRITE_ATTEMPTS = 5
# What does not determine the rows.
LEFT_OUT = ("run", "parallelism", "tokens", "suspend", "retry")
LEFT_OUT_OF_SOURCES = ("secretRef", "region")
LEFT_OUT_OF_STORAGE = ("secretRef", "endpointUrl", "region", "maxBytes", "bufferBytes")


def run_finalize(step: CacheStep | TrainStep, context: StepContext) -> StepResult:
    """Merge the sidecars of all planned shards, in order, and write the manifest; again and again without harm.

    Raises:
        InvalidInput: shards are missing or disagree.
    """
    if not isinstance(step, CacheStep):
        raise TypeError(f"the finalize step is given a {type(step).__name__}")
    store = context.open_store(step.location)
    index = CacheIndex.load(store)
    if index is None:
        raise InvalidInput("NotPrepared", f"{store.uri} holds no contexts: run the prepare step first")
    context.reporter.update(total_tokens=index.tokens, shards_complete=0)
    asked, planned = {hook.key for hook in step.spec.hooks}, {hook for group in index.groups for hook in group.hooks}
    if not asked <= planned or index.tokens < step.spec.tokens:
        raise InvalidInput(
            "PlanChanged",
            f"another cache resource has planned {store.uri} anew, for other hooks or fewer tokens: raise spec.retry "
            "when it is done",
        )
    manifest = write_manifest(
        store, merge(step.spec, index, _read_sidecars(step.spec, store, index), identity=step.cache_identity)
    )
    context.reporter.update(tokens=manifest.tokens, shards_complete=len(manifest.shards))
    return StepResult(
        step="finalize",
        exit_code=ExitCode.DONE,
        reason="Completed",
        message=f"{manifest.tokens} rows in {len(manifest.shards)} shards",
        tokens=manifest.tokens,
        bytes=manifest.bytes,
        hooks=hook_facts(step.spec, manifest),
        shards_total=len(manifest.shards),
        shards_complete=len(manifest.shards),
    )


def _read_sidecars(spec: ActivationCacheSpec, store: ObjectStore, index: CacheIndex) -> Iterator[list[Sidecar]]:
    """Sidecars of all planned shards, of all groups of each, one shard after the other.

    Raises:
        InvalidInput: after the last one: parts are not there in full.
    """
    layouts = PartLayouts(index, CODECS[spec.storage.dtype])
    missing: list[str] = []
    for number, found in enumerate(proved_parts(store, index, layouts, range(len(index.shards)))):
        rows = index.shards[number].rows
        missing += [
            shard_key(number, rows, index.rows_per_shard, group)
            for group, sidecar in enumerate(found)
            if sidecar is None
        ]
        if not missing:
            yield [sidecar for sidecar in found if sidecar is not None]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InvalidInput(
            "ShardsMissing",
            f"{store.uri} lacks {', '.join(missing[:3])}{more}, or not all of their bytes are there: raise spec.retry "
            "to write them again",
        )


def merge(
    spec: ActivationCacheSpec, index: CacheIndex, sidecars: Iterable[Sequence[Sidecar]], *, identity: str
) -> CacheManifest:
    """The manifest of a cache whose shards have these sidecars, in order, of each all groups. Each is used once: many
    of them may be larger than memory.

    Raises:
        InvalidInput: the shards disagree, or there are none.
    """
    totals = [HookTotals(hook, group=number) for number, group in enumerate(index.groups) for hook in group.hooks]
    shards: list[list[Sidecar]] = []
    for shard in sidecars:
        sums = [shard[number].hooks[hook] for number, group in enumerate(index.groups) for hook in group.hooks]
        for total, found in zip(totals, sums, strict=True):
            total.add(found)
        shards.append([sidecar.without_sums() for sidecar in shard])
    if not shards:
        raise InvalidInput("TooFewRows", "the cache has no rows: the text gives none", field="spec.dataset")
    raw = index.model_dump(mode="json", by_alias=True)
    every = [sidecar for shard in shards for sidecar in shard]
    return CacheManifest(
        format_version=CACHE_FORMAT_VERSION,
        identity=identity,
        spec=recorded_spec(spec, [hook for group in index.groups for hook in group.hooks]),
        model=raw["model"],
        dataset=raw["dataset"],
        tokenizer=raw["tokenizer"],
        seed=spec.seed,
        dtype=spec.storage.dtype,
        context_size=index.context_size,
        tokens=sum(shard[0].rows for shard in shards),
        bytes=sum(sidecar.bytes for sidecar in every),
        rows_per_shard=index.rows_per_shard,
        groups=index.groups,
        hooks=[total.statistics() for total in totals],
        shards=[
            ShardEntry(
                rows=plan.rows,
                start=plan.start,
                stop=plan.stop,
                parts=[part_entry(sidecar, index.rows_per_shard) for sidecar in shard],
            )
            for shard, plan in zip(shards, index.shards, strict=True)
        ],
        software=list({str(sidecar.software): sidecar.software for sidecar in every}.values()),
        device=list(dict.fromkeys(sidecar.device for sidecar in every)),
    )


def recorded_spec(spec: ActivationCacheSpec, hooks: Sequence[str]) -> dict[str, Any]:
    """The spec as the manifest records it: what determines the rows, with the keys of all hooks that the cache holds,
    and no credentials."""
    manifest = {key: value for key, value in spec.to_manifest().items() if key not in LEFT_OUT}
    storage = manifest["storage"]
    manifest["storage"] = {key: value for key, value in storage.items() if key not in LEFT_OUT_OF_STORAGE}
    for source in (manifest["model"], manifest["dataset"]):
        store = {key: value for key, value in source.pop("store", {}).items() if key not in LEFT_OUT_OF_SOURCES}
        if store:
            source["store"] = store
    manifest["hooks"] = [hook_of(key) for key in hooks]
    return manifest


def hook_of(key: str) -> dict[str, Any]:
    """The hook with a key, as a spec has it."""
    name, _, head = key.partition(":")
    return {"name": name, "headIndex": int(head)} if head.isdecimal() else {"name": key}


def write_manifest(store: ObjectStore, manifest: CacheManifest) -> CacheManifest:
    """Write the manifest unless it, or a larger cache's, is there; returns the one that is there then.

    Raises:
        InvalidInput: the one that is there holds what this one does not.
        PreconditionFailed: other writers kept changing it.
    """
    for _ in range(WRITE_ATTEMPTS):
        info = store.head(MANIFEST_KEY)
        try:
            if info is None:
                store.put(MANIFEST_KEY, manifest.to_bytes(), if_absent=True)
                return manifest
            there = parse_manifest(store.get(MANIFEST_KEY), store.uri)
            if there == manifest:
                return there
            ours, theirs = ({hook.name for hook in held.hooks} for held in (manifest, there))
            if there.tokens >= manifest.tokens and theirs >= ours and (there.tokens > manifest.tokens or theirs > ours):
                # A larger cache of the same identity holds all that this one does.
                return there
            if there.tokens > manifest.tokens or not theirs <= ours:
                raise InvalidInput(
                    "PlanChanged",
                    f"another cache resource has finished {store.uri} with other hooks or more tokens meanwhile: raise "
                    "spec.retry",
                )
            store.put(MANIFEST_KEY, manifest.to_bytes(), if_match=info.etag)
        except (PreconditionFailed, ObjectNotFound):
            # Another writer was faster, or the answer to our own write was lost: look again.
            continue
        return manifest
    raise PreconditionFailed(f"{store.uri}/{MANIFEST_KEY}: other writers keep changing it")
