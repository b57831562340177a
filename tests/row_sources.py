"""Shards of rows in memory, for tests of mixing: each row is its own number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from sae_job.activations.batches import MixedRows
from sae_job.activations.codecs import CODECS, Codec
from sae_job.activations.first_rows import ShardRows
from sae_job.activations.gathering import ShardTensors
from sae_job.activations.loading import ShardId

HOOK = "row"
CONTEXT_SIZE = 4


class NumberedRows:
    """Shards whose rows are 0, 1, 2, … through all shards; each context has the next `context_size` rows.

    Args:
        shards: rows of each shard.
        left_out: rows that must not be given out.
        context_size: rows of a context.

    Attributes:
        wanted: what was asked for, in order: the shards to hold, and those to prepare.
    """

    def __init__(
        self, shards: Sequence[int], *, left_out: Iterable[int] = (), context_size: int = CONTEXT_SIZE
    ) -> None:
        self._bounds = [0]
        for rows in shards:
            self._bounds.append(self._bounds[-1] + rows)
        self._left_out = torch.tensor(sorted(left_out), dtype=torch.int64)
        self._context_size = context_size
        self._held: set[ShardId] = set()
        self.wanted: list[tuple[list[int], list[int]]] = []

    @property
    def hooks(self) -> Mapping[str, int]:
        return {HOOK: 1}

    @property
    def codec(self) -> Codec:
        return CODECS["float32"]

    @property
    def rows(self) -> int:
        return self._bounds[-1]

    @property
    def context_size(self) -> int:
        return self._context_size

    def first_rows(self, total: int) -> list[ShardRows]:
        bounds = zip(self._bounds, self._bounds[1:], strict=False)
        return [
            ShardRows(
                ShardId(number, stop - start),
                min(stop, total) - start,
                start // self._context_size,
                -(-stop // self._context_size),
            )
            for number, (start, stop) in enumerate(bounds)
            if start < total and stop > start
        ]

    def places_from(self, shard: ShardId, context: int) -> torch.Tensor:
        return torch.nonzero(self._rows(shard) // self._context_size >= context).flatten()

    def row_fields(self, shard: ShardId) -> dict[str, torch.Tensor]:
        assert shard in self._held, "only what is wanted is held"
        rows, size = self._rows(shard).int(), self._context_size
        return {"token_ids": rows, "sequence": rows // size, "position": rows % size}

    def want(self, now: Iterable[ShardId], later: Iterable[ShardId]) -> None:
        self._held = set(now)
        ahead = [shard.number for shard, _ in zip(later, range(3), strict=False)]
        self.wanted.append((sorted(shard.number for shard in self._held), ahead))

    def get(self, shard: ShardId) -> ShardTensors:
        assert shard in self._held, "only what is wanted is held"
        rows = self._rows(shard)
        kept = ~torch.isin(rows, self._left_out)
        return ShardTensors({HOOK: {"": rows.float()[:, None]}}, kept=None if bool(kept.all()) else kept.numpy())

    def close(self) -> None:
        self._held = set()

    def _rows(self, shard: ShardId) -> torch.Tensor:
        return torch.arange(self._bounds[shard.number], self._bounds[shard.number + 1])


def open_numbered(
    source: NumberedRows,
    *,
    batch_size: int,
    seed: int = 0,
    held_out_contexts: int = 0,
    total_rows: int | None = None,
    mix_shards: int = 3,
    rank: int = 0,
    world_size: int = 1,
) -> MixedRows:
    return MixedRows(
        source,
        batch_size=batch_size,
        seed=seed,
        held_out_contexts=held_out_contexts,
        total_rows=total_rows,
        mix_shards=mix_shards,
        rank=rank,
        world_size=world_size,
    )


def numbers(stream: MixedRows, batches: int = 1) -> list[int]:
    """Numbers of the rows of the next batches."""
    return [int(row) for _ in range(batches) for row in stream.next_batch()[HOOK].flatten()]
