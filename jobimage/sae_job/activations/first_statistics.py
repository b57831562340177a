"""Statistics of the first rows of a cache: what they were when the cache ended there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sae_job.activations.first_rows import read_first_rows
from sae_job.activations.manifest import CacheManifest, HookStatistics, HookSums, Sidecar, read_sidecar
from sae_job.activations.statistics import merge_sums
from sae_job.storage.base import ObjectStore

logger = logging.getLogger(__name__)

# Sidecars are small and many: what takes time is the way to the store.
READ_THREADS = 16


def statistics_of_first_rows(
    store: ObjectStore, manifest: CacheManifest, total: int, *, hooks: Sequence[str]
) -> dict[str, HookStatistics]:
    """Statistics of hooks over the first `total` rows of a cache, whether or not it has been extended since.

    They come from the sidecars of the shards that these rows are read from. Where the rows end inside a shard and no
    partial one is stored, all of that shard counts.

    Args:
        store: the cache's folder.
        manifest: what the cache says of itself now.
        total: rows wanted.
        hooks: keys of hooks.

    Raises:
        StoreError: the store cannot be read.
    """
    whole = {hook: manifest.hook(hook) for hook in hooks}
    if total >= manifest.tokens:
        return whole
    shards = [(number, shard.entry.rows) for number, shard in enumerate(read_first_rows(store, manifest, total))]
    found: dict[str, list[tuple[int, HookSums]]] = {hook: [] for hook in hooks}

    def read(shard: tuple[int, int]) -> Sidecar | None:
        number, rows = shard
        return read_sidecar(store, number, rows, manifest.rows_per_shard)

    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="sidecar") as threads:
        sidecars = list(threads.map(read, shards))
    for sidecar in sidecars:
        if sidecar is None:
            logger.warning("%s lacks sidecars of shards: statistics are those of all its rows", store.uri)
            return whole
        for hook in hooks:
            found[hook].append((sidecar.rows, sidecar.hooks[hook]))
    return {hook: merge_sums(hook, sums) for hook, sums in found.items()}
