"""A finished cache written by hand: hooks in groups, rows that later groups leave out, any number format."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from sae_job.activations.codecs import CODECS
from sae_job.activations.format import HEADER, KEEP, MANIFEST_KEY, layout_of_part, shard_key
from sae_job.activations.manifest import CacheManifest, HookStatistics, PartEntry, ShardEntry
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import HookGroup

CONTEXT_SIZE = 4


@dataclass(frozen=True)
class GroupedCache:
    """What was written.

    Attributes:
        manifest: the manifest that is stored.
        rows: hook -> all rows of the cache as they are read back, [rows, d_in], in the order of shards and places.
    """

    manifest: CacheManifest
    rows: dict[str, torch.Tensor]


def write_grouped_cache(
    store: ObjectStore,
    groups: Sequence[Mapping[str, int]],
    *,
    dtype: str = "float32",
    shards: Sequence[int] = (40, 40, 40, 24),
    left_out: Mapping[int, Collection[int]] | None = None,
) -> GroupedCache:
    """Write shards and manifest; rows lie in the order of their contexts.

    Args:
        store: the cache's folder.
        groups: width of each hook, group by group.
        dtype: as in `storage.dtype`.
        shards: rows of each shard; a full one comes first.
        left_out: later group -> numbers of the rows that it does not keep.
    """
    codec, bounds = CODECS[dtype], [0]
    rows: dict[str, list[torch.Tensor]] = {hook: [] for hooks in groups for hook in hooks}
    entries: list[ShardEntry] = []
    for number, count in enumerate(shards):
        start, stop = bounds[-1], bounds[-1] + count
        bounds.append(stop)
        parts: list[PartEntry] = []
        for group, hooks in enumerate(groups):
            layout = layout_of_part(count, hooks, codec, group)
            data = bytearray(layout.size)
            data[: len(layout.header)] = layout.header
            tensors = {name: layout.tensor(memoryview(data), name) for name in layout.tensors}
            place = torch.arange(start, stop)
            if group == 0:
                tensors["token_ids"].copy_(place % 50)
                tensors["sequence"].copy_(place // CONTEXT_SIZE)
                tensors["position"].copy_(place % CONTEXT_SIZE)
            else:
                dropped = torch.tensor(sorted((left_out or {}).get(group, ())), dtype=torch.int64)
                tensors[KEEP].copy_(~torch.isin(place, dropped))
            for hook, width in hooks.items():
                values = torch.randn(count, width, generator=torch.Generator().manual_seed(100 * number + width))
                values = 3 + values * torch.arange(1, width + 1)
                constants = codec.calibrate(values)
                encoded = codec.encode(values, constants)
                for suffix, tensor in (constants | encoded).items():
                    tensors[hook + suffix].copy_(tensor)
                rows[hook].append(codec.decode(encoded, constants))
            key = shard_key(number, count, shards[0], group)
            store.put(key, data)
            parts.append(
                PartEntry(
                    key=key,
                    bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                    crc32={
                        HEADER: layout.header_crc32,
                        **{
                            name: f"{zlib.crc32(memoryview(data)[place.offset : place.offset + place.bytes]):08x}"
                            for name, place in layout.tensors.items()
                        },
                    },
                )
            )
        entries.append(ShardEntry(rows=count, start=start // CONTEXT_SIZE, stop=-(-stop // CONTEXT_SIZE), parts=parts))
    total = bounds[-1]
    statistics = [
        HookStatistics(
            name=hook,
            d_in=width,
            rows=total - len((left_out or {}).get(group, ())),
            mean=[0.0] * width,
            mean_norm=1.0,
            mean_squared_norm=1.0,
            group=group,
        )
        for group, hooks in enumerate(groups)
        for hook, width in hooks.items()
    ]
    manifest = CacheManifest(
        format_version=1,
        identity="0123456789abcdef",
        spec={},
        model={"name": "made-up", "revision": None},
        dataset={"path": "made-up"},
        tokenizer={},
        seed=0,
        dtype=dtype,
        context_size=CONTEXT_SIZE,
        tokens=total,
        bytes=sum(part.bytes for entry in entries for part in entry.parts),
        rows_per_shard=shards[0],
        groups=[HookGroup(hooks=list(hooks)) for hooks in groups],
        hooks=statistics,
        shards=entries,
        software=[],
        device=["cpu"],
    )
    store.put(MANIFEST_KEY, manifest.to_bytes())
    return GroupedCache(manifest, {hook: torch.cat(parts) for hook, parts in rows.items()})
