"""The order of rows: each exactly once an epoch, mixed across shards, a pure function of the seed."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_job.activations.mixing import EpochPlan, phase_labels, row_order
from sae_job.activations.reader import default_mix_shards
from sae_job.errors import InvalidInput
from tests.row_sources import NumberedRows, numbers, open_numbered

ROWS = st.lists(st.integers(0, 40), min_size=1, max_size=30)
FILLED = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(rows=ROWS, seed=st.integers(0, 1000), epoch=st.integers(0, 5), mix=st.integers(1, 9))
def test_every_row_is_in_exactly_one_segment(rows: list[int], seed: int, epoch: int, mix: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    for phase in EpochPlan(rows, seed=seed, epoch=epoch, mix_shards=mix):
        for segment in phase.segments:
            seen.update((segment.shard, row) for row in range(segment.start, segment.stop))
    assert seen == Counter({(shard, row): 1 for shard, count in enumerate(rows) for row in range(count)})


@given(rows=st.lists(st.integers(8, 40), min_size=1, max_size=30), seed=st.integers(0, 1000), mix=st.integers(1, 8))
def test_a_phase_holds_few_shards_and_each_is_loaded_once(rows: list[int], seed: int, mix: int) -> None:
    phases = [
        {segment.shard for segment in phase.segments} for phase in EpochPlan(rows, seed=seed, epoch=0, mix_shards=mix)
    ]
    assert all(len(shards) <= mix for shards in phases)
    loads = Counter(shard for before, now in zip([set(), *phases], phases, strict=False) for shard in now - before)
    assert loads == Counter(range(len(rows)))


@given(rows=st.lists(st.integers(8, 40), min_size=1, max_size=30), seed=st.integers(0, 1000), mix=st.integers(1, 8))
def test_shards_are_brought_in_in_the_order_that_is_told(rows: list[int], seed: int, mix: int) -> None:
    plan = EpochPlan(rows, seed=seed, epoch=0, mix_shards=mix)
    seen: set[int] = set()
    entering: list[int] = []
    for number, phase in enumerate(plan):
        entering += [segment.shard for segment in phase.segments if segment.shard not in seen]
        seen.update(entering)
        assert set(plan.shards_after(number)) == set(range(len(rows))) - seen
    assert plan.shards_after(-1) == entering


def test_steady_phases_mix_as_many_shards_as_asked_for() -> None:
    phases = list(EpochPlan([80] * 40, seed=0, epoch=0, mix_shards=8))
    assert [len(phase.segments) for phase in phases] == [8] * 33 + [7]
    assert {phase.rows for phase in phases[1:-1]} == {80}


def test_shards_that_fit_are_mixed_all_together() -> None:
    (phase,) = EpochPlan([5, 7, 9], seed=0, epoch=0, mix_shards=8)
    assert sorted((segment.shard, segment.stop) for segment in phase.segments) == [(0, 5), (1, 7), (2, 9)]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        return [
            tuple(segment.shard for segment in phase.segments)
            for phase in EpochPlan([8] * 30, seed=seed, epoch=epoch, mix_shards=4)
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
    (phase,) = EpochPlan([300, 100, 600], seed=0, epoch=0, mix_shards=8)
    labels = phase_labels(phase, seed=0, epoch=0, number=0)
    lengths = [segment.stop for segment in phase.segments]
    assert torch.bincount(labels).tolist() == lengths
    # The first tenth has each segment's share, within four standard deviations of a hypergeometric draw.
    for count, length in zip(torch.bincount(labels[:100], minlength=3).tolist(), lengths, strict=True):
        share = length / 1000
        assert abs(count - 100 * share) < 4 * (100 * share * (1 - share) * 0.9) ** 0.5


def test_a_plan_of_very_many_shards_is_made_a_phase_at_a_time() -> None:
    """A petabyte has four million shards; each phase is found without those before it."""
    phases = EpochPlan([2**17] * 4_000_000, seed=0, epoch=0, mix_shards=8)
    assert len(phases) == 4_000_000 - 8 + 2
    assert phases[2_000_000].rows == 2**17


@given(
    shards=FILLED,
    batch_size=st.integers(1, 50),
    mix=st.integers(1, 15),
    held_out=st.integers(0, 4),
    left_out=st.sets(st.integers(0, 100)),
)
def test_epochs_follow_each_other_without_loss_or_repetition(
    shards: list[int], batch_size: int, mix: int, held_out: int, left_out: set[int]
) -> None:
    """What is left over of an epoch begins the batch that the next epoch fills; each has every row once that is
    neither held out nor left out."""
    rows = [row for row in range(4 * held_out, sum(shards)) if row not in left_out]
    source = NumberedRows(shards, left_out=left_out)
    if sum(shards) <= 4 * held_out:
        with pytest.raises(InvalidInput, match="no rows are left to train on"):
            open_numbered(source, batch_size=batch_size, mix_shards=mix, held_out_contexts=held_out)
        return
    stream = open_numbered(source, batch_size=batch_size, mix_shards=mix, held_out_contexts=held_out)
    assert stream.training_rows == sum(shards) - 4 * held_out
    if not rows:
        with pytest.raises(InvalidInput, match="no row is within the norm ratio of all of row"):
            stream.next_batch()
        return
    read = numbers(stream, -(-3 * len(rows) // batch_size))
    for epoch in range(3):
        assert sorted(read[epoch * len(rows) : (epoch + 1) * len(rows)]) == rows
    if not left_out:
        assert stream.epoch == len(read) // len(rows)


def test_the_end_of_an_epoch_is_told_when_its_last_row_is_given_out() -> None:
    stream = open_numbered(NumberedRows([10, 10, 10]), batch_size=10)
    epochs = [stream.epoch]
    for _ in range(7):
        numbers(stream)
        epochs.append(stream.epoch)
    assert epochs == [0, 0, 0, 1, 1, 1, 2, 2]


@given(
    shards=FILLED,
    batch_size=st.integers(1, 40),
    mix=st.integers(1, 15),
    before=st.integers(0, 12),
    left_out=st.sets(st.integers(1, 100)),
)
def test_a_stream_goes_on_from_any_state(
    shards: list[int], batch_size: int, mix: int, before: int, left_out: set[int]
) -> None:
    stream = open_numbered(NumberedRows(shards, left_out=left_out), batch_size=batch_size, mix_shards=mix)
    numbers(stream, before)
    text = json.dumps(stream.state())
    expected = numbers(stream, 5)
    # As many shards are mixed as before, whatever is asked for now.
    other = open_numbered(NumberedRows(shards, left_out=left_out), batch_size=batch_size, mix_shards=mix + 1)
    other.next_batch()
    other.restore(json.loads(text))
    assert numbers(other, 5) == expected
    assert other.state() == stream.state()


def test_a_state_is_small_however_long_the_run() -> None:
    stream = open_numbered(NumberedRows([1000] * 3), batch_size=1000)
    stream.restore(stream.state() | {"epoch": 10**9})
    numbers(stream, 7)
    assert stream.epoch == 10**9 + 2
    assert len(json.dumps(stream.state())) < 200


def same_context_pairs(shards: int, *, mix: int, batches: int = 200) -> float:
    """Of the pairs of rows in a batch, the part whose rows are of one context: 2,000 contexts of 16 rows in shards."""
    context_size, batch_size = 16, 256
    rows = 2000 * context_size // shards
    stream = open_numbered(
        NumberedRows([rows] * shards, context_size=context_size), batch_size=batch_size, mix_shards=mix
    )
    same = sum(
        count * (count - 1)
        for _ in range(batches)
        for count in Counter(number // context_size for number in numbers(stream)).values()
    )
    return same / (batches * batch_size * (batch_size - 1))


def full_shuffle(contexts: float) -> float:
    """The same of a uniform shuffle of so many contexts of 16 rows."""
    return 15 / (16 * contexts - 1)


@pytest.mark.parametrize("shards", [2, 8, 40, 125])
def test_rows_of_a_context_meet_as_rarely_as_in_a_full_shuffle(shards: int) -> None:
    """As many shards are mixed by default as 2 GiB hold: all of 2,000 contexts of 128 tokens, 4,096 wide, in bfloat16,
    however they are cut into shards."""
    shard_bytes = 2000 * 128 * (2 * 4096 + 12) // shards
    assert same_context_pairs(shards, mix=default_mix_shards(shard_bytes)) <= 1.2 * full_shuffle(2000)


def test_of_a_larger_cache_the_shards_that_are_mixed_are_shuffled_fully() -> None:
    """No more can be reached with 8 shards in memory: rows of a context lie in one shard."""
    assert same_context_pairs(40, mix=8) <= 1.2 * full_shuffle(2000 * 8 / 40)
