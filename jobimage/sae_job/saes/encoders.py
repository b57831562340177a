"""From a centred input to the activations of the latents: each architecture's own part, in one table.

Notation: x is the input after `b_dec` was subtracted, where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_job.saes.kernels.sparse import ActiveLatents, places_of, top_k

if TYPE_CHECKING:
    from sae_job.saes.base import SAE

# Share of active latents up to which decoding them alone is faster than the dense product: measured, it is between one
# in five and one in four, at any width; but their places take memory.
_FEW = 1 / 16

# Called with the pre-activations; returns what goes on in their place, and whether that may be overwritten.
AtPre = Callable[[Tensor], tuple[Tensor, bool]]


@dataclass(frozen=True)
class Encoder:
    """An architecture's encoder.

    Attributes:
        parameters: names of its parameters of one number per latent, [d_sae] each.
        scaled_by_decoder_norms: those of them that grow with pre-activations when decoder norms are folded.
        encode: activations [..., d_sae] of x [..., d_in].
    """

    parameters: tuple[str, ...]
    scaled_by_decoder_norms: tuple[str, ...]
    encode: Callable[[SAE, Float[Tensor, "... d_in"], AtPre], Float[Tensor, "... d_sae"]]


def _activate(pre: Tensor, free: bool, activation: str) -> Tensor:
    """relu(pre), or tanh(relu(pre)); over `pre` itself where it is free."""
    rectified = pre.relu_() if free else pre.relu()
    return rectified.tanh() if activation == "tanh-relu" else rectified


def _without(features: Tensor, mask: Tensor, free: bool) -> Tensor:
    """0 where the mask is true."""
    return features.masked_fill_(mask, 0) if free else features.masked_fill(mask, 0)


def largest(pre: Float[Tensor, "... d_sae"], k: int) -> tuple[Float[Tensor, "... k"], Int64[Tensor, "... k"]]:
    """ReLU of the k largest pre-activations of each row, and their latents (Gao et al. 2024)."""
    values, indices = top_k(pre.reshape(-1, pre.shape[-1]), k)
    shape = (*pre.shape[:-1], k)
    return values.relu().view(shape), indices.view(shape)


def _encode_linear(sae: SAE, x: Float[Tensor, "... d_in"], at_pre: AtPre) -> Float[Tensor, "... d_sae"]:
    """f = activation(x W_enc + b_enc)."""
    pre, free = at_pre(_affine(x, sae.W_enc, sae.b_enc))
    if not sae.cfg.uses_top_k:
        return _activate(pre, free, sae.cfg.activation_fn_str)
    values, indices = largest(pre, sae.cfg.k)
    return (pre.zero_() if free else torch.zeros_like(pre)).scatter_(-1, indices, values)


def encode_largest(sae: SAE, x: Float[Tensor, "... d_in"]) -> tuple[Float[Tensor, "... d_sae"], ActiveLatents]:
    """Activations of an SAE that uses top-k, dense, and the rows' active latents alone."""
    pre = _affine(x, sae.W_enc, sae.b_enc)
    values, indices = largest(pre, sae.cfg.k)
    features = pre.zero_().scatter_(-1, indices, values)
    return features, ActiveLatents(indices.view(-1, sae.cfg.k), values.view(-1, sae.cfg.k), sae.cfg.d_sae)


def few_active(features: Float[Tensor, "... d_sae"]) -> ActiveLatents | None:
    """The rows' active latents, where they are so few that decoding them alone is faster; else None.

    What is not 0 counts as active, NaN included. On a GPU the dense product is fast, and counting holds it up: None.
    """
    if features.device.type != "cpu" or features.requires_grad:
        return None
    d_sae = features.shape[-1]
    flat = features.reshape(-1)
    places = places_of(flat != 0)
    if len(places) > _FEW * len(flat):
        return None
    rows = places.div(d_sae, rounding_mode="floor")
    return ActiveLatents.ragged(rows, places - rows * d_sae, flat[places], len(flat) // d_sae, d_sae)


def _encode_gated(sae: SAE, x: Float[Tensor, "... d_in"], at_pre: AtPre) -> Float[Tensor, "... d_sae"]:
    """f = 1[x W_enc + b_gate > 0] activation(x (W_enc exp(r_mag)) + b_mag) (Rajamanoharan et al. 2024a, eq. 3 to 5).

    The two products are one: the second is the first, latent by latent times exp(r_mag).
    """
    product = x @ sae.W_enc
    closed = product <= -sae.b_gate
    stretch = sae.r_mag.exp()
    # Over the product itself, where nobody traces it.
    traced = product.requires_grad or stretch.requires_grad or sae.b_mag.requires_grad
    magnitudes, free = at_pre(torch.addcmul(sae.b_mag, product, stretch, out=None if traced else product))
    return _without(_activate(magnitudes, free, sae.cfg.activation_fn_str), closed, free)


def _encode_jumprelu(sae: SAE, x: Float[Tensor, "... d_in"], at_pre: AtPre) -> Float[Tensor, "... d_sae"]:
    """f = relu(pre) 1[pre > threshold] (Rajamanoharan et al. 2024b, eq. 3); a threshold may lie below 0."""
    pre, free = at_pre(_affine(x, sae.W_enc, sae.b_enc))
    below = pre <= sae.threshold
    return _without(_activate(pre, free, "relu"), below, free)


def _affine(x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_in d_sae"], bias: Tensor) -> Tensor:
    """x weight + bias without a copy in between."""
    return torch.nn.functional.linear(x, weight.T, bias)


ENCODERS: dict[str, Encoder] = {
    "standard": Encoder(("b_enc",), ("b_enc",), _encode_linear),
    "topk": Encoder(("b_enc",), ("b_enc",), _encode_linear),
    "jumprelu": Encoder(("b_enc", "threshold"), ("b_enc", "threshold"), _encode_jumprelu),
    # r_mag is an exponent: the magnitudes grow with W_enc and b_mag alone.
    "gated": Encoder(("b_gate", "r_mag", "b_mag"), ("b_gate", "b_mag"), _encode_gated),
}
