"""Attention sinks do not become rows."""

from __future__ import annotations

import pytest
import torch

from sae_job.activations.sink_filter import SinkFilter, row_norms
from sae_job.errors import InvalidInput


def test_rows_above_a_multiple_of_the_median_are_dropped() -> None:
    # Norms 1, 2, 3 among the usable ones (median 2), and a special token of norm 1000.
    values = torch.tensor([[[1000.0], [1.0], [2.0], [3.0]]])
    usable = torch.tensor([[False, True, True, True]])
    sink_filter = SinkFilter.calibrate({"h": values}, usable, ratio=2.0)
    assert sink_filter.median_norms == {"h": 2.0}
    kept = sink_filter.keep({"h": torch.tensor([[[4.0], [-4.0], [4.1], [0.0]]])})
    assert kept is not None
    assert kept.tolist() == [[True, True, False, True]]


def test_a_row_is_dropped_when_any_hook_says_so() -> None:
    sink_filter = SinkFilter(2.0, {"a": 1.0, "b": 10.0})
    kept = sink_filter.keep({"a": torch.tensor([[[1.0], [3.0], [1.0]]]), "b": torch.tensor([[[9.0], [9.0], [21.0]]])})
    assert kept is not None
    assert kept.tolist() == [[True, False, False]]


def test_without_a_ratio_nothing_is_dropped() -> None:
    assert SinkFilter(0, {}).keep({"a": torch.ones(1, 2, 3)}) is None


def test_norms_of_bfloat16_are_taken_in_float32() -> None:
    # 4096 ones: in bfloat16 a running sum of squares would stop growing at 256.
    assert row_norms(torch.ones(1, 4096, dtype=torch.bfloat16)).tolist() == [64.0]


def test_what_is_not_a_number_is_left_for_the_sums_to_refuse() -> None:
    kept = SinkFilter(2.0, {"h": 1.0}).keep({"h": torch.tensor([[float("nan")], [float("inf")], [1.0]])})
    assert kept is not None
    assert kept.tolist() == [True, False, True]


def test_a_median_that_is_not_finite_is_refused() -> None:
    values = torch.tensor([[[float("nan")], [1.0]]])
    with pytest.raises(InvalidInput, match="activations of h are infinite or not numbers"):
        SinkFilter.calibrate({"h": values}, torch.ones(1, 2, dtype=torch.bool), ratio=2.0)
