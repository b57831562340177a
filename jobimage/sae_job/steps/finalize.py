"""The finalize step: the shards' sidecars become the manifest, whose presence means that the cache is complete."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sae_job.activations.format import MANIFEST_KEY, SHARDS_PREFIX, shard_key
from sae_job.activations.manifest import CacheManifest, ShardEntry, Sidecar, parse_manifest, read_sidecar
from sae_job.activations.statistics import merge_sums
from sae_job.errors import InvalidInput
from sae_job.steps.context import StepContext
from sae_job.storage.base import ObjectNotFound, ObjectStore, PreconditionFailed
from sae_job.text.plan import CacheIndex
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import CACHE_FORMAT_VERSION, cache_identity
from sae_operator.api.steps import CacheStep, ExitCode, HookFacts, StepResult, TrainStep

# Sidecars are small and many: what takes time is the way to the store.
READ_THREADS = 16
# Another finalize can win the race for the manifest; more often than this it does not happen.
WRITE_ATTEMPTS = 5
# What does not determine the rows.
LEFT_OUT = ("run", "parallelism", "tokens", "suspend", "retry")
LEFT_OUT_OF_STORAGE = ("secretRef", "endpointUrl", "region", "maxBytes")


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
    manifest = write_manifest(store, merge(step.spec, index, _read_sidecars(store, index)))
    context.reporter.update(tokens=manifest.tokens, shards_complete=len(manifest.shards))
    return StepResult(
        step="finalize",
        exit_code=ExitCode.DONE,
        reason="Completed",
        message=f"{manifest.tokens} rows in {len(manifest.shards)} shards",
        tokens=manifest.tokens,
        bytes=manifest.bytes,
        hooks=[HookFacts(name=hook.name, d_in=hook.d_in, mean_norm=hook.mean_norm) for hook in manifest.hooks],
        shards_total=len(manifest.shards),
        shards_complete=len(manifest.shards),
    )


def _read_sidecars(store: ObjectStore, index: CacheIndex) -> list[Sidecar]:
    """Sidecars of all planned shards, each of which is there in full."""
    sizes = {info.key: info.size for info in store.list(SHARDS_PREFIX)}
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="sidecar") as threads:
        found = list(
            threads.map(
                lambda number: read_sidecar(store, number, index.shards[number].rows, index.rows_per_shard),
                range(len(index.shards)),
            )
        )
    complete: list[Sidecar] = []
    missing: list[str] = []
    for number, sidecar in enumerate(found):
        key = shard_key(number, index.shards[number].rows, index.rows_per_shard)
        if sidecar is None or sizes.get(key) != sidecar.bytes:
            missing.append(key)
        else:
            complete.append(sidecar)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InvalidInput(
            "ShardsMissing",
            f"{store.uri} lacks {', '.join(missing[:3])}{more}, or not all of their bytes are there: raise spec.retry "
            "to write them again",
        )
    return complete


def merge(spec: ActivationCacheSpec, index: CacheIndex, sidecars: list[Sidecar]) -> CacheManifest:
    """The manifest of a cache whose shards have these sidecars, in order.

    Raises:
        InvalidInput: the shards disagree, or there are none.
    """
    if not sidecars:
        raise InvalidInput("TooFewRows", "the cache has no rows: the text gives none", field="spec.dataset")
    raw = index.model_dump(mode="json", by_alias=True)
    return CacheManifest(
        format_version=CACHE_FORMAT_VERSION,
        identity=cache_identity(spec),
        spec=recorded_spec(spec),
        model=raw["model"],
        dataset=raw["dataset"],
        tokenizer=raw["tokenizer"],
        seed=spec.seed,
        dtype=spec.storage.dtype,
        context_size=index.context_size,
        tokens=sum(sidecar.rows for sidecar in sidecars),
        bytes=sum(sidecar.bytes for sidecar in sidecars),
        rows_per_shard=index.rows_per_shard,
        hooks=[
            merge_sums(hook.name, [(sidecar.rows, sidecar.hooks[hook.name]) for sidecar in sidecars])
            for hook in spec.hooks
        ],
        shards=[
            ShardEntry(
                key=shard_key(sidecar.shard, sidecar.rows, index.rows_per_shard),
                rows=sidecar.rows,
                bytes=sidecar.bytes,
                sha256=sidecar.sha256,
                crc32=sidecar.crc32,
                start=plan.start,
                stop=plan.stop,
            )
            for sidecar, plan in zip(sidecars, index.shards, strict=True)
        ],
        software=list({str(sidecar.software): sidecar.software for sidecar in sidecars}.values()),
        device=list(dict.fromkeys(sidecar.device for sidecar in sidecars)),
    )


def recorded_spec(spec: ActivationCacheSpec) -> dict[str, Any]:
    """The spec as the manifest records it: what determines the rows, and no credentials."""
    manifest = {key: value for key, value in spec.to_manifest().items() if key not in LEFT_OUT}
    storage = manifest["storage"]
    manifest["storage"] = {key: value for key, value in storage.items() if key not in LEFT_OUT_OF_STORAGE}
    return manifest


def write_manifest(store: ObjectStore, manifest: CacheManifest) -> CacheManifest:
    """Write the manifest unless it, or one of more rows, is there; returns the one that is there then.

    Raises:
        PreconditionFailed: other writers kept changing it.
    """
    for _ in range(WRITE_ATTEMPTS):
        info = store.head(MANIFEST_KEY)
        try:
            if info is None:
                store.put(MANIFEST_KEY, manifest.to_bytes(), if_absent=True)
                return manifest
            there = parse_manifest(store.get(MANIFEST_KEY), store.uri)
            # A longer cache of the same identity holds all that this one does.
            if there == manifest or there.tokens > manifest.tokens:
                return there
            store.put(MANIFEST_KEY, manifest.to_bytes(), if_match=info.etag)
        except (PreconditionFailed, ObjectNotFound):
            # Another writer was faster, or the answer to our own write was lost: look again.
            continue
        return manifest
    raise PreconditionFailed(f"{store.uri}/{MANIFEST_KEY}: other writers keep changing it")
