"""A finished cache to which a hook was added later: its rows are those of the first hooks, and some are not kept."""

from __future__ import annotations

import hashlib
import zlib

import torch

from sae_job.activations.format import (
    HEADER,
    KEEP,
    MANIFEST_KEY,
    POSITION,
    SEQUENCE,
    layout_of_part,
    shard_key,
    sidecar_key,
)
from sae_job.activations.manifest import CacheManifest, HookSums, PartEntry, Sidecar
from sae_job.activations.statistics import merge_sums, sums_of
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import HookGroup


def add_group(store: ObjectStore, manifest: CacheManifest, hook: str, d_in: int, *, drop_every: int) -> CacheManifest:
    """Add a hook of made-up rows as the next group; every so-manieth row of a shard is not to be kept.

    The cache must be stored in a plain format.
    """
    group, codec = len(manifest.groups), manifest.codec
    entries, sums = [], list[HookSums]()
    for number, entry in enumerate(manifest.shards):
        layout = layout_of_part(entry.rows, {hook: d_in}, codec, group)
        data = bytearray(layout.size)
        view = memoryview(data)
        view[: len(layout.header)] = layout.header
        keep, rows = layout.tensor(view, KEEP), layout.tensor(view, hook)
        keep.copy_(torch.arange(entry.rows) % drop_every != 0)
        rows.copy_(torch.randn(entry.rows, d_in, generator=torch.Generator().manual_seed(number)))
        sums.append(sums_of(rows, hook, keep=keep))
        crc32 = {
            name: f"{zlib.crc32(view[place.offset : place.offset + place.bytes]):08x}"
            for name, place in layout.tensors.items()
        }
        part = PartEntry(
            key=shard_key(number, entry.rows, manifest.rows_per_shard, group),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            crc32=crc32 | {HEADER: layout.header_crc32},
        )
        sidecar = Sidecar(
            shard=number,
            group=group,
            rows=entry.rows,
            bytes=part.bytes,
            sha256=part.sha256,
            crc32=part.crc32,
            hooks={hook: sums[-1]},
            dropped=0,
            software={},
            device="cpu",
            follows=f"{entry.parts[0].crc32[SEQUENCE]}-{entry.parts[0].crc32[POSITION]}",
        )
        store.put(part.key, data)
        store.put(sidecar_key(part.key), sidecar.to_bytes())
        entries.append(entry.model_copy(update={"parts": [*entry.parts, part]}))
    statistics = merge_sums(hook, sums, group=group)
    longer = manifest.model_copy(
        update={
            "groups": [*manifest.groups, HookGroup(hooks=[hook])],
            "hooks": [*manifest.hooks, statistics],
            "shards": entries,
            "bytes": sum(part.bytes for entry in entries for part in entry.parts),
        }
    )
    store.put(MANIFEST_KEY, longer.to_bytes())
    return longer
