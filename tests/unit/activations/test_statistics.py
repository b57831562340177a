"""Sums are exact: those of the stored values in float64, whatever the shards' number and size."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_job.activations.manifest import HookSums
from sae_job.activations.statistics import HookTotals, merge_sums, sums_of
from sae_job.errors import InvalidInput


def test_closed_form() -> None:
    sums = sums_of(torch.tensor([[3.0, 4.0], [0.0, 5.0], [-6.0, 8.0]]), "h")
    assert (sums.d_in, sums.rows, sums.sum, sums.sum_norm, sums.sum_squared_norm) == (2, 3, [-3.0, 17.0], 20.0, 150.0)


def test_columns_are_summed_exactly() -> None:
    # In float32 the small values would vanish beside the large ones.
    rows = torch.tensor([[1e8], [1.0], [-1e8], [1.0]]).repeat(1000, 1).to(torch.bfloat16)
    exact = sum(Fraction(float(value)) for value in rows.flatten())
    assert sums_of(rows, "h").sum == [float(exact)]


@given(
    counts=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_merged_statistics_are_those_of_all_rows(counts: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    shards = [(torch.randn(count, 5, generator=generator) + 2).to(dtype) for count in counts]
    merged = merge_sums("h", [sums_of(shard, "h") for shard in shards])
    everything = torch.cat(shards).double()
    norms = everything.norm(dim=1)
    assert merged.mean == pytest.approx(everything.mean(dim=0).tolist(), rel=1e-12)
    assert merged.mean_norm == pytest.approx(float(norms.mean()), rel=1e-12)
    assert merged.mean_squared_norm == pytest.approx(float((norms**2).mean()), rel=1e-12)


@given(
    st.lists(
        st.lists(st.floats(-1e200, 1e200), min_size=4, max_size=4),
        min_size=1,
        max_size=12,
    )
)
def test_totals_are_the_nearest_floats_whatever_is_added_first(values: list[list[float]]) -> None:
    def totals(shards: list[list[float]]) -> list[float]:
        sums = [
            HookSums(d_in=2, rows=1, sum=sum, sum_norm=norm, sum_squared_norm=other) for *sum, norm, other in shards
        ]
        found = merge_sums("h", sums)
        return [*found.mean, found.mean_norm, found.mean_squared_norm]

    expected = [math.fsum(column) / len(values) for column in zip(*values, strict=True)]
    assert totals(values) == totals(values[::-1]) == expected


def test_totals_take_no_more_memory_for_more_shards() -> None:
    width = 1000
    shard = torch.randn(width, dtype=torch.float64).tolist()
    sums = HookSums(d_in=width, rows=1, sum=shard, sum_norm=1.0, sum_squared_norm=1.0)

    def peak(shards: int) -> int:
        totals = HookTotals("h")
        tracemalloc.start()
        for number in range(shards):
            totals.add(sums.model_copy(update={"sum": [value * 1.1**number for value in shard]}))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    # The sums of 180 shards more would be 180 * width * 8 bytes as arrays, four times that as lists.
    assert peak(200) < peak(20) + 2 * width * 8


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(InvalidInput, match=r"layer\.3 are not finite in float16: use bfloat16") as caught:
        sums_of(torch.tensor([[1.0, value]], dtype=torch.float16), "layer.3")
    assert (caught.value.reason, caught.value.field) == ("NotFinite", "spec.storage.dtype")


def test_shards_that_were_filtered_differently_are_refused() -> None:
    def sums(median: float) -> HookSums:
        return HookSums(d_in=1, rows=1, sum=[1.0], sum_norm=1.0, sum_squared_norm=1.0, calibration_median_norm=median)

    assert merge_sums("h", [sums(2.0), sums(2.0)]).calibration_median_norm == 2.0
    with pytest.raises(InvalidInput, match="disagree on the median norm of h"):
        merge_sums("h", [sums(2.0), sums(2.5)])


def test_rows_that_are_not_kept_do_not_count() -> None:
    rows = torch.tensor([[3.0, 4.0], [1e30, 1e30], [-6.0, 8.0]])
    sums = sums_of(rows, "h", keep=torch.tensor([1, 0, 1], dtype=torch.uint8))
    assert (sums.rows, sums.sum, sums.sum_norm, sums.sum_squared_norm) == (2, [-3.0, 12.0], 15.0, 125.0)
    assert merge_sums("h", [sums, sums], group=1).mean == [-1.5, 6.0]
    assert (merge_sums("h", [sums, sums], group=1).rows, merge_sums("h", [sums], group=1).group) == (4, 1)


def test_a_hook_without_any_row_is_told() -> None:
    none = sums_of(torch.ones(2, 3), "h", keep=torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(InvalidInput, match="leaves no row of h: raise maxNormRatio"):
        merge_sums("h", [none])


def test_a_model_that_overflows_is_told_apart_from_a_format_that_does() -> None:
    with pytest.raises(InvalidInput, match=r"infinite or not numbers: use another model\.dtype") as caught:
        sums_of(torch.tensor([[math.nan]], dtype=torch.bfloat16), "layer.3")
    assert caught.value.field == "spec.model.dtype"
