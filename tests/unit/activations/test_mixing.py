"""The order of rows: each exactly once an epoch, mixed across shards, a pure function of the seed."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_job.activations.mixing import phase_labels, plan_epoch, row_order

ROWS = st.lists(st.integers(0, 40), min_size=1, max_size=30)


@given(rows=ROWS, seed=st.integers(0, 1000), epoch=st.integers(0, 5), mix=st.integers(1, 9))
def test_every_row_is_in_exactly_one_segment(rows: list[int], seed: int, epoch: int, mix: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    for phase in plan_epoch(rows, seed=seed, epoch=epoch, mix_shards=mix):
        assert phase.rows > 0
        for segment in phase.segments:
            seen.update((segment.shard, row) for row in range(segment.start, segment.stop))
    assert seen == Counter({(shard, row): 1 for shard, count in enumerate(rows) for row in range(count)})


@given(rows=st.lists(st.integers(8, 40), min_size=1, max_size=30), seed=st.integers(0, 1000), mix=st.integers(1, 8))
def test_a_phase_holds_few_shards_and_each_is_loaded_once(rows: list[int], seed: int, mix: int) -> None:
    phases = [
        {segment.shard for segment in phase.segments} for phase in plan_epoch(rows, seed=seed, epoch=0, mix_shards=mix)
    ]
    assert all(len(shards) <= mix for shards in phases)
    loads = Counter(shard for before, now in zip([set(), *phases], phases, strict=False) for shard in now - before)
    assert loads == Counter(range(len(rows)))


def test_steady_phases_mix_as_many_shards_as_asked_for() -> None:
    phases = plan_epoch([80] * 40, seed=0, epoch=0, mix_shards=8)
    assert [len(phase.segments) for phase in phases] == [8] * 33 + [7]
    assert {phase.rows for phase in phases[1:-1]} == {80}


def test_shards_that_fit_are_mixed_all_together() -> None:
    (phase,) = plan_epoch([5, 7, 9], seed=0, epoch=0, mix_shards=8)
    assert sorted((segment.shard, segment.stop) for segment in phase.segments) == [(0, 5), (1, 7), (2, 9)]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        return [
            tuple(segment.shard for segment in phase.segments)
            for phase in plan_epoch([8] * 30, seed=seed, epoch=epoch, mix_shards=4)
        ]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    orders = [tuple(row_order(30, seed=s, epoch=e, shard=n).tolist()) for s in (1, 2) for e in (0, 1) for n in (0, 1)]
    assert len(set(orders)) == 8


def test_the_streams_of_random_numbers_do_not_hang_on_threads_or_global_state() -> None:
    torch.manual_seed(1)
    first = row_order(10, seed=3, epoch=0, shard=0)
    torch.manual_seed(2)
    assert torch.equal(first, row_order(10, seed=3, epoch=0, shard=0))


def test_labels_are_a_shuffle_of_the_segments_rows() -> None:
    (phase,) = plan_epoch([300, 100, 600], seed=0, epoch=0, mix_shards=8)
    labels = phase_labels(phase, seed=0, epoch=0, number=0)
    lengths = [segment.stop for segment in phase.segments]
    assert torch.bincount(labels).tolist() == lengths
    # The first tenth has each segment's share, within four standard deviations of a hypergeometric draw.
    for count, length in zip(torch.bincount(labels[:100], minlength=3).tolist(), lengths, strict=True):
        share = length / 1000
        assert abs(count - 100 * share) < 4 * (100 * share * (1 - share) * 0.9) ** 0.5
