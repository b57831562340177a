"""The auxiliary loss that revives dead latents of a TopK SAE (Gao et al. 2024, appendix A.2).

The dead latents with the largest pre-activations predict what the live ones leave. The residual is a constant here:
the loss must not push the live reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from sae_job.saes.kernels.sparse import ActiveLatents

# A residual without variance has nothing left to predict.
_SMALLEST_VARIANCE = 1e-12


@dataclass(frozen=True)
class AuxiliaryLoss:
    """The loss, and its gradients."""

    loss: Float32[Tensor, ""]
    encoder_gradient: Float32[Tensor, "d_sae d_in"]
    encoder_bias_gradient: Float32[Tensor, " d_sae"]
    decoder_gradient: Float32[Tensor, "d_sae d_in"]


def _total_variance(rows: Float32[Tensor, "batch d_in"]) -> Float32[Tensor, ""]:
    """Mean over rows of the squared distance from their mean."""
    return (rows - rows.mean(dim=0)).square().sum() / rows.shape[0]


def auxiliary_loss(
    *,
    pre: Float32[Tensor, "batch d_sae"],
    dead: Bool[Tensor, " d_sae"],
    x: Float32[Tensor, "batch d_in"],
    residual: Float32[Tensor, "batch d_in"],
    centred: Float32[Tensor, "batch d_in"],
    W_dec: Float32[Tensor, "d_sae d_in"],
    k: int,
    coefficient: float,
) -> AuxiliaryLoss:
    """`coefficient` times the dead latents' error in predicting the residual, relative to its variance.

    The paper adds relative errors; the main loss here is an absolute one, so the whole term is multiplied by the
    variance of `x`, which keeps the paper's proportion between the two. The prediction has no `b_dec`: it is of a
    residual.
    """
    batch, d_sae = pre.shape
    indices_of_dead = dead.nonzero().squeeze(1)
    k = min(k, indices_of_dead.numel())
    if k == 0:
        zeros = torch.zeros_like(W_dec)
        return AuxiliaryLoss(residual.new_zeros(()), zeros, pre.new_zeros(d_sae), zeros)
    values, places = pre.index_select(1, indices_of_dead).topk(k, dim=1, sorted=False)
    active = ActiveLatents(indices_of_dead[places], values.relu_(), d_sae)
    error = active.decode(W_dec).sub_(residual)
    weight = coefficient * _total_variance(x) / _total_variance(residual).clamp_min(_SMALLEST_VARIANCE)
    loss = weight * error.square().sum() / batch
    output_gradient = error * (2 * weight / batch)
    value_gradient = active.value_gradients(output_gradient, W_dec).mul_(active.values > 0)
    return AuxiliaryLoss(
        loss=loss,
        encoder_gradient=active.weight_gradient(centred, value_gradient),
        encoder_bias_gradient=active.sum_by_latent(value_gradient),
        decoder_gradient=active.weight_gradient(output_gradient, active.values),
    )
