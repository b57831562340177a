"""Which parts of a planned cache are stored whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from sae_job.activations.codecs import Codec
from sae_job.activations.format import SHARDS_PREFIX, ShardLayout, layout_of_part, shard_key
from sae_job.activations.manifest import Sidecar, read_sidecar
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import CacheIndex

# Sidecars are small and many: what takes time is the way to the store.
READ_THREADS = 16
# Shards whose sidecars are in memory at a time: each has as many sums as its hooks are wide.
SHARDS_READ_AT_A_TIME = 64


class PartLayouts:
    """Layouts of the parts of a planned cache; nearly all are of full shards, and so the same.

    Args:
        index: the plan.
        codec: number format.
    """

    def __init__(self, index: CacheIndex, codec: Codec) -> None:
        self._widths = [index.group_widths(group) for group in range(len(index.groups))]
        self._codec = codec
        self._known: dict[tuple[int, int], ShardLayout] = {}

    def of(self, rows: int, group: int) -> ShardLayout:
        """Layout of a group's part of a shard of so many rows."""
        if (rows, group) not in self._known:
            self._known[rows, group] = layout_of_part(rows, self._widths[group], self._codec, group)
        return self._known[rows, group]


def proved_parts(
    store: ObjectStore, index: CacheIndex, layouts: PartLayouts, shards: Sequence[int]
) -> Iterator[list[Sidecar | None]]:
    """Sidecars of the parts of some shards, one shard after the other: those of all groups; None where a part is not
    stored whole, or is another one than the plan's. Memory does not grow with the number of shards.

    Raises:
        StoreError: the store cannot be read.
    """
    sizes = {info.key: info.size for info in store.list(SHARDS_PREFIX)}

    def of_shard(number: int) -> list[Sidecar | None]:
        rows = index.shards[number].rows
        found: list[Sidecar | None] = []
        for group in range(len(index.groups)):
            key = shard_key(number, rows, index.rows_per_shard, group)
            # A part without the one that tells its rows proves nothing.
            possible = key in sizes and (group == 0 or found[0] is not None)
            sidecar = read_sidecar(store, number, rows, index.rows_per_shard, group) if possible else None
            base = found[0] if group > 0 else None
            if sidecar is not None and (
                sidecar.bytes != sizes[key] or not sidecar.proves(layouts.of(rows, group), base)
            ):
                sidecar = None
            found.append(sidecar)
        return found

    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="sidecar") as threads:
        for start in range(0, len(shards), SHARDS_READ_AT_A_TIME):
            yield from threads.map(of_shard, shards[start : start + SHARDS_READ_AT_A_TIME])


def proved_groups(store: ObjectStore, index: CacheIndex, codec: Codec) -> set[int]:
    """Groups whose parts are stored whole for all shards of a plan that has shards.

    Raises:
        StoreError: the store cannot be read.
    """
    proved = set(range(len(index.groups))) if index.shards else set[int]()
    for sidecars in proved_parts(store, index, PartLayouts(index, codec), range(len(index.shards))):
        proved -= {group for group, sidecar in enumerate(sidecars) if sidecar is None}
        if not proved:
            break
    return proved
