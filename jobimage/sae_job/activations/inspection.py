"""What a cache is and where it came from, from its manifest, or from its plan while it is unfinished."""

from __future__ import annotations

import math
from typing import Any

import torch

from sae_job.activations.format import (
    MANIFEST_KEY,
    POSITION,
    ROW_FIELDS,
    SEQUENCE,
    SHARDS_PREFIX,
    TOKEN_IDS,
    TensorPlace,
)
from sae_job.activations.manifest import CacheManifest, parse_manifest, read_manifest
from sae_job.activations.marker import read_marker
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore
from sae_job.text.plan import INDEX_KEY, CacheIndex


def inspect_cache(store: ObjectStore) -> dict[str, Any]:
    """Facts of the cache in a folder, as JSON: size, hooks with their norms, and provenance.

    Raises:
        InvalidInput: there is no cache, or what it says of itself is damaged.
    """
    try:
        manifest = parse_manifest(store.get(MANIFEST_KEY), store.uri)
    except ObjectNotFound:
        return _of_plan(store)
    return _of_manifest(store, manifest)


def first_stored_rows(store: ObjectStore, count: int) -> list[dict[str, Any]]:
    """The first rows of a finished cache, as they lie in its first shard: context, position, token id, and the norm at
    each hook. Read without checksums: no more than these rows.

    Raises:
        InvalidInput: there is no finished cache, or its first shard is missing.
    """
    manifest = read_manifest(store)
    entry = manifest.shards[0]
    count = min(count, entry.rows)
    layout = manifest.layout(entry, 0)
    fields = {name: _first(store, entry.parts[0].key, layout.tensors[name], count) for name in ROW_FIELDS}
    norms: dict[str, torch.Tensor] = {}
    for hook in manifest.hooks:
        group = manifest.group_of(hook.name)
        layout, key = manifest.layout(entry, group), entry.parts[group].key
        rows = {
            suffix: _first(store, key, layout.tensors[hook.name + suffix], count)
            for suffix, _, _ in manifest.codec.row_tensors(hook.d_in)
        }
        constants = {
            suffix: _first(store, key, layout.tensors[hook.name + suffix], hook.d_in)
            for suffix, _, _ in manifest.codec.constants(hook.d_in)
        }
        norms[hook.name] = torch.linalg.vector_norm(manifest.codec.decode(rows, constants).float(), dim=1)
    return [
        {
            "context": int(fields[SEQUENCE][row]),
            "position": int(fields[POSITION][row]),
            "tokenId": int(fields[TOKEN_IDS][row]),
            "norms": {hook: float(values[row]) for hook, values in norms.items()},
        }
        for row in range(count)
    ]


def _first(store: ObjectStore, key: str, place: TensorPlace, count: int) -> torch.Tensor:
    """The first items of a tensor's first dimension."""
    shape = (count, *place.shape[1:])
    data = bytearray(math.prod(shape) * place.dtype.itemsize)
    try:
        there = store.read_into(key, place.offset, memoryview(data))
    except ObjectNotFound:
        there = -1
    if there < len(data):
        raise InvalidInput(
            "CorruptShard", f"{store.uri}/{key} is missing or cut: `sae-job cache verify {store.uri}` tells more"
        )
    return torch.frombuffer(data, dtype=place.dtype).view(shape)


def _of_manifest(store: ObjectStore, manifest: CacheManifest) -> dict[str, Any]:
    spec = manifest.spec
    return {
        "uri": store.uri,
        "state": "Finished",
        "identity": manifest.identity,
        "formatVersion": manifest.format_version,
        "rows": manifest.tokens,
        "bytes": manifest.bytes,
        "bytesPerRow": manifest.bytes / manifest.tokens,
        "dtype": manifest.dtype,
        "shards": len(manifest.shards),
        "rowsPerShard": manifest.rows_per_shard,
        "contextSize": manifest.context_size,
        "seed": manifest.seed,
        "hooks": [
            {
                "name": hook.name,
                "dIn": hook.d_in,
                "group": manifest.group_of(hook.name),
                "rows": hook.rows,
                "meanNorm": hook.mean_norm,
                "rmsNorm": hook.mean_squared_norm**0.5,
                "medianNorm": hook.calibration_median_norm,
            }
            for hook in manifest.hooks
        ],
        "model": {key: value for key, value in manifest.model.items() if key != "dIn"}
        | {key: value for key, value in spec.get("model", {}).items() if key not in ("name", "revision")},
        "dataset": manifest.dataset,
        "tokenizer": manifest.tokenizer,
        "sampling": spec.get("sampling", {}),
        "software": manifest.software,
        "devices": manifest.device,
    }


def _of_plan(store: ObjectStore) -> dict[str, Any]:
    index = CacheIndex.load(store)
    if index is None:
        if read_marker(store) is None:
            raise InvalidInput(
                "CacheNotFound",
                f"{store.uri} holds no cache: it has neither {MANIFEST_KEY} nor {INDEX_KEY}; "
                "`sae-job cache ls URI` shows the caches below a prefix",
            )
        return {"uri": store.uri, "state": "Empty"}
    stored = {info.key: info.size for info in store.list(SHARDS_PREFIX)}
    raw = index.model_dump(mode="json", by_alias=True)
    return {
        "uri": store.uri,
        "state": "Unfinished",
        "rows": index.tokens,
        "bytes": sum(stored.values()),
        "shards": len(index.shards),
        "storedParts": sum(key.endswith(".json") for key in stored),
        "rowsPerShard": index.rows_per_shard,
        "contextSize": index.context_size,
        "hooks": [{"name": name, "dIn": d_in} for name, d_in in index.model.d_in.items()],
        "model": {key: value for key, value in raw["model"].items() if key != "dIn"},
        "dataset": raw["dataset"],
        "tokenizer": raw["tokenizer"],
    }
