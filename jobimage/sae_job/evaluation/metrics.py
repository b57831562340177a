"""How well an SAE reconstructs held-out activations: sums in float64 over all rows, then ratios."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

# Rows that are worked on at a time; fixed, because the order of additions decides the last bits.
CHUNK_ROWS = 4096


class Autoencoder(Protocol):
    """What metrics need of an SAE in raw scale."""

    def reconstruct(
        self, x: Float[Tensor, "rows d_in"], /
    ) -> tuple[Float[Tensor, "rows d_sae"], Float[Tensor, "rows d_in"]]:
        """Activations of its latents, and the reconstruction."""
        ...


@dataclass(frozen=True)
class ReconstructionMetrics:
    """Figures over all rows; None where they are not defined.

    Attributes:
        explained_variance: 1 − Σ‖y − x‖² / Σ‖x − mean‖²; None when the rows do not vary.
        l0: mean number of latents that fire per row.
        mse: mean over rows of ‖y − x‖², summed over d_in, in raw scale.
        rows: how many rows these are of.
    """

    explained_variance: float | None
    l0: float | None
    mse: float | None
    rows: int


class HeldOutRows:
    """Held-out activations of one hook with what all SAEs on them share.

    Args:
        activations: [rows, d_in] in raw scale, in any dtype, on the CPU.
        device: where chunks are worked on.
    """

    def __init__(self, activations: Float[Tensor, "rows d_in"], *, device: torch.device | str) -> None:
        self.activations = activations
        self._device = device
        self.sum_of_squares = self._sum_of_squares()

    @property
    def rows(self) -> int:
        return self.activations.shape[0]

    def chunks(self) -> Iterator[Float[Tensor, "chunk d_in"]]:
        """The rows in float32, a chunk at a time, on the device."""
        for chunk in self.activations.split(CHUNK_ROWS):
            if len(chunk):
                yield chunk.to(self._device).to(torch.float32)

    def _sum_of_squares(self) -> float:
        """Σ‖x − mean‖² in two passes: no cancellation, however large the mean is."""
        if self.rows == 0:
            return 0.0
        total = sum(chunk.sum(dim=0, dtype=torch.float64) for chunk in self.chunks())
        mean = total / self.rows
        return float(sum(torch.sum((chunk.to(torch.float64) - mean) ** 2) for chunk in self.chunks()))


@torch.no_grad()
def reconstruction_metrics(sae: Autoencoder, held_out: HeldOutRows) -> ReconstructionMetrics:
    """Metrics of an SAE that takes raw activations, on held-out rows."""
    if held_out.rows == 0:
        return ReconstructionMetrics(explained_variance=None, l0=None, mse=None, rows=0)
    squared_error = fired = 0.0
    for x in held_out.chunks():
        features, reconstruction = sae.reconstruct(x)
        squared_error += float(torch.sum((reconstruction - x).to(torch.float64) ** 2))
        fired += float(torch.count_nonzero(features))
    explained = 1 - squared_error / held_out.sum_of_squares if held_out.sum_of_squares > 0 else None
    return ReconstructionMetrics(
        explained_variance=explained,
        l0=fired / held_out.rows,
        mse=squared_error / held_out.rows,
        rows=held_out.rows,
    )
