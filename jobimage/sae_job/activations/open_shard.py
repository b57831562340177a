"""A shard that is being filled: its parts in one buffer, each row at its place in the file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sae_job.activations.format import (
    ALIGNMENT,
    KEEP,
    POSITION,
    SEQUENCE,
    TOKEN_IDS,
    ShardLayout,
)
from sae_job.activations.harvest import ContextBatch, HostBatch
from sae_job.activations.manifest import Sidecar
from sae_job.activations.mixing import seeded_generator


class OpenPart:
    """A group's part of a shard.

    Args:
        group: number of the group.
        rows: rows of the shard.
        layout: where its tensors lie.
        data: `layout.size` bytes.
    """

    def __init__(self, group: int, rows: int, layout: ShardLayout, data: np.ndarray) -> None:
        self.group = group
        self.layout = layout
        self._rows = rows
        self._data = data
        view = self.bytes
        view[: len(layout.header)] = layout.header
        self._tensors = {name: layout.tensor(view, name) for name in layout.tensors}

    @property
    def bytes(self) -> memoryview:
        """The part's file."""
        return self._data.data

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def put(self, name: str, places: np.ndarray, rows: torch.Tensor) -> None:
        """Write rows to their places. numpy copies an opaque item at a time, three times as fast as torch's
        index_copy_."""
        place = self.layout.tensors[name]
        row = np.dtype((np.void, place.bytes // self._rows))
        there = np.frombuffer(self._data, dtype=row, count=self._rows, offset=place.offset)
        there[places] = rows.contiguous().reshape(-1).view(torch.uint8).numpy().view(row)


class OpenShard:
    """A shard that is being filled: its rows are scattered to their places as they come.

    With a part of group 0 it takes the rows that pass the norm filter, in order, until it is full, to shuffled places.
    Without one it takes the rows that the stored part has, which come with their places.

    Args:
        number: index of the shard.
        rows: rows that it will hold.
        layouts: where they lie in each part, by group.
        buffer: at least `bytes_for(layouts)` bytes.
        seed: seed of the cache.
        base: sidecar of the stored part of group 0, when `layouts` has none.
    """

    def __init__(
        self,
        number: int,
        rows: int,
        layouts: Mapping[int, ShardLayout],
        buffer: np.ndarray,
        seed: int,
        *,
        base: Sidecar | None = None,
    ) -> None:
        self.number = number
        self.rows = rows
        self.buffer = buffer
        self.base = base
        self.filled = 0
        self.dropped = 0
        """Rows that the norm filter dropped before the shard was full; of group 0."""
        self.parts: dict[int, OpenPart] = {}
        start = 0
        for group, layout in sorted(layouts.items()):
            self.parts[group] = OpenPart(group, rows, layout, buffer[start : start + layout.size])
            start += _aligned(layout.size)
        self._places = places_of_rows(number, rows, seed)

    @staticmethod
    def bytes_for(layouts: Mapping[int, ShardLayout]) -> int:
        """Bytes of a buffer that holds parts of these layouts."""
        return sum(_aligned(layout.size) for layout in layouts.values())

    @property
    def full(self) -> bool:
        return self.filled == self.rows

    def add(self, batch: HostBatch) -> int:
        """Take the rows of a batch, until the shard is full; returns how many."""
        kept, places = self._choose(batch)
        count = len(places)
        if count == 0:
            return 0
        if 0 in self.parts:
            _put_row_fields(self.parts[0], batch.contexts, kept, places)
        for group, part in self.parts.items():
            if group > 0:
                below = batch.below.get(group)
                part.tensor(KEEP)[places] = 1 if below is None else below[kept].to(torch.uint8)
        for name, values in batch.rows.items():
            part = next((part for part in self.parts.values() if name in part.layout.tensors), None)
            if part is not None:
                chosen = values if count == len(values) else values.index_select(0, kept)
                part.put(name, places.numpy(), chosen)
        self.filled += count
        return count

    def _choose(self, batch: HostBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows of a batch to take, ascending, and their places, both int64 [n]."""
        count = len(batch.contexts.positions)
        if 0 not in self.parts:
            assert batch.contexts.places is not None, "rows that follow a stored part come with their places"
            return torch.arange(count), batch.contexts.places
        below = batch.below.get(0)
        passing = torch.arange(count) if below is None else torch.nonzero(below).flatten()
        kept = passing[: self.rows - self.filled]
        # Positions after the row that fills the shard are not looked at.
        fills = len(kept) == self.rows - self.filled
        seen = int(kept[-1]) + 1 if fills and len(kept) > 0 else (0 if fills else count)
        self.dropped += seen - len(kept)
        return kept, self._places[self.filled : self.filled + len(kept)]


def places_of_rows(number: int, rows: int, seed: int) -> torch.Tensor:
    """Places of a shard's rows in the order in which its contexts give them, int64 [rows]."""
    return torch.randperm(rows, generator=seeded_generator("shard", seed, number))


def _put_row_fields(part: OpenPart, contexts: ContextBatch, kept: torch.Tensor, places: torch.Tensor) -> None:
    flat = contexts.positions[kept]
    length = contexts.tokens.shape[1]
    part.tensor(TOKEN_IDS)[places] = contexts.tokens.reshape(-1)[flat].to(torch.int32)
    part.tensor(SEQUENCE)[places] = (contexts.first + flat // length).to(torch.int32)
    part.tensor(POSITION)[places] = (flat % length).to(torch.int32)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
