"""The check of a whole cache: all parts, the sidecars, the manifest, the contexts, and what nothing lists."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from sae_job.activations.contexts import ContextReader
from sae_job.activations.format import (
    MANIFEST_KEY,
    sidecar_key,
)
from sae_job.activations.manifest import (
    CacheManifest,
    HookStatistics,
    HookSums,
    parse_manifest,
)
from sae_job.activations.marker import LAST_USED_KEY, MARKER_KEY, MIRROR_PREFIX, is_ours, read_marker
from sae_job.activations.parts_to_check import parts_of_manifest, parts_of_plan, parts_of_shorter_caches
from sae_job.activations.statistics import HookTotals
from sae_job.activations.verify_part import RELATIVE_TOLERANCE, PartFindings, PartToCheck, check_part
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore
from sae_job.text.blocks import read_block
from sae_job.text.plan import INDEX_KEY, CacheIndex, block_key, block_sidecar_key

# Of one shard each: memory is this many shards.
THREADS = 2
_AGAIN = "raise the cache's spec.retry (or run it again)"
_MEND_PART = f"delete it and its .json, and {_AGAIN} to write it again"
_MEND_MANIFEST = f"delete it, and {_AGAIN} to write it again from the sidecars"


@dataclass(frozen=True)
class Problem:
    """Damage: which object, of which shard, what is wrong, and what mends it."""

    uri: str
    shard: int | None
    what: str
    fix: str

    def __str__(self) -> str:
        where = self.uri if self.shard is None else f"shard {self.shard}: {self.uri}"
        return f"{where} {self.what}; {self.fix}"

    def to_json(self) -> dict[str, Any]:
        return {"uri": self.uri, "shard": self.shard, "problem": self.what, "fix": self.fix}


@dataclass
class Verification:
    """What a check found.

    Attributes:
        uri: the cache's folder.
        finished: whether it has a manifest; of an unfinished one, what is stored so far is checked.
        rows: rows of the parts that were checked.
        bytes: bytes of these parts.
        parts: how many they were.
        blocks: blocks of contexts that were checked.
        problems: what is damaged, in the order of the shards.
        orphans: objects that nothing lists; no damage.
    """

    uri: str
    finished: bool = False
    rows: int = 0
    bytes: int = 0
    parts: int = 0
    blocks: int = 0
    problems: list[Problem] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "uri": self.uri,
            "finished": self.finished,
            "sound": not self.problems,
            "rows": self.rows,
            "bytes": self.bytes,
            "parts": self.parts,
            "blocks": self.blocks,
            "problems": [problem.to_json() for problem in self.problems],
            "orphans": self.orphans,
        }


def verify_cache(
    store: ObjectStore,
    *,
    statistics: bool = True,
    threads: int = THREADS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Read all of a cache and compare it with what it says of itself. Memory: one part for each thread.

    Args:
        store: the cache's folder.
        statistics: compute the statistics of all rows anew, too.
        threads: parts that are checked at the same time.
        progress: told how many bytes of how many are read.

    Raises:
        InvalidInput: there is no cache.
        StoreError: the store cannot be read.
    """
    return _Check(store, statistics=statistics, threads=threads, progress=progress).run()


class _Count:
    """What the parts of a hook have, beside what the manifest tells of it.

    Attributes:
        told: by the manifest.
        totals: of the parts' rows.
        medians: what each part's sidecar tells of the calibration; of one that is missing nothing.
    """

    def __init__(self, told: HookStatistics) -> None:
        self.told = told
        self.totals = HookTotals(told.name, group=told.group)
        self.medians: list[tuple[PartToCheck, float]] = []

    def add(self, check: PartToCheck, sums: HookSums) -> None:
        if sums.calibration_median_norm is not None:
            self.medians.append((check, sums.calibration_median_norm))
        # It cannot be counted: sidecars alone tell it, and may tell it differently.
        self.totals.add(sums.model_copy(update={"calibration_median_norm": None}))


