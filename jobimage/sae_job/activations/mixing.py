"""The order in which rows are read: a pure function of the shards' row counts and the seed.

An epoch visits the shards in a random order. Of any shard only a part is read at a time: it is cut into `mix_shards`
segments, and segment j of the shard at place p of the order is read in phase p + j, shuffled together with the segments
of the shards before and after it. So a phase mixes `mix_shards` shards, one shard enters and one leaves from phase to
phase, every shard is loaded once an epoch, and at most `mix_shards` are held. The phases at both ends, which would mix
few shards, are joined into one each. When all shards can be held, the epoch is one phase.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch


def seeded_generator(*parts: object) -> torch.Generator:
    """A generator seeded by these parts: different parts give unrelated streams."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    # torch takes 64 bits; the sign bit is left out.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of a shard's order in one epoch."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Phase:
    """Segments that are shuffled together."""

    segments: tuple[Segment, ...]

    @property
    def rows(self) -> int:
        return sum(segment.stop - segment.start for segment in self.segments)


class EpochPlan:
    """Phases of one epoch, made when they are looked at; every row of every shard is in exactly one segment.

    Of shards that hold fewer rows than `mix_shards`, phases may be empty.

    Args:
        rows: rows of each shard that are read.
        seed: seed of the run.
        epoch: number of the epoch.
        mix_shards: shards that a phase mixes, at least 1.
    """

    def __init__(self, rows: Sequence[int], *, seed: int, epoch: int, mix_shards: int) -> None:
        self._rows = rows
        self._mix_shards = mix_shards
        filled = np.flatnonzero(np.asarray(rows, dtype=np.int64))
        order = torch.randperm(len(filled), generator=seeded_generator("shards", seed, epoch)).numpy()
        self._shards: list[int] = filled[order].tolist()

    def __len__(self) -> int:
        if len(self._shards) <= self._mix_shards:
            return min(len(self._shards), 1)
        return len(self._shards) - self._mix_shards + 2

    def __iter__(self) -> Iterator[Phase]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Phase:
        if not 0 <= number < len(self):
            raise IndexError(number)
        count, window = len(self._shards), self._mix_shards
        if count <= window:
            return Phase(tuple(Segment(shard, 0, self._rows[shard]) for shard in self._shards))
        if number == 0:
            return self._phase((place, 0, window - place) for place in range(window))
        if number == len(self) - 1:
            return self._phase((place, count - place, window) for place in range(count - window + 1, count))
        last = number + window - 1
        return self._phase((place, last - place, last - place + 1) for place in range(last - window + 1, last + 1))

    def shards_after(self, number: int) -> list[int]:
        """Shards that no phase up to this one (-1: none) holds, in the order in which later ones bring them in."""
        return self._shards[number + self._mix_shards :] if number >= 0 else self._shards

    def _phase(self, parts: Iterable[tuple[int, int, int]]) -> Phase:
        """A phase of parts `first` to `last` of the shards at some places of the order."""
        return Phase(tuple(self._segments(parts)))

    def _segments(self, parts: Iterable[tuple[int, int, int]]) -> Iterator[Segment]:
        for place, first, last in parts:
            shard = self._shards[place]
            start, stop = (self._rows[shard] * part // self._mix_shards for part in (first, last))
            if stop > start:
                yield Segment(shard, start, stop)


def row_order(count: int, *, seed: int, epoch: int, shard: int) -> torch.Tensor:
    """Order of a shard's rows in one epoch, int64 [count]."""
    return torch.randperm(count, generator=seeded_generator("rows", seed, epoch, shard))


def phase_labels(phase: Phase, *, seed: int, epoch: int, number: int) -> torch.Tensor:
    """Which segment each row of a phase comes from, in reading order, int64 [phase.rows]: a uniform shuffle.

    The n-th row of a segment's label is the segment's n-th row, so together with `row_order` this is a uniform
    shuffle of the phase's rows.
    """
    lengths = torch.tensor([segment.stop - segment.start for segment in phase.segments], dtype=torch.int64)
    labels = torch.repeat_interleave(torch.arange(len(phase.segments)), lengths)
    return labels[torch.randperm(len(labels), generator=seeded_generator("phase", seed, epoch, number))]
