"""How well an SAE reconstructs held-out activations: sums in float64 over all rows, then ratios."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor

# Rows that are worked on at a time; fixed, because the order of additions decides the last bits.
CHUNK_ROWS = 4096
# A norm below this is no length to divide by; the ratio is then the other norm itself.
SMALLEST_NORM = 1e-4
_SMALLEST_DIVISOR = 1e-12


class Autoencoder(Protocol):
    """What metrics need of an SAE in raw scale, or of a transcoder, whose reconstruction is d_out wide."""

    def reconstruct(
        self, x: Float[Tensor, "rows d_in"], /
    ) -> tuple[Float[Tensor, "rows d_sae"], Float[Tensor, "rows d_out"]]:
        """Activations of its latents, and the reconstruction."""
        ...


@dataclass(frozen=True)
class ReconstructionMetrics:
    """Figures over all rows; None where they are not defined. With t a row that is reconstructed (of an SAE the one
    that is encoded) and y its reconstruction, in raw scale:

    Attributes:
        explained_variance: 1 − Σ‖y − t‖² / Σ‖t − mean‖²; None when the rows do not vary.
        explained_variance_legacy: mean over rows of 1 − ‖y − t‖² / ‖t − mean‖², without rows that are the mean. One
            row near the mean can move it far; it is there to compare with figures of others.
        explained_variance_std: standard deviation of these ratios over rows; None for fewer than two.
        mse: mean over rows of ‖y − t‖², summed over dimensions.
        cossim: mean over rows of the cosine between t and y; 0 for a row where one is zero.
        l0: mean number of latents that fire per row.
        l1: mean sum of the activations per row.
        l2_norm_in: mean of ‖t‖.
        l2_norm_out: mean of ‖y‖.
        l2_ratio: mean of ‖y‖ / ‖t‖; below 1 where reconstructions are shrunk.
        relative_reconstruction_bias: Σ‖y‖² / Σ t·y (Rajamanoharan et al. 2024, equation 10): the factor that y would
            have to be divided by; None when Σ t·y is 0.
        rows: how many rows these are of.
    """

    explained_variance: float | None = None
    explained_variance_legacy: float | None = None
    explained_variance_std: float | None = None
    mse: float | None = None
    cossim: float | None = None
    l0: float | None = None
    l1: float | None = None
    l2_norm_in: float | None = None
    l2_norm_out: float | None = None
    l2_ratio: float | None = None
    relative_reconstruction_bias: float | None = None
    rows: int = 0

    def figures(self) -> dict[str, float | None]:
        """All of them by name, without the number of rows."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "rows"}


class HeldOutRows:
    """Held-out activations of one hook with what all SAEs on them share.

    Args:
        activations: [rows, d_in] in raw scale, in any dtype, on the CPU.
        device: where chunks are worked on.
    """

    def __init__(self, activations: Float[Tensor, "rows d_in"], *, device: torch.device | str) -> None:
        self.activations = activations
        self._device = device
        self.mean: Float64[Tensor, " d_in"] = self._mean()
        self.sum_of_squares = self._sum_of_squares()

    @property
    def rows(self) -> int:
        return self.activations.shape[0]

    def chunks(self) -> Iterator[Float[Tensor, "chunk d_in"]]:
        """The rows in float32, a chunk at a time, on the device."""
        for chunk in self.activations.split(CHUNK_ROWS):
            if len(chunk):
                yield chunk.to(self._device).to(torch.float32)

    def squared_distances(self, chunk: Float[Tensor, "chunk d_in"]) -> Float64[Tensor, " chunk"]:
        """‖x − mean‖² of rows, with the mean over all rows."""
        return torch.sum((chunk.to(torch.float64) - self.mean) ** 2, dim=1)

    def _mean(self) -> Tensor:
        total = torch.zeros(self.activations.shape[1], dtype=torch.float64, device=self._device)
        for chunk in self.chunks():
            total += chunk.sum(dim=0, dtype=torch.float64)
        return total / max(1, self.rows)

    def _sum_of_squares(self) -> float:
        """Σ‖x − mean‖² in a second pass: no cancellation, however large the mean is."""
        return float(sum(self.squared_distances(chunk).sum() for chunk in self.chunks()))


