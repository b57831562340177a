"""The loss that pulls dead latents of a JumpReLU SAE up to their thresholds (Conerly et al. 2025).

    loss = coefficient mean over rows of sum over dead j of relu(theta_j - pre_j) |W_dec_j|

The paper has it for all latents; here, as in what is widely used, it is for dead ones alone. Pre-activations,
thresholds and decoder norms all have a gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

_SMALLEST_NORM = 1e-12


class PreActivationLoss:
    """The loss and gradients of one step, gathered from its blocks of rows.

    Args:
        dead: places of the dead latents; at least one.
        threshold: of all latents.
        norms: of all decoder rows.
        d_in: width of the encoder's input.
        weight: coefficient over the number of the batch's rows.

    Attributes:
        loss: this rank's part.
    """

    def __init__(
        self,
        dead: Int64[Tensor, " n_dead"],
        threshold: Float32[Tensor, " d_sae"],
        norms: Float32[Tensor, " d_sae"],
        d_in: int,
        weight: float,
    ) -> None:
        self.loss: Float32[Tensor, ""] = norms.new_zeros(())
        self._dead = dead
        self._threshold = threshold.index_select(0, dead)
        self._norms = norms.index_select(0, dead)
        self._weight = weight
        self._encoder = norms.new_zeros(dead.numel(), d_in)
        self._below = torch.zeros_like(self._norms)
        self._gaps = torch.zeros_like(self._norms)

    def add(self, pre: Float32[Tensor, "block n_dead"], centred: Float32[Tensor, "block d_in"]) -> None:
        """Add a block: the dead latents' pre-activations, and the encoder's input."""
        gaps = (self._threshold - pre).relu_()
        below = (gaps > 0).to(gaps.dtype)
        self._gaps += gaps.sum(dim=0)
        self._below += below.sum(dim=0)
        self._encoder.addmm_(below.T, centred)

    def add_to(
        self,
        encoder_gradient: Float32[Tensor, "d_sae d_in"],
        bias_gradient: Float32[Tensor, " d_sae"],
        threshold_gradient: Float32[Tensor, " d_sae"],
        decoder_gradient: Float32[Tensor, "d_sae d_out"],
        W_dec: Float32[Tensor, "d_sae d_out"],
    ) -> None:
        """Complete the loss, and add its gradients to those of all latents."""
        slopes = self._norms * self._weight
        self.loss += torch.dot(self._gaps, slopes)
        encoder_gradient.index_add_(0, self._dead, self._encoder * slopes.unsqueeze(1), alpha=-1)
        bias_gradient.index_add_(0, self._dead, self._below * slopes, alpha=-1)
        threshold_gradient.index_add_(0, self._dead, self._below * slopes)
        directions = W_dec.index_select(0, self._dead) / self._norms.clamp_min(_SMALLEST_NORM).unsqueeze(1)
        decoder_gradient.index_add_(0, self._dead, directions * (self._gaps * self._weight).unsqueeze(1))
