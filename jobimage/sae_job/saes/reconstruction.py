"""The reconstruction loss: squared errors, summed over d_out, averaged over the rows of all ranks.

Every architecture takes it from here, so that `training.mseLossNormalization` means the same for all.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_job.saes.trainable import MseNormalization, Ranks

# A row that is the batch's mean has no distance to divide by.
_SMALLEST_DISTANCE = 1e-6


@torch.no_grad()
def row_weights(
    target: Float32[Tensor, "batch d_out"], *, normalization: MseNormalization, ranks: Ranks
) -> Float32[Tensor, "batch 1"] | None:
    """What each row's squared error is multiplied by; None where that is 1.

    `dense_batch` divides by the row's distance (not its square) from the mean of the whole batch, over all ranks.
    """
    if normalization == "none":
        return None
    mean = ranks.sum_(target.sum(dim=0)).div_(target.shape[0] * ranks.size)
    return torch.linalg.vector_norm(target - mean, dim=1, keepdim=True).add_(_SMALLEST_DISTANCE).reciprocal_()


@torch.no_grad()
def reconstruction_loss(
    error: Float32[Tensor, "batch d_out"],
    weights: Float32[Tensor, "batch 1"] | None,
    *,
    ranks: Ranks,
    rows: int | None = None,
    out: Float32[Tensor, "batch d_out"] | None = None,
) -> tuple[Float32[Tensor, ""], Float32[Tensor, "batch d_out"]]:
    """This rank's part of the loss, and the loss's gradient with respect to the reconstruction.

    Args:
        error: the reconstruction minus the target; stays as it is, unless it is `out`.
        weights: of the rows, by `row_weights(target, normalization=self.mse_loss_normalization, ranks=self.ranks)`.
        rows: of the whole batch over all ranks, where `error` is of some of this rank's; `batch` x ranks when None.
        out: where the gradient is written; fresh memory when None. It may be `error` itself.
    """
    rows = error.shape[0] * ranks.size if rows is None else rows
    # By rows: the squares are never written out, and sums of few terms keep their digits.
    squared = torch.linalg.vector_norm(error, dim=1).square_()
    if weights is None:
        return squared.sum() / rows, torch.mul(error, 2 / rows, out=out)
    return (squared @ weights.squeeze(1)) / rows, torch.mul(error, weights * (2 / rows), out=out)
