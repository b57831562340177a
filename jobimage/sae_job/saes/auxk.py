"""The auxiliary loss that revives dead latents of TopK SAEs (Gao et al. 2024, appendix A.2).

The dead latents with the largest pre-activations predict what the reconstruction leaves, without `b_dec`: it is a
residual that they predict. The residual is a constant here: the loss must not push the live reconstruction. Only the
weights of dead latents get a gradient, besides what centring sends back to `b_dec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sae_job.saes.kernels.sparse import ActiveLatents, top_k
from sae_job.saes.trainable import Ranks
from sae_operator.api.sae import Architecture

# Weight of the loss where the spec names none: the paper's, and that of SAELens, whose form has no such weight.
DEFAULT_COEFFICIENTS = {"paper": 1 / 32, "saelens": 1.0}
# A residual without variance has nothing left to predict.
_SMALLEST_VARIANCE = 1e-12
# With more dead latents than this many times as many as a row uses, products that touch only these are faster: on a CPU
# both take the same at 3.5 times, for 64 as for 288 of 576 x 4608.
_SPARSE_ABOVE = 4


@dataclass(frozen=True)
class AuxK:
    """How the auxiliary loss is computed.

    `paper`: `coefficient` times the squared error of the prediction relative to the residual's variance. The paper adds
    relative errors; the main loss here is an absolute one, so the term is multiplied by the variance of the target,
    which keeps the paper's proportion between the two. Pre-activations pass a ReLU.

    `saelens`: `coefficient` times the squared error, times the share of `k` that is dead, at most 1. Pre-activations
    are taken as they are, also negative ones.

    Attributes:
        form: `paper` or `saelens`.
        k: dead latents that a row uses.
        coefficient: weight of the loss, above 0.
    """

    form: Literal["paper", "saelens"]
    k: int
    coefficient: float

    @classmethod
    def of(cls, architecture: Architecture, *, d_in: int, d_sae: int) -> Self | None:
        """The loss that an architecture asks for; None where its coefficient is 0."""
        form = architecture.aux_k_form or "paper"
        coefficient = architecture.aux_k_coefficient
        if coefficient is None:
            coefficient = DEFAULT_COEFFICIENTS[form]
        k = architecture.aux_k or max(1, (d_in if form == "paper" else d_sae) // 2)
        return cls(form, k, coefficient) if coefficient > 0 else None


@dataclass(frozen=True)
class AuxiliaryGradients:
    """The loss, and its gradients with respect to the weights of dead latents.

    Attributes:
        loss: this rank's part.
        dead: the dead latents.
        W_enc_T: of their encoder rows.
        b_enc: of their encoder biases.
        W_dec: of their decoder rows.
    """

    loss: Float32[Tensor, ""]
    dead: Int64[Tensor, " n_dead"]
    W_enc_T: Float32[Tensor, "n_dead d_in"]
    b_enc: Float32[Tensor, " n_dead"]
    W_dec: Float32[Tensor, "n_dead d_out"]


def total_variances(
    first: Float32[Tensor, "batch d"], second: Float32[Tensor, "batch d"], ranks: Ranks
) -> tuple[Float32[Tensor, ""], Float32[Tensor, ""]]:
    """Of each the mean over all ranks' rows of the squared distance from their mean."""
    rows = first.shape[0] * ranks.size
    means = ranks.sum_(torch.stack([first.sum(dim=0), second.sum(dim=0)])).div_(rows)
    squares = torch.stack([(first - means[0]).square_().sum(), (second - means[1]).square_().sum()])
    variances = ranks.sum_(squares).div_(rows)
    return variances[0], variances[1]


@torch.no_grad()
def auxiliary_gradients(
    aux: AuxK,
    *,
    dead: Int64[Tensor, " n_dead"],
    pre: Float32[Tensor, "batch n_dead"],
    target: Float32[Tensor, "batch d_out"],
    error: Float32[Tensor, "batch d_out"],
    centred: Float32[Tensor, "batch d_in"],
    W_dec: Float32[Tensor, "d_sae d_out"],
    ranks: Ranks,
) -> AuxiliaryGradients:
    """The auxiliary loss of a batch with dead latents.

    Args:
        aux: how.
        dead: places of the dead latents, at least one.
        pre: their pre-activations.
        target: what is reconstructed.
        error: the reconstruction minus the target.
        centred: the encoder's input.
        ranks: the processes that train together; all of them have the same dead latents.
    """
    rows, n_dead = pre.shape[0] * ranks.size, dead.numel()
    if aux.form == "paper":
        of_target, of_residual = total_variances(target, error, ranks)
        weight = aux.coefficient * of_target / of_residual.clamp_min(_SMALLEST_VARIANCE)
    else:
        weight = error.new_full((), aux.coefficient * min(n_dead / aux.k, 1.0))
    decoder = W_dec.index_select(0, dead)
    k = min(aux.k, n_dead)
    if n_dead > _SPARSE_ABOVE * k:
        values, places = top_k(pre, k)
        features = ActiveLatents(places, values.relu_() if aux.form == "paper" else values, n_dead)
        difference = features.decode(decoder).add_(error)
        loss = weight * difference.square().sum() / rows
        output_gradient = difference.mul_(2 * weight / rows)
        value_gradient = features.value_gradients(output_gradient, decoder)
        if aux.form == "paper":
            value_gradient.mul_(values > 0)
        return AuxiliaryGradients(
            loss,
            dead,
            W_enc_T=features.weight_gradient(centred, value_gradient),
            b_enc=features.sum_by_latent(value_gradient),
            W_dec=features.weight_gradient(output_gradient, features.values),
        )
    used = torch.ones_like(pre, dtype=torch.bool)
    if k < n_dead:
        used = torch.zeros_like(used).scatter_(1, top_k(pre, k)[1], True)
    if aux.form == "paper":
        used &= pre > 0
    features = pre * used
    difference = torch.addmm(error, features, decoder)
    loss = weight * difference.square().sum() / rows
    output_gradient = difference.mul_(2 * weight / rows)
    value_gradient = (output_gradient @ decoder.T).mul_(used)
    return AuxiliaryGradients(
        loss,
        dead,
        W_enc_T=value_gradient.T @ centred,
        b_enc=value_gradient.sum(dim=0),
        W_dec=features.T @ output_gradient,
    )
