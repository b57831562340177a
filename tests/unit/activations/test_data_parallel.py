"""Processes that share the rows: disjoint batches that together are those of one process."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.row_sources import NumberedRows, numbers, open_numbered

SHARDS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(
    shards=SHARDS,
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    mix=st.integers(1, 6),
    seed=st.integers(0, 99),
    left_out=st.sets(st.integers(1, 200)),
)
def test_batches_of_all_processes_are_those_of_one(
    shards: list[int], batch_size: int, world_size: int, mix: int, seed: int, left_out: set[int]
) -> None:
    """Row for row: each process has every so-manyth row; so nothing is read twice, and nothing is lost."""
    one = open_numbered(
        NumberedRows(shards, left_out=left_out), batch_size=batch_size * world_size, mix_shards=mix, seed=seed
    )
    many = [
        open_numbered(
            NumberedRows(shards, left_out=left_out),
            batch_size=batch_size,
            mix_shards=mix,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for _ in range(6):
        whole = numbers(one)
        assert [numbers(stream) for stream in many] == [whole[rank::world_size] for rank in range(world_size)]
        assert [stream.state() for stream in many] == [one.state()] * world_size
        assert {stream.epoch for stream in many} == {one.epoch}


@given(shards=SHARDS, world_size=st.integers(1, 4), batch_size=st.integers(1, 7))
def test_an_epoch_of_all_processes_has_each_row_once(shards: list[int], world_size: int, batch_size: int) -> None:
    """Where whole batches fill it; what is left over of others comes from the next epoch."""
    rows = sum(shards)
    many = [
        open_numbered(NumberedRows(shards), batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen = Counter(number for stream in many for number in numbers(stream, rows // (batch_size * world_size)))
    assert all(count == 1 for count in seen.values())
    assert len(seen) == rows - rows % (batch_size * world_size)


@given(before=st.integers(0, 20), mix=st.integers(1, 6), left_out=st.sets(st.integers(1, 60)))
def test_any_number_of_processes_goes_on_where_others_stopped(before: int, mix: int, left_out: set[int]) -> None:
    def streams(world_size: int) -> list[list[int]]:
        """The next six batches of 12 rows, shared by so many processes."""
        found: list[list[int]] = []
        for rank in range(world_size):
            stream = open_numbered(
                NumberedRows([17, 20, 9, 33], left_out=left_out),
                batch_size=12 // world_size,
                rank=rank,
                world_size=world_size,
                mix_shards=mix,
            )
            stream.restore(state)
            found.append(numbers(stream, 6))
        return found

    first = open_numbered(NumberedRows([17, 20, 9, 33], left_out=left_out), batch_size=12, mix_shards=mix)
    numbers(first, before)
    state = json.loads(json.dumps(first.state()))
    (whole,) = streams(1)
    assert whole == numbers(first, 6)
    for world_size in (2, 3, 4):
        assert sorted(row for rows in streams(world_size) for row in rows) == sorted(whole)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_is_one_of_its_world(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {world_size} processes"):
        open_numbered(NumberedRows([4]), batch_size=1, rank=rank, world_size=world_size)
