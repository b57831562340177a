"""Statistics of the first rows of a cache: what they were when the cache ended there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from sae_job.activations.first_rows import read_first_rows
from sae_job.activations.loading import ShardId
from sae_job.activations.manifest import CacheManifest, HookStatistics, Sidecar, read_sidecar
from sae_job.activations.statistics import HookTotals
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
    groups = {hook: statistics.group for hook, statistics in whole.items()}
    shards = [shard.shard for shard in read_first_rows(store, manifest, total, {0, *groups.values()})]
    totals = {hook: HookTotals(hook, group=groups[hook]) for hook in hooks}

    def read(shard: ShardId, group: int) -> Sidecar | None:
        return read_sidecar(store, shard.number, shard.rows, manifest.rows_per_shard, group)

    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="sidecar") as threads:
        for group in sorted(set(groups.values())):
            for sidecar in threads.map(partial(read, group=group), shards):
                if sidecar is None:
                    logger.warning("%s lacks sidecars of shards: statistics are those of all its rows", store.uri)
                    return whole
                for hook in hooks:
                    if groups[hook] == group:
                        totals[hook].add(sidecar.hooks[hook])
    return {hook: found.statistics() for hook, found in totals.items()}
