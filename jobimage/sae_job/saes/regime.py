"""The choice between dense products and products that touch only active latents, for SAEs whose sparsity is learned.

Such an SAE begins with half of its latents active, where dense products are faster, and ends with one in a hundred,
where they are a waste.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sae_job.saes.trainable import Ranks

# Share of active entries below which sparse steps are taken. On a CPU (float32, batch 4096, one thread) both cost the
# same at about 0.2 with 576 x 4608 (gated and JumpReLU between 0.15 and 0.25), and at 0.1 with 2048 x 8192, where
# standard SAEs were measured. A sparse step's memory grows with the share, and is three times a dense one's at 0.1.
SPARSE_BELOW = 0.1
# Asking a GPU for a number makes it wait for the processor; there the number is asked for once in so many steps.
_GPU_STEPS = 64


class Regime:
    """Whether a step is dense or sparse, by the active entries of an earlier step.

    The number that decides is a buffer that checkpoints hold, and the same on all ranks, so that a resumed training
    takes the turns of the undisturbed one. On a CPU it is of the last step, on a GPU of the last step whose number is
    a multiple of 64.

    Args:
        d_sae: number of latents.
        device: where the SAE lies.
        ranks: the processes that train together.
        every: steps from one look at the number of active entries to the next; the device's own when None.

    Attributes:
        entries_per_row: active entries per row that decide; infinite before the first step.
    """

    def __init__(self, d_sae: int, *, device: torch.device, ranks: Ranks, every: int | None = None) -> None:
        self.entries_per_row: Float32[Tensor, ""] = torch.full((), math.inf, dtype=torch.float32, device=device)
        self._most = SPARSE_BELOW * d_sae
        self._every = every or (1 if device.type == "cpu" else _GPU_STEPS)
        self._ranks = ranks
        self._version = -1
        self._sparse = False

    @property
    def is_sparse(self) -> bool:
        """For the step that comes."""
        # The buffer is read only after it was written, here or by a checkpoint.
        if self._version != self.entries_per_row._version:
            self._sparse = float(self.entries_per_row) < self._most
            self._version = self.entries_per_row._version
        return self._sparse

    def note(self, step: int, entries: Int64[Tensor, " d_sae"], rows: int) -> None:
        """Take note of a step.

        Args:
            step: 0-based number of the step.
            entries: active entries of each latent, on this rank's rows.
            rows: of the batch, over all ranks.
        """
        if step % self._every == 0:
            total = self._ranks.sum_(entries.sum().to(torch.float32))
            self.entries_per_row.copy_(total / rows)
