"""How much a batch varies: what a step's squared error is compared with."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_job.saes.trainable import Ranks


def batch_variance(rows: Float32[Tensor, "batch d"], ranks: Ranks) -> float:
    """Mean over the whole batch of ‖x − mean‖², summed over dimensions; waits for a GPU.

    In two passes with sums in float64: no cancellation, however large the mean is.

    Args:
        rows: this rank's rows of the batch.
        ranks: the processes that train together, each with as many rows.
    """
    count = len(rows) * ranks.size
    mean = ranks.sum_(rows.sum(dim=0, dtype=torch.float64)) / count
    # One row of float64 at a time would be slow, all of them large: the mean is taken off in float32, where it is exact
    # enough for what is left.
    distances = (rows - mean.to(torch.float32)).square_().sum(dtype=torch.float64)
    return float(ranks.sum_(distances)) / count
