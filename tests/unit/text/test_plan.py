"""Which contexts each shard takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_job.errors import InvalidInput
from sae_job.storage.file_store import FileStore
from sae_job.text.plan import (
    INDEX_KEY,
    CacheIndex,
    contexts_per_block,
    plan_shards,
    row_bytes,
    rows_per_shard,
    slack_for,
)
from sae_operator.api.activation_cache import ActivationCacheSpec
from tests.specs import CACHE_SPEC


def spec(*, ratio: float = 0.0, context_size: int = 4, shard_bytes: int = 2**20) -> ActivationCacheSpec:
    return ActivationCacheSpec.model_validate(
        {
            **CACHE_SPEC,
            "contextSize": context_size,
            "sampling": {"maxNormRatio": ratio},
            "storage": {**CACHE_SPEC["storage"], "shardBytes": shard_bytes},
        }
    )


def bounds(usable: list[int], tokens: int, of: ActivationCacheSpec, rows: int) -> list[tuple[int, int, int]]:
    return [(s.start, s.stop, s.rows) for s in plan_shards(usable, tokens, of, shard_rows=rows).shards]


def test_a_row_holds_all_hooks_and_three_integers() -> None:
    assert row_bytes({"a": 576, "b": 64}, "bfloat16") == 2 * 640 + 12
    assert rows_per_shard(spec(shard_bytes=4096), {"a": 100}) == 4096 // 212
    assert rows_per_shard(spec(shard_bytes=4096), {"a": 10_000}) == 1


def test_blocks_hold_a_million_tokens_whatever_the_context_size() -> None:
    assert contexts_per_block(128) == 8192
    assert contexts_per_block(2**21) == 1


def test_shards_take_contexts_until_they_are_full_and_the_last_takes_the_rest() -> None:
    assert bounds([3] * 10, 20, spec(), rows=8) == [(0, 3, 8), (3, 6, 8), (6, 8, 4)]


def test_contexts_hold_some_rows_more_where_the_norm_filter_may_drop_some() -> None:
    assert slack_for(64, spec()) == 0
    assert slack_for(64, spec(ratio=10.0)) == 2 + 4
    # 8 rows and 1 + 4 in reserve: 13 usable positions are 5 contexts of 3.
    assert bounds([3] * 20, 16, spec(ratio=10.0), rows=8) == [(0, 5, 8), (5, 10, 8)]


def test_too_little_text_is_planned_as_far_as_it_goes() -> None:
    plan = plan_shards([3] * 4, 100, spec(), shard_rows=8)
    assert plan.rows == 12 - 1  # the ninth position of the first three contexts is of no use
    assert plan_shards([], 100, spec(), shard_rows=8).rows == 0
    assert plan_shards([0, 0], 100, spec(), shard_rows=8).rows == 0


usable_counts = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@given(usable_counts, st.integers(1, 100), st.integers(1, 20), st.sampled_from([0.0, 10.0]))
def test_shards_are_consecutive_and_hold_their_rows(usable: list[int], tokens: int, rows: int, ratio: float) -> None:
    of = spec(ratio=ratio)
    plan = plan_shards(usable, tokens, of, shard_rows=rows)
    assert plan.rows == sum(shard.rows for shard in plan.shards) <= tokens
    start = 0
    for shard in plan.shards:
        assert shard.start == start
        assert sum(usable[shard.start : shard.stop]) >= shard.rows + slack_for(shard.rows, of)
        start = shard.stop
    assert start <= len(usable)


@given(usable_counts, st.integers(1, 60), st.integers(0, 60), st.integers(1, 20), st.sampled_from([0.0, 10.0]))
def test_a_plan_for_more_tokens_begins_with_the_full_shards_of_one_for_fewer(
    usable: list[int], tokens: int, more: int, rows: int, ratio: float
) -> None:
    shorter = plan_shards(usable, tokens, spec(ratio=ratio), shard_rows=rows)
    longer = plan_shards(usable, tokens + more, spec(ratio=ratio), shard_rows=rows)
    full = [shard for shard in shorter.shards if shard.rows == rows]
    assert longer.shards[: len(full)] == full


@given(usable_counts, st.integers(1, 20), st.sampled_from([0.0, 10.0]))
def test_lowering_tokens_to_what_was_told_is_enough(usable: list[int], rows: int, ratio: float) -> None:
    of = spec(ratio=ratio)
    told = plan_shards(usable, 10_000, of, shard_rows=rows).rows
    assert told == 0 or plan_shards(usable, told, of, shard_rows=rows).rows == told


def test_a_damaged_index_is_told(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    assert CacheIndex.load(store) is None
    store.put(INDEX_KEY, b'{"formatVersion": 2}')
    with pytest.raises(InvalidInput, match=r"index\.json") as caught:
        CacheIndex.load(store)
    assert caught.value.reason == "IndexUnreadable"