class _Check:
    def __init__(
        self, store: ObjectStore, *, statistics: bool, threads: int, progress: Callable[[int, int], None]
    ) -> None:
        self._store = store
        self._statistics = statistics
        self._threads = threads
        self._progress = progress
        self._sizes = {info.key: info.size for info in store.list()}
        self._found = Verification(store.uri)
        self._lock = threading.Lock()
        self._done = 0
        self._total = 0

    def run(self) -> Verification:
        manifest = self._read_manifest()
        index = self._read_index()
        if manifest is None and index is None and not self._found.problems and MARKER_KEY not in self._sizes:
            raise InvalidInput(
                "CacheNotFound", f"{self._store.uri} holds no cache: it has neither {MANIFEST_KEY} nor {INDEX_KEY}"
            )
        self._found.finished = manifest is not None
        contexts = self._check_blocks(index)
        shorter: list[PartToCheck] = []
        if manifest is not None:
            checks = parts_of_manifest(manifest)
            shorter = parts_of_shorter_caches(self._store, self._sizes, manifest)
            self._check_manifest(manifest, index)
        else:
            checks = [] if index is None else self._stored_parts(index)
        counts = {} if manifest is None else {hook.name: _Count(hook) for hook in manifest.hooks}
        self._total = sum(check.part.bytes for check in checks + shorter)
        self._progress(0, self._total)
        self._check_parts(checks, contexts, counts)
        self._check_parts(shorter, contexts, {})
        if manifest is not None and self._statistics:
            for count in counts.values():
                self._check_statistics(count, len(manifest.shards))
        self._found.parts = len(checks)
        self._found.rows = sum(check.entry.rows for check in checks if check.group == 0)
        self._found.bytes = sum(check.part.bytes for check in checks)
        self._found.orphans = sorted(
            key
            for key in self._sizes.keys() - self._listed(checks + shorter, index)
            if not (key.startswith(MIRROR_PREFIX) and is_ours(key))
        )
        return self._found

    def _tell(self, key: str, what: str, fix: str, *, shard: int | None = None) -> None:
        self._found.problems.append(Problem(f"{self._store.uri}/{key}", shard, what, fix))

    def _read_manifest(self) -> CacheManifest | None:
        try:
            return parse_manifest(self._store.get(MANIFEST_KEY), self._store.uri)
        except ObjectNotFound:
            return None
        except InvalidInput as error:
            if error.reason != "CorruptManifest":
                raise
            self._tell(MANIFEST_KEY, "is damaged", _MEND_MANIFEST)
            return None

    def _read_index(self) -> CacheIndex | None:
        try:
            return CacheIndex.load(self._store)
        except InvalidInput:
            self._tell(INDEX_KEY, "is damaged", f"delete it, and {_AGAIN} to plan the cache again")
            return None

    def _check_blocks(self, index: CacheIndex | None) -> ContextReader | None:
        """Check the contexts; gives what reads them, where all are sound."""
        if index is None:
            return None
        sound = True
        for number, block in enumerate(index.blocks):
            fix = f"delete {block_sidecar_key(number)}, and {_AGAIN} to make it again"
            try:
                contexts = read_block(self._store, number, sha256=block.sha256)
            except InvalidInput as error:
                sound = False
                what = "is missing" if error.reason == "BlockMissing" else "differs from its SHA-256 in the index"
                self._tell(block_key(number), what, fix)
                continue
            self._found.blocks += 1
            if tuple(contexts.shape) != (block.contexts, index.context_size):
                sound = False
                told = f"[{block.contexts}, {index.context_size}]"
                self._tell(block_key(number), f"holds {list(contexts.shape)} tokens instead of {told}", fix)
        return ContextReader(self._store, index) if sound else None

    def _stored_parts(self, index: CacheIndex) -> list[PartToCheck]:
        stored, unreadable = parts_of_plan(self._store, self._sizes, index)
        for key, shard, what in unreadable:
            self._tell(key, what, _MEND_PART, shard=shard)
        return stored

    def _check_parts(
        self, checks: list[PartToCheck], contexts: ContextReader | None, counts: Mapping[str, _Count]
    ) -> None:
        """Tell what is wrong with parts, and count the sums of their hooks."""
        reading = threading.Lock()

        def read_contexts(start: int, stop: int) -> torch.Tensor:
            assert contexts is not None
            # It keeps a block from one call to the next.
            with reading:
                return contexts.read(start, stop)

        def work(check: PartToCheck) -> PartFindings:
            return check_part(
                self._store,
                check,
                self._sizes.get(check.part.key),
                statistics=self._statistics,
                read_contexts=None if contexts is None else read_contexts,
                progress=self._advance,
            )

        with ThreadPoolExecutor(self._threads, thread_name_prefix="verify") as threads:
            for check, found in zip(checks, threads.map(work, checks), strict=True):
                for key, what in found.problems:
                    self._tell(key, what, _MEND_PART, shard=check.shard)
                for hook, sums in found.sums.items():
                    if hook in counts:
                        counts[hook].add(check, sums)

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress(self._done, self._total)

    def _check_manifest(self, manifest: CacheManifest, index: CacheIndex | None) -> None:
        """The manifest agrees with itself, with the plan and with the marker."""
        fix = _MEND_MANIFEST
        for name, told, counted in (
            ("tokens", manifest.tokens, sum(entry.rows for entry in manifest.shards)),
            ("bytes", manifest.bytes, sum(part.bytes for entry in manifest.shards for part in entry.parts)),
        ):
            if told != counted:
                self._tell(MANIFEST_KEY, f"tells {told} {name}, its shards have {counted}", fix)
        stop = 0
        for number, entry in enumerate(manifest.shards):
            if entry.start < stop or entry.stop < entry.start:
                self._tell(MANIFEST_KEY, "lists contexts of the shard that other shards have, too", fix, shard=number)
            stop = max(stop, entry.stop)
        marker = read_marker(self._store)
        if marker is not None and marker.identity != manifest.identity:
            self._tell(
                MARKER_KEY,
                f"is of the cache {marker.identity}, the manifest of {manifest.identity}",
                "the folder mixes two caches: remove it, and cache again",
            )
        if index is None:
            return
        planned = [(plan.rows, plan.start, plan.stop) for plan in index.shards]
        listed = [(entry.rows, entry.start, entry.stop) for entry in manifest.shards]
        # While a cache is extended, the plan is ahead of the manifest; its last shard may have been partial.
        ahead = len(planned) >= len(listed) and planned[: len(listed) - 1] == listed[:-1]
        if not ahead:
            self._tell(INDEX_KEY, "plans other shards than the manifest lists", f"delete {MANIFEST_KEY}, and {_AGAIN}")

    def _check_statistics(self, count: _Count, shards: int) -> None:
        """The manifest's statistics of a hook are those of the rows."""
        hook = count.told
        medians = {median for _, median in count.medians}
        if len(medians) == 1 and medians != {hook.calibration_median_norm}:
            what = f"tells another median norm of {hook.name} than all sidecars"
            self._tell(MANIFEST_KEY, what, _MEND_MANIFEST)
        elif len(medians) > 1:
            what = f"tells another median norm of {hook.name} than the manifest"
            for check, median in count.medians:
                if median != hook.calibration_median_norm:
                    self._tell(sidecar_key(check.part.key), what, _MEND_PART, shard=check.shard)
        # Of a damaged part there are no sums, which is told already.
        if count.totals.shards == shards and not _statistics_agree(hook, count.totals.statistics()):
            self._tell(MANIFEST_KEY, f"tells other statistics of {hook.name} than its rows have", _MEND_MANIFEST)

    def _listed(self, checks: list[PartToCheck], index: CacheIndex | None) -> set[str]:
        keys = {MARKER_KEY, MANIFEST_KEY, INDEX_KEY, LAST_USED_KEY}
        for check in checks:
            keys |= {check.part.key, sidecar_key(check.part.key)}
        for number in range(0 if index is None else len(index.blocks)):
            keys |= {block_key(number), block_sidecar_key(number)}
        return keys


def _statistics_agree(told: HookStatistics, counted: HookStatistics) -> bool:
    """Whether statistics are of the same rows, to what another order of summation changes."""
    return (
        told.rows == counted.rows
        and len(told.mean) == len(counted.mean)
        and all(
            abs(a - b) <= RELATIVE_TOLERANCE * counted.mean_norm for a, b in zip(told.mean, counted.mean, strict=True)
        )
        and math.isclose(told.mean_norm, counted.mean_norm, rel_tol=RELATIVE_TOLERANCE)
        and math.isclose(told.mean_squared_norm, counted.mean_squared_norm, rel_tol=RELATIVE_TOLERANCE)
    )
