"""Activations of a model that runs beside the training: the batches of a cache that is never stored.

A shard is computed from its contexts when it is needed, in a background thread, by what a cache worker runs: its rows
are those that a cache of the same spec would store.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from sae_job.activations.batches import MixedRows
from sae_job.activations.codecs import Codec
from sae_job.activations.filling import ShardFiller
from sae_job.activations.first_rows import ShardRows
from sae_job.activations.format import ROW_FIELDS, layout_of_part
from sae_job.activations.gathering import ShardTensors
from sae_job.activations.harvest import ActivationModel
from sae_job.activations.loading import ShardId, within_bound
from sae_job.activations.manifest import HookStatistics
from sae_job.activations.open_shard import OpenShard, places_of_rows
from sae_job.activations.statistics import HookTotals, sums_of
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import CacheIndex, plan_shards
from sae_operator.api.activation_cache import ActivationCacheSpec

# Rows that the scale of activations is measured on: enough for three digits of a mean norm.
STATISTICS_ROWS = 2**16
# Shards that are mixed, and computed ahead: together those that a live source's memory is planned for.
MIX_SHARDS, SHARDS_AHEAD = 8, 2


class LiveSource:
    """A model and the contexts that it runs on: what a cache of the same spec would hold.

    Args:
        store: the live source's folder (`identity.live_location`), with the contexts that prepare stored.
        spec: what the live source would be as a cache (`identity.cache_of`).
        model: gives activations at all hooks of the spec, as for a cache worker.

    Attributes:
        index: the plan that prepare stored.
        spec: as given.

    Raises:
        InvalidInput: the folder holds no contexts, or none of their positions may become a row.
    """

    def __init__(self, store: ObjectStore, spec: ActivationCacheSpec, model: ActivationModel) -> None:
        index = CacheIndex.load(store)
        if index is None:
            raise InvalidInput("NotPrepared", f"{store.uri} holds no contexts: run the preflight step first")
        self.index = index
        self.spec = spec
        # Rows of each of the first contexts of a shard, as far as they are known.
        self._counts: dict[ShardId, list[int]] = {}
        # One forward pass at a time, beside the training's own work.
        self._lock = threading.RLock()
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        with self._running():
            self._filler = ShardFiller(store, index, spec, model, [0])

    @property
    def tokens(self) -> int:
        """Rows of one pass over the text, as `manifest.tokens` of a cache."""
        return self.index.tokens

    @property
    def codec(self) -> Codec:
        """How rows wait to be trained on."""
        return self._filler.encoding.codec

    def width(self, hook: str) -> int:
        """Width of a hook.

        Raises:
            InvalidInput: the spec has no such hook.
        """
        hooks = self.index.groups[0].hooks
        if hook not in hooks:
            raise InvalidInput(
                "HookNotFound",
                f"no activations of {hook!r} are computed; there are {', '.join(hooks)}",
                field="spec.saes",
            )
        return self.index.model.d_in[hook]

    def statistics(self, rows: int = STATISTICS_ROWS) -> list[HookStatistics]:
        """Measured statistics of every hook, over the first contexts that hold `rows` rows (or over all), held-out ones
        included. The same for every attempt: a function of contexts, model and device.

        Raises:
            InvalidInput: activations are not finite, or there are no rows.
        """
        hooks = self.index.groups[0].hooks
        medians = self._filler.encoding.filters[0].median_norms
        totals = {hook: HookTotals(hook) for hook in hooks}
        with self._running():
            for batch in self._filler.rows(0, self.index.shards[-1].stop if self.index.shards else 0):
                kept = batch.below.get(0)
                for hook in hooks:
                    found = sums_of(batch.rows[hook], hook, keep=kept, calibration_median_norm=medians.get(hook))
                    totals[hook].add(found)
                if totals[hooks[0]].rows >= rows:
                    break
        if totals[hooks[0]].rows == 0:
            raise InvalidInput("TooFewRows", "the text gives no rows", field="spec.activations.live.dataset")
        return [found.statistics() for found in totals.values()]

    def held_out_contexts(self, rows: int) -> int:
        """As `reader.held_out_contexts_for` of a cache: smallest number of first contexts that hold `rows` rows.

        Raises:
            InvalidInput: one pass has fewer rows.
        """
        if rows <= 0:
            return 0
        before = 0
        for number, plan in enumerate(self.index.shards):
            if before + plan.rows >= rows:
                counts = self._count_rows(ShardId(number, plan.rows), at_least=rows - before)
                return plan.start + int(np.searchsorted(np.cumsum(counts), rows - before)) + 1
            before += plan.rows
        raise InvalidInput(
            "TooFewRows",
            f"one pass over the text has {before} rows, fewer than the {rows} to hold out: lower heldOutTokens, or "
            "raise tokens",
            field="spec.evaluation.heldOutTokens",
        )

    def rows_before(self, shard: ShardId, context: int) -> int:
        """How many of a shard's rows come from contexts before this one (global index)."""
        contexts = context - self.index.shards[shard.number].start
        return min(sum(self._count_rows(shard, contexts=contexts)[:contexts]), shard.rows)

    def compute(
        self, shard: ShardId, hooks: Mapping[str, int], buffer: np.ndarray | None, cancelled: threading.Event
    ) -> OpenShard:
        """Rows of a shard, as a cache of these hooks would store them.

        Args:
            shard: the shard.
            hooks: width of each hook to keep.
            buffer: memory to use, if it is large enough.
            cancelled: ends the work early when it is set.

        Raises:
            CancelledError: ended early.
            InvalidInput: too few rows pass the norm filter, or the contexts are damaged.
        """
        layouts = {0: layout_of_part(shard.rows, hooks, self.codec)}
        size = OpenShard.bytes_for(layouts)
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, dtype=np.uint8)
        filled = OpenShard(shard.number, shard.rows, layouts, buffer, self.spec.seed)
        with self._running():
            for _ in self._filler.fill(filled, stop=self._stop_of(shard)):
                if cancelled.is_set():
                    raise CancelledError
        return filled

    def _stop_of(self, shard: ShardId) -> int:
        """The context after a shard's last one; of a partial shard that has grown since, as it was planned."""
        plan = self.index.shards[shard.number]
        if plan.rows == shard.rows:
            return plan.stop
        usable = self._filler.usable_counts(plan.start, plan.stop).numpy()
        partial = plan_shards(usable, shard.rows, self.spec, shard_rows=self.index.rows_per_shard).shards
        return plan.start + partial[0].stop if partial else plan.stop

    def _count_rows(self, shard: ShardId, *, at_least: int = 0, contexts: int = 0) -> list[int]:
        """Rows that each of a shard's first contexts gives: of `contexts`, and until there are `at_least`."""
        counts = self._counts.setdefault(shard, [])
        total = sum(counts)
        if len(counts) >= contexts and total >= at_least:
            return counts
        with self._running():
            # In the batches in which the shard is computed: results hang on them in the last bits.
            start = self.index.shards[shard.number].start + len(counts)
            for batch in self._filler.rows(start, self._stop_of(shard)):
                shape, below = batch.contexts.tokens.shape, batch.below.get(0)
                positions = batch.contexts.positions if below is None else batch.contexts.positions[below]
                found = torch.bincount(positions // shape[1], minlength=shape[0]).tolist()
                counts += found
                total += sum(found)
                if len(counts) >= contexts and total >= at_least:
                    break
        return counts

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Use the model alone, on a stream of its own."""
        with self._lock:
            if self._stream is None:
                yield
                return
            with torch.cuda.stream(self._stream):
                yield


@dataclass
class _Job:
    """A shard that is computed."""

    result: Future[OpenShard]
    cancelled: threading.Event
    tensors: ShardTensors | None = None


class ComputedShards:
    """Shards that a model computes in a background thread, one by one, and that are held while they are wanted.

    Args:
        source: what computes them.
        hooks: hooks whose rows are kept.
        shards_ahead: full shards' worth of memory for shards that are not needed yet.
    """

    def __init__(self, source: LiveSource, hooks: Sequence[str], *, shards_ahead: int) -> None:
        self._source = source
        self._hooks = {hook: source.width(hook) for hook in hooks}
        self._ahead_rows = shards_ahead * source.index.rows_per_shard
        self._jobs: dict[ShardId, _Job] = {}
        self._free: list[np.ndarray] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="live")

    @property
    def hooks(self) -> Mapping[str, int]:
        return self._hooks

    @property
    def codec(self) -> Codec:
        return self._source.codec

    @property
    def rows(self) -> int:
        return self._source.tokens

    @property
    def context_size(self) -> int:
        return self._source.index.context_size

    def first_rows(self, total: int) -> list[ShardRows]:
        """A cache of `total` rows ends with a partial shard, and so do these."""
        found: list[ShardRows] = []
        for number, plan in enumerate(self._source.index.shards):
            rows = min(plan.rows, total)
            if rows <= 0:
                break
            found.append(ShardRows(ShardId(number, rows), rows, plan.start, plan.stop))
            total -= rows
        return found

    def places_from(self, shard: ShardId, context: int) -> torch.Tensor:
        before = self._source.rows_before(shard, context)
        return places_of_rows(*shard, self._source.spec.seed)[before:].sort().values

    def row_fields(self, shard: ShardId) -> dict[str, torch.Tensor]:
        part = self._jobs[shard].result.result().parts[0]
        return {name: part.tensor(name) for name in ROW_FIELDS}

    def want(self, now: Iterable[ShardId], later: Iterable[ShardId]) -> None:
        wanted = within_bound(now, later, bytes_of=lambda shard: shard.rows, bound=self._ahead_rows)
        for shard in self._jobs.keys() - set(wanted):
            self._let_go(self._jobs.pop(shard))
        for shard in wanted:
            if shard not in self._jobs:
                cancelled = threading.Event()
                self._jobs[shard] = _Job(self._thread.submit(self._compute, shard, cancelled), cancelled)

    def get(self, shard: ShardId) -> ShardTensors:
        computed = self._jobs[shard]
        if computed.tensors is None:
            part = computed.result.result().parts[0]
            computed.tensors = ShardTensors({hook: {"": part.tensor(hook)} for hook in self._hooks})
        return computed.tensors

    def close(self) -> None:
        for job in self._jobs.values():
            job.cancelled.set()
        self._thread.shutdown(cancel_futures=True)
        self._jobs.clear()
        self._free.clear()

    def _compute(self, shard: ShardId, cancelled: threading.Event) -> OpenShard:
        # Only this thread takes memory, so nobody else takes it in between.
        buffer = self._free.pop() if self._free else None
        return self._source.compute(shard, self._hooks, buffer, cancelled)

    def _let_go(self, job: _Job) -> None:
        if job.result.cancel():
            return
        job.cancelled.set()
        # What is still being computed ends soon, and its memory goes with it.
        if job.result.done() and job.result.exception() is None:
            self._free.append(job.result.result().buffer)


class LiveActivations(MixedRows):
    """Endless batches of rows that a model computes in a background thread: the members of `CachedActivations`.

    Given the same mixing and seed, batches, held-out rows and state are those of a cache of the same spec. A restored
    stream computes the shards of the current phase again. What goes wrong in the background is raised by `next_batch`.

    Memory: `mix_shards + SHARDS_AHEAD` shards of `spec.storage.shard_bytes`. Of several processes each computes all
    shards.
    """

    @classmethod
    def open(
        cls,
        source: LiveSource,
        *,
        hooks: Sequence[str],
        batch_size: int,
        seed: int,
        held_out_contexts: int,
        total_rows: int | None = None,
        mix_shards: int = MIX_SHARDS,
        device: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> LiveActivations:
        """Arguments as of `CachedActivations.open`.

        Raises:
            InvalidInput: the spec has no such hook, or no rows are left to train on.
        """
        return cls(
            ComputedShards(source, hooks, shards_ahead=SHARDS_AHEAD),
            batch_size=batch_size,
            seed=seed,
            held_out_contexts=held_out_contexts,
            total_rows=total_rows,
            mix_shards=mix_shards,
            device=device,
            rank=rank,
            world_size=world_size,
        )
