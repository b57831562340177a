"""Identity of a cache and of a training job: what makes two of them the same data."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.base import ApiModel
from sae_operator.api.store import StoreLocation
from sae_operator.api.training_job import SAETrainingJobSpec

CACHE_FORMAT_VERSION = 1
# 64 bits: a collision among a million caches has probability 3e-8.
HASH_LENGTH = 16


def canonical_hash(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def chosen(model: ApiModel) -> dict[str, Any]:
    """What a manifest says beyond the defaults: a field that a later version adds leaves hashes as they are."""
    return model.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)


def cache_identity(spec: ActivationCacheSpec) -> str:
    """Hash of what determines a cache's rows: not of tokens, run settings, parallelism, location or credentials."""
    return canonical_hash(
        {
            "formatVersion": CACHE_FORMAT_VERSION,
            "model": chosen(spec.model),
            "dataset": chosen(spec.dataset),
            "hooks": [chosen(hook) for hook in spec.hooks],
            "contextSize": spec.context_size,
            "seed": spec.seed,
            "sampling": chosen(spec.sampling),
            "dtype": spec.storage.dtype,
            "shardBytes": spec.storage.shard_bytes,
        }
    )


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


def training_identity(spec: SAETrainingJobSpec) -> str:
    """Hash of what determines a training job's results: a resource re-created with the same continues or adopts."""
    manifest = chosen(spec)
    # Where the data lies counts, not who opens it.
    activations = {key: value for key, value in manifest["activations"].items() if key not in ("region", "secretRef")}
    if spec.activations.cache is not None:
        activations = {"cache": cache_identity(spec.activations.cache)}
    training = {key: value for key, value in chosen(spec.training).items() if key != "tokens"}
    return canonical_hash(
        {
            "activations": activations,
            "training": training,
            "saes": manifest["saes"],
            "normalization": spec.normalization,
            "evaluation": chosen(spec.evaluation),
        }
    )
