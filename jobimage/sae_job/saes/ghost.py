"""Ghost gradients, which revive dead latents of a standard SAE (Jermyn and Templeton 2024).

Dead latents predict what the live ones leave, with exponentials in place of activations, so that a latent that never
fires has a gradient. With r = target - reconstruction, D the dead latents and sg for "taken as a constant":

    g = exp(pre_D) W_dec_D        h = g sg(|r| / (1e-6 + 2 |g|))        by row
    e = w (h - sg(r))^2           loss = mean over rows of sum over d_out of sg(w r^2 / (e + 1e-6)) e

where w weights the rows as in the reconstruction loss. The scale is exact for a prediction that is multiplied by any
number, so each row's largest pre-activation is taken off before the exponential, which then cannot overflow.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sae_job.saes.penalized import Step

_SMALLEST = 1e-6


class GhostGradients:
    """The loss and gradients of one step, gathered from its blocks of rows.

    Args:
        dead: places of the dead latents; at least one.
        W_dec: decoder.
        d_in: width of the encoder's input.
        rows: of the whole batch, over all ranks.

    Attributes:
        loss: this rank's part.
    """

    def __init__(self, dead: Int64[Tensor, " n_dead"], W_dec: Float32[Tensor, "d_sae d_out"], d_in: int, rows: int):
        self.loss: Float32[Tensor, ""] = W_dec.new_zeros(())
        self._dead = dead
        self._rows = rows
        self._W_dec = W_dec.index_select(0, dead)
        self._encoder = W_dec.new_zeros(dead.numel(), d_in)
        self._bias = W_dec.new_zeros(dead.numel())
        self._decoder = torch.zeros_like(self._W_dec)

    def add(
        self,
        pre: Float32[Tensor, "block n_dead"],
        centred: Float32[Tensor, "block d_in"],
        error: Float32[Tensor, "block d_out"],
        weights: Float32[Tensor, "block 1"] | None,
    ) -> None:
        """Add a block.

        Args:
            pre: pre-activations of the dead latents.
            centred: the encoder's input.
            error: reconstruction minus target.
            weights: of the rows; None where they are 1.
        """
        largest = pre.amax(dim=1, keepdim=True)
        strengths = torch.exp(pre - largest)
        prediction = strengths @ self._W_dec
        # exp(-largest) brings the guard against division by zero to the same scale.
        norms = torch.linalg.vector_norm(prediction, dim=1, keepdim=True)
        guard = torch.exp(-largest).mul_(_SMALLEST).add_(2 * norms)
        scale = torch.linalg.vector_norm(error, dim=1, keepdim=True).div_(guard)
        strengths.mul_(scale)
        difference = prediction.mul_(scale).add_(error)  # h - r
        squared, wanted = difference.square(), error.square()
        if weights is not None:
            squared.mul_(weights)
            wanted.mul_(weights)
        factor = wanted.div_(squared + _SMALLEST)
        self.loss += squared.mul_(factor).sum() / self._rows
        slope = difference.mul_(factor).mul_(2 / self._rows)
        if weights is not None:
            slope.mul_(weights)
        pre_gradient = (slope @ self._W_dec.T).mul_(strengths)
        self._encoder.addmm_(pre_gradient.T, centred)
        self._bias += pre_gradient.sum(dim=0)
        self._decoder.addmm_(strengths.T, slope)

    def add_to(
        self,
        encoder_gradient: Float32[Tensor, "d_sae d_in"],
        bias_gradient: Float32[Tensor, " d_sae"],
        decoder_gradient: Float32[Tensor, "d_sae d_out"],
    ) -> None:
        """Add what was gathered to the gradients of all latents."""
        encoder_gradient.index_add_(0, self._dead, self._encoder)
        bias_gradient.index_add_(0, self._dead, self._bias)
        decoder_gradient.index_add_(0, self._dead, self._decoder)


def ghost_gradients(step: Step, W_dec: Float32[Tensor, "d_sae d_out"], d_in: int) -> GhostGradients | None:
    """For a step with dead latents to revive; None, without any cost, in others."""
    return None if step.dead is None else GhostGradients(step.dead, W_dec, d_in, step.rows)
