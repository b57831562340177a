"""Full batches of mixed rows, epoch after epoch, from shards that are read or computed: what training sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from sae_job.activations.codecs import Codec
from sae_job.activations.first_rows import ShardRows
from sae_job.activations.format import POSITION, SEQUENCE, TOKEN_IDS
from sae_job.activations.gathering import Batch, BatchMemory, ShardTensors
from sae_job.activations.loading import ShardId
from sae_job.activations.mixing import EpochPlan, Phase, phase_labels, row_order
from sae_job.errors import InvalidInput


@dataclass(frozen=True)
class HeldOut:
    """Rows that are never trained on, in order of context and position.

    Attributes:
        activations: per hook [rows, d_in], on the CPU: in storage dtype, float32 where that is an 8-bit one.
        token_ids: int32 [rows].
        sequence: global index of the context, int32 [rows].
        position: position in the context, int32 [rows].
    """

    activations: dict[str, torch.Tensor]
    token_ids: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor


class RowSource(Protocol):
    """Shards of rows, held in memory ahead of need."""

    @property
    def hooks(self) -> Mapping[str, int]:
        """Width of each hook that is given out."""
        ...

    @property
    def codec(self) -> Codec:
        """How rows lie in `get`."""
        ...

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        ...

    @property
    def context_size(self) -> int: ...

    def first_rows(self, total: int) -> list[ShardRows]:
        """What the first `total` rows are taken from."""
        ...

    def places_from(self, shard: ShardId, context: int) -> torch.Tensor:
        """Places of a shard's rows that come from `context` (global index) or later ones, int64, ascending.

        Raises:
            InvalidInput: the shard is missing or corrupt.
        """
        ...

    def row_fields(self, shard: ShardId) -> dict[str, torch.Tensor]:
        """`token_ids`, `sequence`, `position` of the rows of a shard that is held, int32 [rows] each.

        Raises:
            InvalidInput: it is corrupt.
        """
        ...

    def want(self, now: Iterable[ShardId], later: Iterable[ShardId]) -> None:
        """Hold the shards `now`, prepare those of `later`, in order, as far as memory allows, and let others go."""
        ...

    def get(self, shard: ShardId) -> ShardTensors:
        """A shard that `want` asked for; waits until it is there, and raises what went wrong with it."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class _RowSet:
    """Rows that an epoch is made of: the first `total` rows of the source, without those that are held out.

    Attributes:
        total: rows, held-out ones included.
        shards: what they are taken from.
        training: rows of each shard that are trained on.
        partly: shard -> places of rows that are trained on, of the one shard that holds contexts of both kinds.
    """

    total: int
    shards: list[ShardRows]
    training: list[int]
    partly: dict[int, torch.Tensor]

    def ids(self, phase: Phase) -> list[ShardId]:
        return [self.shards[segment.shard].shard for segment in phase.segments]


@dataclass(frozen=True)
class _Place:
    """Where reading stands: rows `0` to `offset` of the phase are read."""

    epoch: int
    phase: int
    offset: int


