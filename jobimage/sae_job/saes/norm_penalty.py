"""The sparsity penalty of standard SAEs: the mean over rows of the p-norm of a row's activations.

Each activation may be weighted by its decoder row's norm (Conerly et al. 2024); the norm then has a gradient too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_job.saes.kernels.sparse import ActiveLatents

_SMALLEST_NORM = 1e-12


@dataclass
class NormPenalty:
    """The penalty of one step, gathered from its blocks of rows.

    With p = 1 its slope is the same for all of a latent's activations, so that it costs no pass over them:
    `constant_slopes` is the bias of the product that gives the activations' gradient.

    Args:
        p: of the norm, above 0.
        weight: the penalty's coefficient over the number of the batch's rows.
        norms: of the decoder's rows; None where activations are not weighted by them.
        d_sae: number of latents.
        device: where the SAE lies.
    """

    p: float
    weight: float
    norms: Float32[Tensor, " d_sae"] | None
    d_sae: int
    device: torch.device

    def __post_init__(self) -> None:
        self._loss = torch.zeros((), device=self.device)
        # Of each latent: the sum over rows of activation times slope, its penalty where p = 1 and there are no norms.
        self._by_latent = torch.zeros(self.d_sae, device=self.device)
        flat = torch.full((self.d_sae,), self.weight, device=self.device)
        flat = flat if self.norms is None else flat * self.norms
        self.constant_slopes: Float32[Tensor, " d_sae"] = flat if self.p == 1 else torch.zeros_like(flat)

    def add_block(
        self, features: Float32[Tensor, "block d_sae"], feature_gradient: Float32[Tensor, "block d_sae"]
    ) -> None:
        """Add a block of activations; their gradient, which holds `constant_slopes` already, gets the rest."""
        if self.p == 1:
            self._by_latent += features.sum(dim=0)
            return
        weighted = features if self.norms is None else features * self.norms
        row_norms = torch.linalg.vector_norm(weighted, ord=self.p, dim=1, keepdim=True)
        self._loss += self.weight * row_norms.sum()
        # d||a||_p / da = (a / ||a||_p)^(p - 1) for a >= 0; zero where nothing is active.
        slopes = (weighted / row_norms.clamp_min(_SMALLEST_NORM)).pow_(self.p - 1)
        slopes.masked_fill_(weighted <= 0, 0.0).mul_(self.weight)
        if self.norms is not None:
            self._by_latent += (slopes * features).sum(dim=0)
            slopes *= self.norms
        feature_gradient += slopes

    def add_active(self, active: ActiveLatents, value_gradient: Float32[Tensor, " n"]) -> None:
        """The same of ragged active latents; their values' gradient gets all of the penalty's."""
        if self.p == 1:
            self._by_latent += active.sum_by_latent(active.values)
            value_gradient += self.constant_slopes[active.latents]
            return
        norms = None if self.norms is None else self.norms[active.latents]
        weighted = active.values if norms is None else active.values * norms
        row_norms = active.sum_by_row(weighted.pow(self.p)).pow_(1 / self.p)
        self._loss += self.weight * row_norms.sum()
        slopes = (weighted / row_norms.clamp_min(_SMALLEST_NORM)[active.rows]).pow_(self.p - 1)
        slopes.masked_fill_(weighted <= 0, 0.0).mul_(self.weight)
        if norms is not None:
            self._by_latent += active.sum_by_latent(slopes * active.values)
            slopes *= norms
        value_gradient += slopes

    def finish(
        self, W_dec: Float32[Tensor, "d_sae d_out"], decoder_gradient: Float32[Tensor, "d_sae d_out"]
    ) -> Float32[Tensor, ""]:
        """This rank's part of the loss; the gradient by way of the decoder's norms is added to the given one."""
        by_norm = self._by_latent * self.weight if self.p == 1 else self._by_latent
        if self.norms is None:
            return by_norm.sum() if self.p == 1 else self._loss
        decoder_gradient.addcmul_(W_dec, (by_norm / self.norms.clamp_min(_SMALLEST_NORM)).unsqueeze(1))
        return torch.dot(by_norm, self.norms) if self.p == 1 else self._loss
