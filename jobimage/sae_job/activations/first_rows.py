"""The first rows of a cache: the objects they are read from, which stay the same when the cache is extended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from sae_job.activations.format import layout_of_part, shard_key
from sae_job.activations.loading import ShardId
from sae_job.activations.manifest import CacheManifest, PartEntry, ShardEntry, Sidecar, stored_sidecar
from sae_job.storage.base import ObjectStore

StoredPart = Callable[[int, int, int], Sidecar | None]


@dataclass(frozen=True)
class ShardRows:
    """The first `rows` rows of a shard, in the order in which they lie there.

    Attributes:
        shard: the shard.
        rows: how many of its rows are taken.
        start: first context (global index) that the shard's rows come from.
        stop: the context after the last one.
        parts: group -> the object that holds its hooks; empty where nothing is stored.
    """

    shard: ShardId
    rows: int
    start: int
    stop: int
    parts: Mapping[int, PartEntry] = field(default_factory=dict)


def first_rows(
    manifest: CacheManifest, total: int, groups: Collection[int], stored_part: StoredPart
) -> list[ShardRows]:
    """What the first `total` rows of a cache are read from, shard by shard; all when the cache has fewer.

    Where they end inside a shard of the manifest, a cache of `total` rows has a partial shard instead, with rows of
    the first of the same contexts. If it is stored it is read, so that the rows are those that were read before the
    cache was extended; if not, the first rows of the shard in the manifest, which come from all of its contexts.

    Args:
        manifest: what the cache says of itself now.
        total: rows wanted.
        groups: groups of the hooks that are read; group 0 is always needed, since it tells where rows come from.
        stored_part: sidecar of a group's part of the partial shard with this number and row count, None when it is not
            stored whole.
    """
    found: list[ShardRows] = []
    for number, entry in enumerate(manifest.shards):
        rows = min(entry.rows, total)
        if rows <= 0:
            break
        partial = _partial_shard(manifest, number, rows, entry, groups, stored_part) if rows < entry.rows else None
        found.append(partial or _listed(number, rows, entry))
        total -= rows
    return found


def read_first_rows(
    store: ObjectStore, manifest: CacheManifest, total: int, groups: Collection[int] = (0,)
) -> list[ShardRows]:
    """`first_rows` with the partial shards that the cache's folder holds.

    Raises:
        StoreError: the store cannot be read.
    """

    def stored_part(number: int, rows: int, group: int) -> Sidecar | None:
        return stored_sidecar(store, number, rows, manifest.rows_per_shard, group)

    return first_rows(manifest, total, groups, stored_part)


def _listed(number: int, rows: int, entry: ShardEntry) -> ShardRows:
    parts = dict(enumerate(entry.parts))
    return ShardRows(ShardId(number, entry.rows), rows, entry.start, entry.stop, parts)


def _partial_shard(
    manifest: CacheManifest,
    number: int,
    rows: int,
    entry: ShardEntry,
    groups: Collection[int],
    stored_part: StoredPart,
) -> ShardRows | None:
    """A partial shard that the manifest does not list; None unless the parts of all groups are stored, with the same
    rows. Its contexts are the first of those of the shard in its place."""
    parts: dict[int, PartEntry] = {}
    base: Sidecar | None = None
    for group in sorted({0, *groups}):
        sidecar = stored_part(number, rows, group)
        layout = layout_of_part(rows, manifest.group_widths(group), manifest.codec, group)
        if sidecar is None or not sidecar.proves(layout, base):
            return None
        base = base or sidecar
        key = shard_key(number, rows, manifest.rows_per_shard, group)
        parts[group] = PartEntry(key=key, bytes=sidecar.bytes, sha256=sidecar.sha256, crc32=sidecar.crc32)
    return ShardRows(ShardId(number, rows), rows, entry.start, entry.stop, parts)