class MixedRows:
    """Endless batches of rows, mixed across shards, epoch after epoch.

    The order of rows is a pure function of the source, the seed and the other arguments; threads and timing have no
    part in it. Of `world_size` processes each is given every `world_size`-th row of the batches of
    `batch_size * world_size` rows that one process would read: their batches are disjoint, and together they are
    that larger batch. Rows of a batch come from all shards that are mixed, so every process loads all shards.

    Args:
        source: the shards.
        batch_size: rows of a batch of this process, at least 1.
        seed: seed of the order of rows.
        held_out_contexts: rows of the first so many contexts are never in a batch.
        total_rows: read the first so many rows only; all when None.
        mix_shards: shards that rows of one batch come from, at least 1.
        device: where rows of 8-bit formats are decoded, when it is a GPU; others stay on the CPU.
        rank: number of this process among those that share the rows.
        world_size: how many processes share the rows.

    Raises:
        InvalidInput: no rows are left to train on.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        batch_size: int,
        seed: int,
        held_out_contexts: int,
        total_rows: int | None,
        mix_shards: int,
        device: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes")
        self._source = source
        self._batch_size = batch_size
        self._seed = seed
        self._held_out_contexts = held_out_contexts
        self._mix_shards = mix_shards
        self._device = device
        self._memory = BatchMemory()
        self._rank, self._world_size = rank, world_size
        self._all_rows = self._row_set(source.rows if total_rows is None else min(total_rows, source.rows))
        if self.training_rows == 0:
            raise InvalidInput(
                "TooFewRows",
                f"no rows are left to train on: {held_out_contexts} contexts of {self._all_rows.total} rows are held "
                "out; lower heldOutTokens, or raise tokens",
                field="spec.evaluation.heldOutTokens",
            )
        # Rows that the current epoch is made of: those of the epoch that was begun, when there are more since.
        self._epoch_rows = self._all_rows
        self._phases = self._plan(0)
        self._place = _Place(0, 0, 0)
        self._phase = self._phases[0]
        # Arrays of numpy: see `Batch.add`.
        self._labels: np.ndarray | None = None
        self._cursors: list[int] = []
        self._orders: dict[int, np.ndarray] = {}

    @property
    def training_rows(self) -> int:
        """Rows of one epoch, of all processes together. Those that a hook's norm ratio leaves out count, although
        they are never given out: how many they are is known only when they are read."""
        return sum(self._all_rows.training)

    @property
    def epoch(self) -> int:
        """The epoch that the next row belongs to, from 0."""
        return self._place.epoch

    def next_batch(self) -> dict[str, torch.Tensor]:
        """The next rows, [batch_size, d_in] per hook: in storage dtype on the CPU (pinned where there is a GPU), or,
        where storage is 8-bit, decoded to float32, on the device if that is a GPU.

        Every batch is full: at the end of an epoch the rest comes from the next one. The tensors are the caller's.

        Raises:
            InvalidInput: a shard is missing or corrupt, or the norm ratio leaves out every row.
            StoreError: the store cannot be read.
        """
        batch = self._batch(self._batch_size, self._memory)
        done, begun = 0, self._place.epoch
        while done < self._batch_size * self._world_size:
            done = self._take(batch, done)
            if done == 0 and self._place.epoch > begun + 1:
                raise InvalidInput(
                    "TooFewRows",
                    f"no row is within the norm ratio of all of {', '.join(self._source.hooks)}: train them in "
                    "separate jobs",
                    field="spec.saes",
                )
        return batch.decoded(self._device)

    def next_places(self) -> list[tuple[int, int]]:
        """Shard and row in it of every row of the next batch, to tell where one came from; reading does not move on.

        Raises:
            as `next_batch`.
        """
        here, places = self.state(), []
        batch, done = self._batch(self._batch_size, self._memory), 0
        while done < self._batch_size * self._world_size:
            done = self._take(batch, done, places)
        self.restore(here)
        return places

    def state(self) -> dict[str, Any]:
        """Where reading stands, as JSON; `restore` continues exactly there, in any number of processes."""
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
        """Continue from a state, mixing as many shards as it did. When rows were added since, the epoch that was begun
        ends as it was planned.

        Raises:
            InvalidInput: the state belongs to another order of rows.
        """
        ours = self.state()
        for name in ("seed", "heldOutContexts"):
            if state[name] != ours[name]:
                raise InvalidInput(
                    "ReaderStateMismatch",
                    f"the checkpoint was reading with {name} {state[name]}, not {ours[name]}: use another output for "
                    "this run",
                )
        if state["rows"] > self._source.rows:
            raise InvalidInput(
                "ReaderStateMismatch",
                f"the checkpoint was reading {state['rows']} rows, but there are {self._source.rows}: use the same "
                "activations",
            )
        self._mix_shards = state["mixShards"]
        same = state["rows"] == self._all_rows.total
        self._epoch_rows = self._all_rows if same else self._row_set(state["rows"])
        self._phases = self._plan(state["epoch"])
        self._go_to(_Place(state["epoch"], state["phase"], state["offset"]))
        self._orders = {}

    def held_out(self, max_rows: int) -> HeldOut:
        """The first `max_rows` rows of the held-out contexts, or all when there are fewer.

        Raises:
            InvalidInput: a shard is missing or corrupt.
        """
        parts: list[HeldOut] = []
        rows, once = 0, BatchMemory(reused=False)
        for shard in self._all_rows.shards:
            if shard.start >= self._held_out_contexts or rows >= max_rows:
                break
            part = self._held_out_of(shard.shard, max_rows - rows, once)
            rows += len(part.sequence)
            parts.append(part)
        # What was held for this is wanted again when training comes to it.
        self._labels = None
        self._source.want((), ())
        none = self._batch(0, once).decoded(None)
        return HeldOut(
            {hook: torch.cat([empty, *(part.activations[hook] for part in parts)]) for hook, empty in none.items()},
            *(
                torch.cat([torch.empty(0, dtype=torch.int32), *(getattr(part, name) for part in parts)])
                for name in (TOKEN_IDS, SEQUENCE, POSITION)
            ),
        )

    def close(self) -> None:
        """Stop reading ahead and free the memory."""
        self._source.close()

    def _batch(self, rows: int, memory: BatchMemory) -> Batch:
        return Batch(self._source.hooks, self._source.codec, rows, memory)

    def _held_out_of(self, shard: ShardId, max_rows: int, memory: BatchMemory) -> HeldOut:
        self._source.want((shard,), ())
        tensors = self._source.get(shard)
        fields = self._source.row_fields(shard)
        sequence, position = fields[SEQUENCE], fields[POSITION]
        held_out = sequence < self._held_out_contexts
        if tensors.kept is not None:
            held_out &= torch.from_numpy(tensors.kept)
        rows = torch.nonzero(held_out).flatten()
        place = sequence[rows].long() * self._source.context_size + position[rows].long()
        rows = rows[torch.argsort(place)][:max_rows]
        batch = self._batch(len(rows), memory)
        batch.add(tensors, rows.numpy())
        return HeldOut(batch.decoded(None), fields[TOKEN_IDS][rows], sequence[rows], position[rows])

    def _row_set(self, total: int) -> _RowSet:
        """The first `total` rows."""
        shards = self._source.first_rows(total)
        training: list[int] = []
        partly: dict[int, torch.Tensor] = {}
        for number, shard in enumerate(shards):
            count = shard.rows
            if shard.start < self._held_out_contexts < shard.stop:
                places = self._source.places_from(shard.shard, self._held_out_contexts)
                partly[number] = places[places < count]
                count = len(partly[number])
            elif shard.stop <= self._held_out_contexts:
                count = 0
            training.append(count)
        return _RowSet(total, shards, training, partly)

    def _plan(self, epoch: int) -> EpochPlan:
        return EpochPlan(self._epoch_rows.training, seed=self._seed, epoch=epoch, mix_shards=self._mix_shards)

    def _take(self, batch: Batch, done: int, places: list[tuple[int, int]] | None = None) -> int:
        """Copy rows of the current phase into a batch of which all processes have `done` rows; returns how many they
        have then. Shard and row of each are appended to `places`."""
        place = self._place
        if self._labels is None:
            self._labels = self._enter_phase()
        taken = self._labels[place.offset : place.offset + self._batch_size * self._world_size - done]
        segments = self._phase.segments
        # Rows of one shard lie together in the batch: the order inside a batch means nothing to training.
        for number, count in enumerate(np.bincount(taken, minlength=len(segments)).tolist()):
            if count == 0:
                continue
            shard, cursor = segments[number].shard, self._cursors[number]
            rows = self._orders[shard][cursor : cursor + count]
            tensors = self._source.get(self._epoch_rows.shards[shard].shard)
            if tensors.kept is not None:
                rows = rows[tensors.kept[rows]]
            mine = rows[(self._rank - done) % self._world_size :: self._world_size]
            batch.add(tensors, mine)
            if places is not None:
                number = self._epoch_rows.shards[shard].shard.number
                places += [(number, row) for row in mine.tolist()]
            self._cursors[number] += count
            done += len(rows)
        self._advance(place.offset + len(taken))
        return done

    def _enter_phase(self) -> np.ndarray:
        """Bring in the shards of the current phase and begin with those that come after; returns the phase's labels."""
        place = self._place
        shards = [segment.shard for segment in self._phase.segments]
        self._source.want(self._epoch_rows.ids(self._phase), self._later())
        self._orders = {shard: self._orders[shard] if shard in self._orders else self._order(shard) for shard in shards}
        labels = phase_labels(self._phase, seed=self._seed, epoch=place.epoch, number=place.phase).numpy()
        read = np.bincount(labels[: place.offset], minlength=len(shards)).tolist()
        self._cursors = [segment.start + count for segment, count in zip(self._phase.segments, read, strict=True)]
        return labels

    def _order(self, shard: int) -> np.ndarray:
        rows = self._epoch_rows
        order = row_order(rows.training[shard], seed=self._seed, epoch=self._place.epoch, shard=shard)
        return (rows.partly[shard][order] if shard in rows.partly else order).numpy()

    def _later(self) -> Iterator[ShardId]:
        """Shards in the order in which they are needed after the current phase, into the next epoch."""
        for shard in self._phases.shards_after(self._place.phase):
            yield self._epoch_rows.shards[shard].shard
        rows = self._all_rows
        upcoming = EpochPlan(rows.training, seed=self._seed, epoch=self._place.epoch + 1, mix_shards=self._mix_shards)
        for shard in upcoming.shards_after(-1):
            yield rows.shards[shard].shard

    def _advance(self, offset: int) -> None:
        epoch, phase = self._place.epoch, self._place.phase
        if offset < self._phase.rows:
            self._place = _Place(epoch, phase, offset)
            return
        # Phases may be empty, but not all of an epoch.
        for number in range(phase + 1, len(self._phases)):
            if self._phases[number].rows > 0:
                self._go_to(_Place(epoch, number, 0))
                return
        self._epoch_rows = self._all_rows
        self._phases = self._plan(epoch + 1)
        first = next(number for number in range(len(self._phases)) if self._phases[number].rows > 0)
        self._go_to(_Place(epoch + 1, first, 0))
        self._orders = {}

    def _go_to(self, place: _Place) -> None:
        self._place = place
        self._phase = self._phases[place.phase]
        self._labels = None
