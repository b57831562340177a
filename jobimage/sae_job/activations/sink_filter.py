"""Which positions of contexts become rows: no special tokens, and no attention sinks.

A few positions of a language model have norms a hundred times the median; a handful of them would hold most of the
variance that an autoencoder is trained to explain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sae_job.activations.statistics import not_finite


def row_norms(activations: torch.Tensor) -> torch.Tensor:
    """L2 norms over the last dimension, float32."""
    return torch.linalg.vector_norm(activations, dim=-1, dtype=torch.float32)


@dataclass(frozen=True)
class SinkFilter:
    """Drops rows whose norm at any hook is above a multiple of that hook's median norm.

    Attributes:
        ratio: the multiple; 0 keeps every row.
        median_norms: per hook, of the calibration batch; empty when the ratio is 0.
    """

    ratio: float
    median_norms: Mapping[str, float]

    @classmethod
    def calibrate(cls, activations: Mapping[str, torch.Tensor], usable: torch.Tensor, ratio: float) -> SinkFilter:
        """Take the medians over the usable positions of one batch.

        Args:
            activations: per hook [contexts, positions, d_in].
            usable: bool [contexts, positions].
            ratio: above 0.

        Raises:
            InvalidInput: a median is infinite or not a number.
        """
        medians = {}
        for hook, values in activations.items():
            norms = row_norms(values)[usable.to(values.device)]
            # Of an even number of norms, the lower of the two in the middle.
            medians[hook] = float(norms.median()) if norms.numel() else 0.0
            if not math.isfinite(medians[hook]):
                raise not_finite(hook, str(values.dtype).removeprefix("torch."))
        return cls(ratio, medians)

    def keep(self, activations: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Rows of activations [..., d_in] that stay, bool [...] on their device; None when all do.

        Rows that are not numbers stay: the sums over a shard refuse them.
        """
        if self.ratio == 0:
            return None
        dropped: torch.Tensor | None = None
        for hook, values in activations.items():
            above = row_norms(values) > self.ratio * self.median_norms[hook]
            dropped = above if dropped is None else dropped | above
        return None if dropped is None else ~dropped
