"""The variance that a step's squared error is compared with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_job.saes.trainable import ONE_PROCESS
from sae_job.training.variance import batch_variance


def test_it_is_of_rows_around_their_mean_and_summed_over_dimensions() -> None:
    rows = torch.tensor([[-1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    # Mean (0, 1), squared distances 2, 1, 1.
    assert batch_variance(rows, ONE_PROCESS) == pytest.approx(4 / 3)


def test_a_large_mean_costs_little_precision() -> None:
    rows = torch.tensor([[4096.0], [4097.0]]).repeat(512, 1)
    assert batch_variance(rows, ONE_PROCESS) == pytest.approx(0.25)


class TwoRanks:
    """A rank whose peer has the rows `other`."""

    size = 2
    index = 0

    def __init__(self, other: Tensor) -> None:
        self._other = other
        self._sums = 0

    def sum_(self, tensor: Tensor) -> Tensor:
        self._sums += 1
        if self._sums == 1:
            return tensor.add_(self._other.sum(dim=0, dtype=torch.float64))
        return tensor.add_(self._other.square().sum(dtype=torch.float64))

    def gather(self, tensor: Tensor) -> Tensor:
        raise AssertionError("nothing is gathered")


def test_ranks_have_the_whole_batchs() -> None:
    # Both parts have mean 0, so that the peer's distances are its squares.
    mine, other = torch.tensor([[1.0], [-1.0]]), torch.tensor([[3.0], [-3.0]])
    assert batch_variance(mine, TwoRanks(other)) == pytest.approx((1 + 1 + 9 + 9) / 4)