@torch.no_grad()
def reconstruction_metrics(
    sae: Autoencoder,
    held_out: HeldOutRows,
    target: HeldOutRows | None = None,
    *,
    between_chunks: Callable[[], None] = lambda: None,
) -> ReconstructionMetrics:
    """Metrics of an SAE that takes raw activations, on held-out rows.

    Args:
        sae: the SAE, or a transcoder.
        held_out: rows that are encoded.
        target: the same positions' rows of the hook that a transcoder reconstructs; `held_out` when None.
        between_chunks: called before each chunk; may raise to end the work, which can then be done again.
    """
    target = held_out if target is None else target
    if held_out.rows == 0:
        return ReconstructionMetrics()
    sums = _Sums()
    pairs = (
        ((x, x) for x in held_out.chunks())
        if target is held_out
        else zip(held_out.chunks(), target.chunks(), strict=True)
    )
    for x, wanted in pairs:
        between_chunks()
        features, reconstruction = sae.reconstruct(x)
        sums.add(features, reconstruction, wanted, target.squared_distances(wanted))
    return sums.metrics(target.sum_of_squares)


class _Sums:
    """Sums over chunks, in float64, on the rows' device: asking for each would hold a GPU up."""

    _NAMES = ("squared_error", "l0", "l1", "norm_in", "norm_out", "ratio", "cosine", "square_out", "product")

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._ratios: list[Tensor] = []
        self._rows = 0

    def add(
        self,
        features: Float[Tensor, "chunk d_sae"],
        reconstruction: Float[Tensor, "chunk d_out"],
        target: Float[Tensor, "chunk d_out"],
        squared_distances: Float64[Tensor, " chunk"],
    ) -> None:
        """Add a chunk."""
        t, y = target.to(torch.float64), reconstruction.to(torch.float64)
        squared_errors = torch.sum((reconstruction - target).to(torch.float64) ** 2, dim=1)
        norm_in, norm_out = torch.linalg.vector_norm(t, dim=1), torch.linalg.vector_norm(y, dim=1)
        products = torch.sum(t * y, dim=1)
        parts = (
            squared_errors,
            torch.count_nonzero(features).to(torch.float64),
            features.sum(dtype=torch.float64),
            norm_in,
            norm_out,
            norm_out / norm_in.masked_fill(norm_in < SMALLEST_NORM, 1.0),
            products / (norm_in * norm_out).clamp_min(_SMALLEST_DIVISOR),
            norm_out.square(),
            products,
        )
        for name, part in zip(self._NAMES, parts, strict=True):
            self._sums[name] = self._sums.get(name, torch.zeros_like(part.sum())) + part.sum()
        varying = squared_distances > 0
        self._ratios.append(1 - squared_errors[varying] / squared_distances[varying])
        self._rows += len(target)

    def metrics(self, sum_of_squares: float) -> ReconstructionMetrics:
        """The figures of all chunks, of which there is at least one.

        Args:
            sum_of_squares: Σ‖t − mean‖² over all rows.
        """
        total = {name: float(value) for name, value in self._sums.items()}
        mean = {name: value / self._rows for name, value in total.items()}
        ratios = torch.cat(self._ratios)
        return ReconstructionMetrics(
            explained_variance=1 - total["squared_error"] / sum_of_squares if sum_of_squares > 0 else None,
            explained_variance_legacy=float(ratios.mean()) if len(ratios) else None,
            explained_variance_std=float(ratios.std()) if len(ratios) > 1 else None,
            mse=mean["squared_error"],
            cossim=mean["cosine"],
            l0=mean["l0"],
            l1=mean["l1"],
            l2_norm_in=mean["norm_in"],
            l2_norm_out=mean["norm_out"],
            l2_ratio=mean["ratio"],
            relative_reconstruction_bias=total["square_out"] / total["product"] if total["product"] != 0 else None,
            rows=self._rows,
        )
