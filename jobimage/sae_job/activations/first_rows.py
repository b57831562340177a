"""The first rows of a cache: the objects they are read from, which stay the same when the cache is extended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sae_job.activations.format import shard_key
from sae_job.activations.manifest import CacheManifest, ShardEntry, Sidecar, stored_sidecar
from sae_job.storage.base import ObjectStore

StoredPart = Callable[[int, int], Sidecar | None]


@dataclass(frozen=True)
class ShardRows:
    """The first `rows` rows of a shard's object, in the order in which they lie there."""

    entry: ShardEntry
    rows: int


def first_rows(manifest: CacheManifest, total: int, stored_part: StoredPart) -> list[ShardRows]:
    """What the first `total` rows of a cache are read from, shard by shard; all when the cache has fewer.

    Where they end inside a shard of the manifest, a cache of `total` rows has a partial shard instead, with rows of
    the first of the same contexts. If it is stored it is read, so that the rows are those that were read before the
    cache was extended; if not, the first rows of the shard in the manifest, which come from all of its contexts.

    Args:
        manifest: what the cache says of itself now.
        total: rows wanted.
        stored_part: sidecar of the partial shard with this number and row count, None when it is not stored whole.
    """
    found: list[ShardRows] = []
    for number, entry in enumerate(manifest.shards):
        rows = min(entry.rows, total)
        if rows <= 0:
            break
        part = stored_part(number, rows) if rows < entry.rows else None
        found.append(ShardRows(entry if part is None else _part_of(manifest, entry, part), rows))
        total -= rows
    return found


def read_first_rows(store: ObjectStore, manifest: CacheManifest, total: int) -> list[ShardRows]:
    """`first_rows` with the partial shards that the cache's folder holds.

    Raises:
        StoreError: the store cannot be read.
    """
    return first_rows(
        manifest, total, lambda number, rows: stored_sidecar(store, number, rows, manifest.rows_per_shard)
    )


def _part_of(manifest: CacheManifest, entry: ShardEntry, part: Sidecar) -> ShardEntry:
    """A partial shard that the manifest does not list. Its contexts are the first of those of the shard in its
    place."""
    return ShardEntry(
        key=shard_key(part.shard, part.rows, manifest.rows_per_shard),
        rows=part.rows,
        bytes=part.bytes,
        sha256=part.sha256,
        crc32=part.crc32,
        start=entry.start,
        stop=entry.stop,
    )
