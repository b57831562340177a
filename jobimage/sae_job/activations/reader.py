"""Batches of mixed rows from a finished cache; what training reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sae_job.activations.first_rows import ShardRows, read_first_rows
from sae_job.activations.format import POSITION, SEQUENCE, STORAGE_DTYPES, TOKEN_IDS
from sae_job.activations.loading import ShardLoader, read_sequence
from sae_job.activations.manifest import CacheManifest, ShardEntry, read_manifest
from sae_job.activations.mixing import Phase, phase_labels, plan_epoch, row_order
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectStore

# Two shards of the default size; one where shards are larger.
READ_AHEAD_BYTES = 2**29
# Shards that are mixed by default: 8 of the default size. Of larger ones fewer, so that memory stays bounded.
MIX_SHARDS, FEWEST_MIX_SHARDS = 8, 2
MIX_BYTES = 2**31


def default_mix_shards(shard_bytes: int) -> int:
    """Shards that rows of one batch come from by default, for full shards of this size."""
    return max(FEWEST_MIX_SHARDS, min(MIX_SHARDS, MIX_BYTES // shard_bytes))


def default_read_ahead_bytes(shard_bytes: int) -> int:
    """Bytes of shards that are held before they are needed by default: at least one shard."""
    return max(READ_AHEAD_BYTES, shard_bytes)


def reader_memory_bytes(cache_bytes: int, shard_bytes: int) -> int:
    """Memory for shards that a reader takes by default, of a cache of so many bytes in shards of this size."""
    in_use = default_mix_shards(shard_bytes) * shard_bytes
    return min(cache_bytes, in_use + default_read_ahead_bytes(shard_bytes))


@dataclass(frozen=True)
class HeldOut:
    """Rows that are never trained on, in order of context and position.

    Attributes:
        activations: per hook [rows, d_in] in storage dtype.
        token_ids: int32 [rows].
        sequence: global index of the context, int32 [rows].
        position: position in the context, int32 [rows].
    """

    activations: dict[str, torch.Tensor]
    token_ids: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor


@dataclass(frozen=True)
class _RowSet:
    """Rows that an epoch is made of: the first `total` rows of the cache, without those that are held out.

    Attributes:
        total: rows, held-out ones included.
        shards: what they are read from.
        training: rows of each shard that are trained on.
        partly: shard -> places of rows that are trained on, of the one shard that holds contexts of both kinds.
    """

    total: int
    shards: list[ShardRows]
    training: list[int]
    partly: dict[int, torch.Tensor]

    def entry(self, shard: int) -> ShardEntry:
        return self.shards[shard].entry


@dataclass(frozen=True)
class _Place:
    """Where reading stands: rows `0` to `offset` of the phase are read."""

    epoch: int
    phase: int
    offset: int


def held_out_contexts_for(store: ObjectStore, manifest: CacheManifest, rows: int) -> int:
    """Smallest number of first contexts of a cache that hold at least `rows` rows; 0 when no rows are asked for.

    It is the same for a cache and for a longer one that extends it: a partial shard's rows come from the first
    contexts of the full one.

    Raises:
        InvalidInput: the cache has fewer rows, or a shard is damaged.
    """
    before = 0
    if rows <= 0:
        return 0
    for entry in manifest.shards:
        if before + entry.rows >= rows:
            return int(read_sequence(store, entry).sort().values[rows - before - 1]) + 1
        before += entry.rows
    raise InvalidInput(
        "TooFewRows",
        f"the cache has {before} rows, fewer than the {rows} to hold out: lower heldOutTokens, or raise the cache's "
        "tokens",
        field="spec.evaluation.heldOutTokens",
    )


class CachedActivations:
    """Endless batches of rows of a finished cache, mixed across shards, epoch after epoch.

    The order of rows is a pure function of the cache, the seed and the other arguments of `open`; threads and timing
    have no part in it. Memory: `mix_shards` shards in use, and `read_ahead_bytes` of shards before they are needed.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest: CacheManifest,
        *,
        hooks: Sequence[str],
        batch_size: int,
        seed: int,
        held_out_contexts: int,
        total_rows: int | None,
        read_ahead_bytes: int,
        mix_shards: int,
    ) -> None:
        self.manifest = manifest
        self._store = store
        self._hooks = [manifest.hook(name) for name in hooks]
        self._dtype = STORAGE_DTYPES[manifest.dtype]
        self._batch_size = batch_size
        self._seed = seed
        self._held_out_contexts = held_out_contexts
        self._mix_shards = mix_shards
        self._pin_memory = torch.cuda.is_available()
        self._all_rows = self._row_set(manifest.tokens if total_rows is None else min(total_rows, manifest.tokens))
        self.training_rows = sum(self._all_rows.training)
        if self.training_rows == 0:
            raise InvalidInput(
                "TooFewRows",
                f"no rows are left to train on: {held_out_contexts} contexts of {self._all_rows.total} rows are held "
                "out; lower heldOutTokens, or raise tokens",
                field="spec.evaluation.heldOutTokens",
            )
        self._loader = ShardLoader(
            store,
            largest_bytes=max(entry.bytes for entry in manifest.shards),
            read_ahead_bytes=read_ahead_bytes,
        )
        # Rows that the current epoch is made of: those of the epoch that was begun, when the cache has grown since.
        self._epoch_rows = self._all_rows
        self._phases = self._plan(0)
        self._place = _Place(0, 0, 0)
        self._labels: torch.Tensor | None = None
        self._cursors: list[int] = []
        self._orders: dict[int, torch.Tensor] = {}

    @classmethod
    def open(
        cls,
        store: ObjectStore,
        *,
        hooks: Sequence[str],
        batch_size: int,
        seed: int,
        held_out_contexts: int,
        total_rows: int | None = None,
        read_ahead_bytes: int | None = None,
        mix_shards: int | None = None,
    ) -> CachedActivations:
        """Open the finished cache in a folder.

        Args:
            store: the cache's folder.
            hooks: hooks to read.
            batch_size: rows per batch, at least 1.
            seed: seed of the order of rows.
            held_out_contexts: rows of the first so many contexts are never in a batch.
            total_rows: read the first so many rows of the cache only; all when None.
            read_ahead_bytes: bytes of shards that may be held before they are needed; None for the default.
            mix_shards: shards that rows of one batch come from; None for the default, which depends on the size of
                full shards.

        Raises:
            InvalidInput: no finished cache, an unknown hook, or no rows left to train on.
        """
        manifest = read_manifest(store)
        return cls(
            store,
            manifest,
            hooks=hooks,
            batch_size=batch_size,
            seed=seed,
            held_out_contexts=held_out_contexts,
            total_rows=total_rows,
            read_ahead_bytes=(
                default_read_ahead_bytes(manifest.shard_bytes) if read_ahead_bytes is None else read_ahead_bytes
            ),
            mix_shards=default_mix_shards(manifest.shard_bytes) if mix_shards is None else mix_shards,
        )

    @property
    def epoch(self) -> int:
        """The epoch that the next row belongs to, from 0."""
        return self._place.epoch

    def next_batch(self) -> dict[str, torch.Tensor]:
        """The next rows, [batch_size, d_in] per hook in storage dtype on the CPU (pinned where there is a GPU).

        Every batch is full: at the end of an epoch the rest comes from the next one. The tensors are the caller's.

        Raises:
            InvalidInput: a shard is missing or corrupt.
        """
        batch = {
            hook.name: torch.empty((self._batch_size, hook.d_in), dtype=self._dtype, pin_memory=self._pin_memory)
            for hook in self._hooks
        }
        done = 0
        while done < self._batch_size:
            done = self._take(batch, done)
        return batch

    def state(self) -> dict[str, Any]:
        """Where reading stands, as JSON; `restore` continues exactly there."""
        return {
            "epoch": self._place.epoch,
            "phase": self._place.phase,
            "offset": self._place.offset,
            "rows": self._epoch_rows.total,
            "seed": self._seed,
            "heldOutContexts": self._held_out_contexts,
            "mixShards": self._mix_shards,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state. When the cache has grown since, the epoch that was begun ends as it was planned.

        Raises:
            InvalidInput: the state belongs to another order of rows.
        """
        ours = self.state()
        for name in ("seed", "heldOutContexts", "mixShards"):
            if state[name] != ours[name]:
                raise InvalidInput(
                    "ReaderStateMismatch",
                    f"the checkpoint was reading with {name} {state[name]}, not {ours[name]}: use another output for "
                    "this run",
                )
        if state["rows"] > self.manifest.tokens:
            raise InvalidInput(
                "ReaderStateMismatch",
                f"the checkpoint was reading {state['rows']} rows, but the cache has {self.manifest.tokens}: use the "
                "same cache",
            )
        same = state["rows"] == self._all_rows.total
        self._epoch_rows = self._all_rows if same else self._row_set(state["rows"])
        self._phases = self._plan(state["epoch"])
        self._place = _Place(state["epoch"], state["phase"], state["offset"])
        self._labels = None
        self._orders = {}

    def held_out(self, max_rows: int) -> HeldOut:
        """The first `max_rows` rows of the held-out contexts, or all when there are fewer.

        Raises:
            InvalidInput: a shard is missing or corrupt.
        """
        parts: list[HeldOut] = []
        rows = 0
        for shard in self._all_rows.shards:
            if shard.entry.start >= self._held_out_contexts or rows >= max_rows:
                break
            part = self._held_out_of(shard.entry, max_rows - rows)
            rows += len(part.sequence)
            parts.append(part)
        # What was loaded for this is loaded again when training comes to it.
        self._labels = None
        self._loader.want((), ())
        return HeldOut(
            {
                hook.name: torch.cat(
                    [torch.empty((0, hook.d_in), dtype=self._dtype), *(part.activations[hook.name] for part in parts)]
                )
                for hook in self._hooks
            },
            *(
                torch.cat([torch.empty(0, dtype=torch.int32), *(getattr(part, name) for part in parts)])
                for name in ("token_ids", "sequence", "position")
            ),
        )

    def close(self) -> None:
        """Stop reading ahead and free the memory."""
        self._loader.close()

    def _held_out_of(self, entry: ShardEntry, max_rows: int) -> HeldOut:
        self._loader.want((entry,), ())
        shard = self._loader.get(entry)
        sequence, position = shard.tensor(SEQUENCE), shard.tensor(POSITION)
        rows = torch.nonzero(sequence < self._held_out_contexts).flatten()
        place = sequence[rows].long() * self.manifest.context_size + position[rows].long()
        rows = rows[torch.argsort(place)][:max_rows]
        return HeldOut(
            {hook.name: shard.tensor(hook.name)[rows] for hook in self._hooks},
            shard.tensor(TOKEN_IDS)[rows],
            sequence[rows],
            position[rows],
        )

    def _row_set(self, total: int) -> _RowSet:
        """The first `total` rows of the cache."""
        shards = read_first_rows(self._store, self.manifest, total)
        training: list[int] = []
        partly: dict[int, torch.Tensor] = {}
        for number, shard in enumerate(shards):
            count = shard.rows
            if shard.entry.start < self._held_out_contexts < shard.entry.stop:
                places = torch.nonzero(read_sequence(self._store, shard.entry) >= self._held_out_contexts).flatten()
                partly[number] = places
                count = int((places < count).sum())
            elif shard.entry.stop <= self._held_out_contexts:
                count = 0
            training.append(count)
        return _RowSet(total, shards, training, partly)

    def _plan(self, epoch: int) -> list[Phase]:
        return plan_epoch(self._epoch_rows.training, seed=self._seed, epoch=epoch, mix_shards=self._mix_shards)

    def _take(self, batch: dict[str, torch.Tensor], done: int) -> int:
        """Copy rows of the current phase into a batch that has `done` rows; returns how many it has then."""
        place = self._place
        if self._labels is None:
            self._labels = self._enter_phase()
        taken = self._labels[place.offset : place.offset + self._batch_size - done]
        segments = self._phases[place.phase].segments
        # Rows of one shard lie together in the batch: the order inside a batch means nothing to training.
        for number, count in enumerate(torch.bincount(taken, minlength=len(segments)).tolist()):
            if count == 0:
                continue
            segment, cursor = segments[number], self._cursors[number]
            rows = self._orders[segment.shard][cursor : cursor + count]
            shard = self._loader.get(self._epoch_rows.entry(segment.shard))
            for hook in self._hooks:
                torch.index_select(shard.tensor(hook.name), 0, rows, out=batch[hook.name][done : done + count])
            self._cursors[number] += count
            done += count
        self._advance(place.offset + len(taken))
        return done

    def _enter_phase(self) -> torch.Tensor:
        """Bring in the shards of the current phase and begin to read those that come after; returns the phase's
        labels."""
        place = self._place
        phase = self._phases[place.phase]
        shards = [segment.shard for segment in phase.segments]
        self._loader.want([self._epoch_rows.entry(shard) for shard in shards], self._later())
        self._orders = {shard: self._orders[shard] if shard in self._orders else self._order(shard) for shard in shards}
        labels = phase_labels(phase, seed=self._seed, epoch=place.epoch, number=place.phase)
        read = torch.bincount(labels[: place.offset], minlength=len(shards)).tolist()
        self._cursors = [segment.start + count for segment, count in zip(phase.segments, read, strict=True)]
        return labels

    def _order(self, shard: int) -> torch.Tensor:
        rows = self._epoch_rows
        order = row_order(rows.training[shard], seed=self._seed, epoch=self._place.epoch, shard=shard)
        return rows.partly[shard][order] if shard in rows.partly else order

    def _later(self) -> Iterator[ShardEntry]:
        """Shards in the order in which they are needed after the current phase, into the next epoch."""
        for phase in self._phases[self._place.phase + 1 :]:
            yield from (self._epoch_rows.entry(segment.shard) for segment in phase.segments)
        rows = self._all_rows
        upcoming = plan_epoch(rows.training, seed=self._seed, epoch=self._place.epoch + 1, mix_shards=self._mix_shards)
        for phase in upcoming:
            yield from (rows.entry(segment.shard) for segment in phase.segments)

    def _advance(self, offset: int) -> None:
        place = self._place
        if offset < self._phases[place.phase].rows:
            self._place = _Place(place.epoch, place.phase, offset)
            return
        self._labels = None
        if place.phase + 1 < len(self._phases):
            self._place = _Place(place.epoch, place.phase + 1, 0)
            return
        self._place = _Place(place.epoch + 1, 0, 0)
        self._epoch_rows = self._all_rows
        self._phases = self._plan(place.epoch + 1)
        self._orders = {}
