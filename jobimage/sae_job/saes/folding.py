"""Changes of an SAE's weights that leave its reconstructions as they are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sae_job.saes.encoders import ENCODERS
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS

if TYPE_CHECKING:
    from sae_job.saes.base import SAE

# Decoder norms that differ by less, relatively, are equal but for rounding.
_EQUAL = 1e-5


@torch.no_grad()
def fold_activation_scale(sae: SAE, scale: float, target_scale: float | None = None) -> None:
    """Make an SAE take raw activations where it took activations times `scale`.

    Afterwards `encode(x)` is what `encode(scale * x)` was, and `decode(f)` is what `decode(f) / target_scale` was.

    Args:
        scale: factor of the inputs.
        target_scale: factor of what a transcoder reconstructs; `scale` when None.

    Raises:
        ValueError: the SAE normalises each activation, so that it never saw a scale; or it is an autoencoder, and the
            two factors differ.
    """
    if sae.cfg.normalize_activations in RUN_TIME_NORMALIZATIONS:
        raise ValueError(f"an SAE with {sae.cfg.normalize_activations} has no scale to fold")
    target_scale = scale if target_scale is None else target_scale
    if target_scale != scale and not sae.cfg.is_transcoder:
        raise ValueError("inputs and reconstructions of an autoencoder have one scale")
    sae.W_enc *= scale
    sae.W_dec /= target_scale
    sae.b_dec /= target_scale
    if sae.cfg.skip_connection:
        sae.W_skip *= scale / target_scale
    sae.cfg = dataclasses.replace(sae.cfg, normalize_activations="none")


@torch.no_grad()
def fold_decoder_norms(sae: SAE) -> None:
    """Bring the decoder's rows to unit norm; activations of latents grow by the norms that were there.

    With n the norms: W_dec[i] /= n[i], W_enc[:, i] *= n[i], and so for what is added to pre-activations or compared
    with them. A row of zeros stays one.

    Raises:
        ValueError: the SAE's activation function does not commute with a factor: the k largest of n times the
            pre-activations are others than the k largest of these unless all norms are equal, and tanh(n x) is not
            n tanh(x).
    """
    norms = _norms(sae)
    # Any factor goes with a row of zeros: where the largest are chosen, the one that keeps its latent's place.
    norms.masked_fill_(norms == 0, float(norms.max()) if sae.cfg.uses_top_k and bool(norms.any()) else 1.0)
    if sae.cfg.uses_top_k and float(norms.max()) > float(norms.min()) * (1 + _EQUAL):
        raise ValueError(
            f"decoder norms of this SAE lie between {float(norms.min()):.4g} and {float(norms.max()):.4g}: folding "
            "them would change which latents are the k largest"
        )
    if sae.cfg.activation_fn_str == "tanh-relu" and float((norms - 1).abs().max()) > _EQUAL:
        raise ValueError("decoder norms of an SAE with tanh-relu cannot be folded: tanh does not commute with a factor")
    _fold(sae, norms)


@torch.no_grad()
def fold_rescaling_by_decoder_norm(sae: SAE) -> None:
    """Where decoder norms count in the choice of the k largest (`rescale_acts_by_decoder_norm`), fold them, which makes
    the choice of the folded weights the same."""
    _fold(sae, _norms(sae))
    sae.cfg = dataclasses.replace(sae.cfg, rescale_acts_by_decoder_norm=False)


def _norms(sae: SAE) -> Float[Tensor, " d_sae"]:
    """Norms of the decoder's rows, in float32 or finer."""
    wide = sae.W_dec.to(torch.promote_types(sae.W_dec.dtype, torch.float32))
    return torch.linalg.vector_norm(wide, dim=1)


def _fold(sae: SAE, norms: Float[Tensor, " d_sae"]) -> None:
    sae.W_dec.copy_(sae.W_dec / norms.masked_fill(norms == 0, 1).unsqueeze(1))
    sae.W_enc.copy_(sae.W_enc * norms)
    for name in ENCODERS[sae.cfg.architecture].scaled_by_decoder_norms:
        parameter = getattr(sae, name)
        parameter.copy_(parameter * norms)
