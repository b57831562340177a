"""The order in which rows are read: a pure function of the shards' row counts and the seed.

An epoch visits the shards in a random order. Of any shard only a part is read at a time: it is cut into `mix_shards`
segments, and segment j of the shard at place p of the order is read in phase p + j, shuffled together with the segments
of the shards before and after it. So a phase mixes `mix_shards` shards, one shard enters and one leaves from phase to
phase, every shard is loaded once an epoch, and at most `mix_shards` are held. The phases at both ends, which would mix
few shards, are joined into one each. When all shards can be held, the epoch is one phase.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

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


def plan_epoch(rows: Sequence[int], *, seed: int, epoch: int, mix_shards: int) -> list[Phase]:
    """Phases of one epoch; every row of every shard is in exactly one segment.

    Args:
        rows: rows of each shard that are read.
        seed: seed of the run.
        epoch: number of the epoch.
        mix_shards: shards that a phase mixes, at least 1.
    """
    filled = [shard for shard, count in enumerate(rows) if count > 0]
    order = torch.randperm(len(filled), generator=seeded_generator("shards", seed, epoch)).tolist()
    shards = [filled[place] for place in order]
    if len(shards) <= mix_shards:
        return [Phase(tuple(Segment(shard, 0, rows[shard]) for shard in shards))] if shards else []
    window = mix_shards
    grouped: dict[int, list[Segment]] = {}
    for place, shard in enumerate(shards):
        for part in range(window):
            start, stop = rows[shard] * part // window, rows[shard] * (part + 1) // window
            if stop > start:
                phase = min(max(place + part, window - 1), len(shards))
                grouped.setdefault(phase, []).append(Segment(shard, start, stop))
    return [Phase(_joined(grouped[phase])) for phase in sorted(grouped)]


def _joined(segments: list[Segment]) -> tuple[Segment, ...]:
    """Neighbouring segments of one shard as one."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and (joined[-1].shard, joined[-1].stop) == (segment.shard, segment.start):
            joined[-1] = Segment(segment.shard, joined[-1].start, segment.stop)
        else:
            joined.append(segment)
    return tuple(joined)


def row_order(count: int, *, seed: int, epoch: int, shard: int) -> torch.Tensor:
    """Order of a shard's rows in one epoch, int64 [count]."""
    return torch.randperm(count, generator=seeded_generator("rows", seed, epoch, shard))


def phase_labels(phase: Phase, *, seed: int, epoch: int, number: int) -> torch.Tensor:
    """Which segment each row of a phase comes from, in reading order, int64 [phase.rows]: a uniform shuffle.

    The n-th row of a segment's label is the segment's n-th row, so together with `row_order` this is a uniform
    shuffle of the phase's rows.
    """
    lengths = torch.tensor([segment.stop - segment.start for segment in phase.segments])
    labels = torch.repeat_interleave(torch.arange(len(phase.segments)), lengths)
    return labels[torch.randperm(len(labels), generator=seeded_generator("phase", seed, epoch, number))]
