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
