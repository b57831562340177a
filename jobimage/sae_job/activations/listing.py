"""The caches below a prefix, and taking them away: only what has our marker, in an order that may be interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any, TypeVar

from sae_job.activations.format import MANIFEST_KEY, SHARDS_PREFIX
from sae_job.activations.manifest import parse_manifest
from sae_job.activations.marker import CACHE_KIND, MARKER_KEY, check_is_cache, folder_of, is_ours, read_marker
from sae_job.activations.usage import last_use
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectInfo, ObjectNotFound, ObjectStore
from sae_job.storage.folder import StoreFolder
from sae_job.text.plan import INDEX_KEY, CacheIndex

# Requests are small and many: what takes time is the way to the store.
THREADS = 16

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class FoundCache:
    """A cache below a prefix.

    Attributes:
        store: its folder.
        identity: hash of what determines its rows.
        objects: how many of our objects it holds.
        bytes: their size.
        last_used: when it was written or read, to a day; None where the store does not tell.
    """

    store: ObjectStore
    identity: str
    objects: int
    bytes: int
    last_used: datetime | None

    @property
    def uri(self) -> str:
        return self.store.uri

    def unused_for(self, limit: timedelta, now: datetime) -> bool:
        """Whether its last use is known, and longer ago than `limit`: a cache that is being built never is."""
        return self.last_used is not None and now - self.last_used > limit


@dataclass(frozen=True)
class CacheSummary:
    """What a cache is, in a line.

    Attributes:
        state: `Finished`, `Unfinished` (no manifest), `Empty` (no plan either), or `Damaged`.
        model: the model's name.
        hooks: keys of the hooks.
        rows: rows that are stored, or planned where it is unfinished.
    """

    cache: FoundCache
    state: str
    model: str
    hooks: list[str]
    rows: int | None

    def to_json(self) -> dict[str, Any]:
        used = self.cache.last_used
        return {
            "uri": self.cache.uri,
            "identity": self.cache.identity,
            "state": self.state,
            "model": self.model,
            "hooks": self.hooks,
            "rows": self.rows,
            "bytes": self.cache.bytes,
            "objects": self.cache.objects,
            "lastUsed": None if used is None else used.isoformat(timespec="seconds"),
        }


def find_caches(store: ObjectStore) -> list[FoundCache]:
    """The caches in a store's prefix, itself included, in the order of their URIs.

    Raises:
        StoreError: the store cannot be read.
    """
    found: dict[str, _Sums] = {}
    marked: set[str] = set()
    for info in store.list():
        folder = folder_of(info.key)
        if folder is None:
            continue
        found.setdefault(folder, _Sums()).add(info)
        if info.key == folder + MARKER_KEY:
            marked.add(folder)
    return [
        cache for cache in _in_parallel(lambda folder: _look(store, folder, found[folder]), sorted(marked)) if cache
    ]


def summarize(caches: Sequence[FoundCache]) -> list[CacheSummary]:
    """What these caches are, from their manifests or plans."""
    return _in_parallel(_summary, caches)


@dataclass(frozen=True)
class Removal:
    """What taking a cache away means.

    Attributes:
        cache: the cache.
        keys: our objects, in the order in which they go: the manifest first, so that no half of a cache looks
            complete; the marker last, so that an interrupted removal can be continued.
        left: objects in the folder that are not ours, and stay.
    """

    cache: FoundCache
    keys: list[str]
    left: list[str]


def plan_removal(store: ObjectStore) -> Removal:
    """What taking away the cache in this folder means; nothing is deleted.

    Raises:
        InvalidInput: the folder does not carry the marker of a cache.
    """
    marker = check_is_cache(store)
    objects = list(store.list())
    ours = [info for info in objects if is_ours(info.key)]
    cache = FoundCache(store, marker.identity, len(ours), sum(info.size for info in ours), last_use(ours))
    keys = sorted((info.key for info in ours), key=_removal_order)
    return Removal(cache, keys, [info.key for info in objects if not is_ours(info.key)])


def remove(removal: Removal, *, progress: Callable[[int], None] = lambda done: None) -> None:
    """Delete the objects of a removal; `progress` is told how many are gone.

    Raises:
        StoreError: the store failed; what is left still carries the marker.
    """
    done = 0
    lock = threading.Lock()

    def delete(key: str) -> None:
        nonlocal done
        removal.cache.store.delete(key)
        with lock:
            done += 1
            progress(done)

    for _, stage in groupby(removal.keys, key=lambda key: _removal_order(key)[0]):
        _in_parallel(delete, stage)


def _removal_order(key: str) -> tuple[int, str]:
    """Stage of a key, and the key. What proves a file goes before it."""
    if key == MANIFEST_KEY:
        stage = 0
    elif key == INDEX_KEY:
        stage = 1
    elif key == MARKER_KEY:
        stage = 9
    elif key.startswith(SHARDS_PREFIX):
        stage = 2 if key.endswith(".json") else 3
    elif key.startswith("tokens/"):
        stage = 4 if key.endswith(".json") else 5
    else:
        stage = 6
    return stage, key


class _Sums:
    """Objects of one folder, added up as they are listed."""

    def __init__(self) -> None:
        self.objects = 0
        self.bytes = 0
        self.newest: ObjectInfo | None = None
        self.all_dated = True

    def add(self, info: ObjectInfo) -> None:
        self.objects += 1
        self.bytes += info.size
        if info.modified is None:
            self.all_dated = False
        elif self.newest is None or self.newest.modified is None or info.modified > self.newest.modified:
            self.newest = info

    @property
    def last_used(self) -> datetime | None:
        return self.newest.modified if self.newest is not None and self.all_dated else None


def _look(store: ObjectStore, folder: str, sums: _Sums) -> FoundCache | None:
    inside = StoreFolder(store, folder)
    marker = read_marker(inside)
    if marker is None or marker.kind != CACHE_KIND:
        return None
    return FoundCache(inside, marker.identity, sums.objects, sums.bytes, sums.last_used)


def _summary(cache: FoundCache) -> CacheSummary:
    try:
        manifest = parse_manifest(cache.store.get(MANIFEST_KEY), cache.uri)
    except ObjectNotFound:
        return _unfinished(cache)
    except InvalidInput:
        return CacheSummary(cache, "Damaged", "", [], None)
    hooks = [hook.name for hook in manifest.hooks]
    return CacheSummary(cache, "Finished", str(manifest.model.get("name", "")), hooks, manifest.tokens)


def _unfinished(cache: FoundCache) -> CacheSummary:
    try:
        index = CacheIndex.load(cache.store)
    except InvalidInput:
        return CacheSummary(cache, "Damaged", "", [], None)
    if index is None:
        return CacheSummary(cache, "Empty", "", [], None)
    return CacheSummary(cache, "Unfinished", index.model.name, list(index.model.d_in), index.tokens)


def _in_parallel(work: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
    with ThreadPoolExecutor(THREADS, thread_name_prefix="cache-admin") as threads:
        return list(threads.map(work, items))
