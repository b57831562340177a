"""The reconstruction loss in both normalisations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_job.saes.reconstruction import reconstruction_loss, row_weights
from sae_job.saes.trainable import ONE_PROCESS, MseNormalization


class OneOfTwoRanks:
    """A rank beside another one whose target is known."""

    size = 2
    index = 0

    def __init__(self, other: Tensor) -> None:
        self._other = other

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.add_(self._other.sum(dim=0))

    def gather(self, tensor: Tensor) -> Tensor:
        raise AssertionError(f"nothing of shape {tuple(tensor.shape)} is to be gathered")


def rows(seed: int, count: int = 6, width: int = 4) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalization", ["none", "dense_batch"])
def test_the_loss_is_a_mean_of_sums_and_the_gradient_is_that_of_autograd(normalization: MseNormalization) -> None:
    target = rows(0).double()
    reconstruction = rows(1).double().requires_grad_()
    squared = (reconstruction - target).square()
    if normalization == "dense_batch":
        distance = (target - target.mean(dim=0)).norm(dim=1, keepdim=True)
        squared = squared / (distance + 1e-6)
    expected = squared.sum(dim=1).mean()
    expected.backward()
    assert reconstruction.grad is not None

    weights = row_weights(target.float(), normalization=normalization, ranks=ONE_PROCESS)
    error = (reconstruction.detach() - target).float()
    loss, gradient = reconstruction_loss(error, weights, ranks=ONE_PROCESS)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient.double(), reconstruction.grad, rtol=1e-5)


def test_two_errors_of_one_at_distances_two_and_half() -> None:
    # The mean is 0.
    target = torch.tensor([[2.0], [-2.0], [0.5], [-0.5]])
    weights = row_weights(target, normalization="dense_batch", ranks=ONE_PROCESS)
    loss, _ = reconstruction_loss(torch.ones(4, 1), weights, ranks=ONE_PROCESS)
    assert float(loss) == pytest.approx((0.5 + 0.5 + 2 + 2) / 4, rel=1e-5)


def test_a_row_that_is_the_mean_does_not_divide_by_zero() -> None:
    target = torch.ones(3, 2)
    weights = row_weights(target, normalization="dense_batch", ranks=ONE_PROCESS)
    loss, gradient = reconstruction_loss(torch.zeros(3, 2), weights, ranks=ONE_PROCESS)
    assert float(loss) == 0.0
    assert torch.equal(gradient, torch.zeros(3, 2))


@pytest.mark.parametrize("normalization", ["none", "dense_batch"])
def test_the_parts_of_two_ranks_are_those_of_one(normalization: MseNormalization) -> None:
    target, error = rows(2), rows(3)
    whole = row_weights(target, normalization=normalization, ranks=ONE_PROCESS)
    loss, gradient = reconstruction_loss(error, whole, ranks=ONE_PROCESS)
    parts = []
    for mine, other in ((slice(0, 3), slice(3, 6)), (slice(3, 6), slice(0, 3))):
        rank = OneOfTwoRanks(target[other])
        weights = row_weights(target[mine], normalization=normalization, ranks=rank)
        parts.append(reconstruction_loss(error[mine], weights, ranks=rank))
    assert float(parts[0][0] + parts[1][0]) == pytest.approx(float(loss), rel=1e-6)
    assert torch.allclose(torch.cat([parts[0][1], parts[1][1]]), gradient, rtol=1e-6)


def test_the_gradient_may_replace_the_error() -> None:
    error = rows(4)
    expected = error * (2 / 6)
    _, gradient = reconstruction_loss(error, None, ranks=ONE_PROCESS, out=error)
    assert gradient is error
    assert torch.allclose(error, expected)
