"""Metrics on held-out rows: closed-form values, and what holds for any rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae_job.evaluation.metrics import CHUNK_ROWS, HeldOutRows, reconstruction_metrics


class Reconstructs:
    """An autoencoder that answers with given rows, whose features are their non-zero entries."""

    def __init__(self, answer: Tensor) -> None:
        self._answer = answer
        self._next = 0

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._answer[self._next : self._next + len(x)]
        self._next += len(x)
        return rows, rows


def test_worked_example() -> None:
    x = torch.tensor([[-1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    y = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.5, 1.0]])
    metrics = reconstruction_metrics(Reconstructs(y), HeldOutRows(x, device="cpu"))
    # Squared errors 1, 0, 1/4; mean (0, 1), squared deviations 2, 1, 1; non-zeros 0, 1, 2.
    assert metrics.explained_variance == pytest.approx(1 - 1.25 / 4)
    assert metrics.mse == pytest.approx(1.25 / 3)
    assert metrics.l0 == pytest.approx(1.0)
    assert metrics.rows == 3
    # Row by row: 1 − 1/2, 1 − 0, 1 − (1/4)/1.
    assert metrics.explained_variance_legacy == pytest.approx(0.75)
    assert metrics.explained_variance_std == pytest.approx(0.25)


def test_shrinkage_and_direction() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    y = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    metrics = reconstruction_metrics(Reconstructs(y), HeldOutRows(x, device="cpu"))
    # Norms 5, 2 and 3, 1; products 9 and 2.
    assert (metrics.l2_norm_in, metrics.l2_norm_out) == (3.5, 2.0)
    assert metrics.l2_ratio == pytest.approx((3 / 5 + 1 / 2) / 2)
    assert metrics.cossim == pytest.approx((9 / 15 + 1) / 2)
    assert metrics.relative_reconstruction_bias == pytest.approx((9 + 1) / (9 + 2))
    # The features are y itself.
    assert (metrics.l0, metrics.l1) == (1.0, 2.0)


def test_a_zero_reconstruction_has_finite_figures() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    metrics = reconstruction_metrics(Reconstructs(torch.zeros(2, 2)), HeldOutRows(x, device="cpu"))
    assert (metrics.cossim, metrics.l2_ratio, metrics.relative_reconstruction_bias) == (0.0, 0.0, None)


def test_rows_at_the_mean_do_not_count_in_the_mean_of_ratios() -> None:
    x = torch.tensor([[-1.0], [0.0], [1.0]])
    y = torch.tensor([[-1.0], [5.0], [0.0]])
    metrics = reconstruction_metrics(Reconstructs(y), HeldOutRows(x, device="cpu"))
    assert metrics.explained_variance_legacy == pytest.approx((1 + 0) / 2)
    assert metrics.explained_variance == pytest.approx(1 - 26 / 2)


def test_a_transcoder_is_compared_with_its_target() -> None:
    x = torch.tensor([[9.0], [9.0], [9.0]])
    target = HeldOutRows(torch.tensor([[-1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), device="cpu")
    y = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.5, 1.0]])
    metrics = reconstruction_metrics(Reconstructs(y), HeldOutRows(x, device="cpu"), target)
    assert metrics.explained_variance == pytest.approx(1 - 1.25 / 4)
    assert metrics.mse == pytest.approx(1.25 / 3)
    assert metrics.l2_norm_in == pytest.approx((1 + 2 + 2**0.5) / 3)


def test_the_work_ends_between_two_chunks() -> None:
    chunks = 0

    def stop_at_the_second() -> None:
        nonlocal chunks
        chunks += 1
        if chunks == 2:
            raise InterruptedError

    x = torch.ones(3 * CHUNK_ROWS, 1)
    with pytest.raises(InterruptedError):
        reconstruction_metrics(Reconstructs(x), HeldOutRows(x, device="cpu"), between_chunks=stop_at_the_second)
    assert chunks == 2


def test_every_figure_has_a_name_and_rows_are_none() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    figures = reconstruction_metrics(Reconstructs(x), HeldOutRows(x, device="cpu")).figures()
    assert "rows" not in figures
    assert figures["explained_variance"] == figures["explained_variance_legacy"] == 1
    assert None not in figures.values()


@given(st.integers(1, 40), st.integers(0, 1000))
def test_perfect_is_one_and_the_mean_is_zero(rows: int, seed: int) -> None:
    x = torch.randn(rows + 1, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float() + 100
    held_out = HeldOutRows(x, device="cpu")
    assert reconstruction_metrics(Reconstructs(x), held_out).explained_variance == 1
    mean = x.mean(dim=0, keepdim=True, dtype=torch.float64).float().expand_as(x)
    assert reconstruction_metrics(Reconstructs(mean), held_out).explained_variance == pytest.approx(0, abs=1e-4)


def test_sums_go_over_all_chunks() -> None:
    rows = 2 * CHUNK_ROWS + 5
    x = torch.zeros(rows, 1)
    x[-1] = 1
    metrics = reconstruction_metrics(Reconstructs(torch.zeros(rows, 1)), HeldOutRows(x, device="cpu"))
    assert metrics.mse == pytest.approx(1 / rows)
    assert metrics.explained_variance == pytest.approx(1 - 1 / (1 - 1 / rows))


def test_a_large_common_offset_costs_no_precision() -> None:
    x = torch.tensor([[4096.0], [4097.0]]).repeat(1000, 1)
    assert HeldOutRows(x, device="cpu").sum_of_squares == pytest.approx(500)


def test_stored_dtype_is_read_as_float32() -> None:
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16)
    chunks = list(HeldOutRows(x, device="cpu").chunks())
    assert [chunk.dtype for chunk in chunks] == [torch.float32]


def test_undefined_figures_are_none() -> None:
    empty = reconstruction_metrics(Reconstructs(torch.zeros(0, 2)), HeldOutRows(torch.zeros(0, 2), device="cpu"))
    assert (empty.explained_variance, empty.l0, empty.mse, empty.rows) == (None, None, None, 0)
    constant = torch.ones(4, 2)
    metrics = reconstruction_metrics(Reconstructs(constant), HeldOutRows(constant, device="cpu"))
    assert (metrics.explained_variance, metrics.mse) == (None, 0.0)
