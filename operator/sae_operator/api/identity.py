"""Identity of a cache and of a training job: what makes two of them the same data."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sae_operator.api.activation_cache import ActivationCacheSpec, CacheStorage, DatasetSource, ModelSource
from sae_operator.api.base import ApiModel
from sae_operator.api.sae import Initialization, SaeSpec
from sae_operator.api.store import StoreLocation
from sae_operator.api.training_job import SAETrainingJobSpec

CACHE_FORMAT_VERSION = 1
# 64 bits: a collision among a million caches has probability 3e-8.
HASH_LENGTH = 16
# Rows of a live source are mixed and computed ahead in units that a cache would store as shards: 8 and 2 of them.
LIVE_SHARDS_IN_BUFFER = 10


def canonical_hash(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def chosen(model: ApiModel) -> dict[str, Any]:
    """What a manifest says beyond the defaults: a field that a later version adds leaves hashes as they are."""
    return model.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)


def cache_identity(spec: ActivationCacheSpec) -> str:
    """Hash of what determines a cache's contexts and how they become rows: not of tokens and hooks, which may be
    added, nor of run settings, parallelism, location or credentials."""
    return canonical_hash(
        {
            "formatVersion": CACHE_FORMAT_VERSION,
            "model": _source(spec.model),
            "dataset": _source(spec.dataset),
            "contextSize": spec.context_size,
            "seed": spec.seed,
            "sampling": chosen(spec.sampling),
            "dtype": spec.storage.dtype,
            "shardBytes": spec.storage.shard_bytes,
        }
    )


# What changes where a model lies or runs, and not what it computes.
_PLACEMENT_FIELDS = ("mirror", "deviceMap")


def _source(source: ModelSource | DatasetSource) -> dict[str, Any]:
    """A model or dataset without who opens it; processing that changes nothing is none."""
    told = {key: value for key, value in chosen(source).items() if key not in _PLACEMENT_FIELDS and value != {}}
    access = told.pop("store", {})
    return told | {key: access[key] for key in ("endpointUrl",) if key in access}


def cache_location(spec: ActivationCacheSpec, namespace: str) -> StoreLocation:
    """Where the cache's files lie: `<storage.uri>/<namespace>/<identity hash>`."""
    storage = spec.storage
    return StoreLocation(
        uri=f"{storage.uri.rstrip('/')}/{namespace}/{cache_identity(spec)}",
        endpoint_url=storage.endpoint_url,
        region=storage.region,
        secret_ref=storage.secret_ref,
    )


def inline_cache_name(spec: ActivationCacheSpec) -> str:
    """Name of the ActivationCache that an inline spec becomes: the same for all that ask for one data in one place."""
    storage = spec.storage
    place = {"identity": cache_identity(spec), "uri": storage.uri.rstrip("/"), "endpointUrl": storage.endpoint_url}
    return f"cache-{canonical_hash(place)}"


def cache_of(spec: SAETrainingJobSpec) -> ActivationCacheSpec | None:
    """The cache that a job describes: its inline one, or what a live source would be as a cache; None when the job
    points to one that is described elsewhere."""
    live = spec.activations.live
    if live is None:
        return spec.activations.cache
    place = live_location(spec)
    return ActivationCacheSpec(
        model=live.model,
        dataset=live.dataset,
        hooks=live.hooks,
        context_size=live.context_size,
        tokens=live.tokens,
        seed=live.seed,
        sampling=live.sampling,
        storage=CacheStorage(
            uri=place.uri,
            endpoint_url=place.endpoint_url,
            region=place.region,
            secret_ref=place.secret_ref,
            dtype=live.dtype,
            shard_bytes=live.buffer_bytes // LIVE_SHARDS_IN_BUFFER,
        ),
        run=spec.run,
    )


def live_location(spec: SAETrainingJobSpec) -> StoreLocation:
    """Where the contexts of a live source lie: `<output.uri>/activations`."""
    return spec.output.model_copy(update={"uri": f"{spec.output.uri.rstrip('/')}/activations"})


def training_identity(spec: SAETrainingJobSpec) -> str:
    """Hash of what determines a training job's results: a resource re-created with the same continues or adopts."""
    return canonical_hash(determining(spec))


def determining(spec: SAETrainingJobSpec) -> dict[str, Any]:
    """What determines a training job's results: parts of its spec by their names, a cache by its identity."""
    manifest = chosen(spec)
    # Where the data lies counts, not who opens it.
    activations = {key: value for key, value in manifest["activations"].items() if key not in ("region", "secretRef")}
    source = cache_of(spec)
    if source is not None:
        # An SAE without a hook is trained on the only one there is; hooks that no SAE is trained on do not count.
        trained = {sae.hook or source.hooks[0].key for sae in spec.saes}
        hooks = sorted(trained | {sae.target_hook for sae in spec.saes if sae.target_hook is not None})
        kind = "cache" if spec.activations.live is None else "live"
        activations = {kind: cache_identity(source), "hooks": hooks}
    training = {key: value for key, value in chosen(spec.training).items() if key != "tokens"}
    stop = {} if spec.median_stop is None else {"medianStop": chosen(spec.median_stop)}
    return {
        "activations": activations,
        "training": training,
        "saes": [_sae(sae) for sae in spec.saes],
        "normalization": spec.normalization,
        "evaluation": chosen(spec.evaluation),
        **stop,
    }


def _sae(sae: SaeSpec) -> dict[str, Any]:
    """An SAE with what comes of settings whose defaults depend on its type, however they are asked for; what is usual
    is left out."""
    weighted, decoder, encoder = sae.weights_penalty_by_decoder_norm, sae.decoder_start, sae.encoder_start
    start = {
        "decoder": None if decoder == "mixed" else decoder,
        "encoder": None if encoder == "scaled_transpose" else encoder,
    }
    initialization = Initialization() if sae.start_from is not None else sae.initialization.model_copy(update=start)
    settled = {
        "normalize_decoder": None if sae.normalizes_decoder else False,
        "architecture": sae.architecture.model_copy(
            update={"scale_sparsity_penalty_by_decoder_norm": True if weighted else None}
        ),
        "initialization": initialization,
    }
    return chosen(sae.model_copy(update=settled))
