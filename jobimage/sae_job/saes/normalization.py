"""Normalisation of each activation on its own, before an SAE and back after it.

An SAE with such a normalisation lives in the normalised space, `b_dec` included. What the normalisation took from a
row is handed on from encoding to decoding, so that one SAE may be used on several inputs at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

CONSTANT_NORM = "constant_norm_rescale"
LAYER_NORM = "layer_norm"
RUN_TIME_NORMALIZATIONS = (CONSTANT_NORM, LAYER_NORM)

# A row's norm counts as at least this: a row of zeros stays zero.
_SMALLEST_NORM = 1e-12
# Added to a row's standard deviation, as in the format's other implementations.
_LAYER_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class RowStatistics:
    """What a normalisation took from rows: `x = normalised * scale + offset`.

    Attributes:
        scale: [..., 1], in float32 or finer.
        offset: [..., 1], or None where it is 0.
    """

    scale: Float[Tensor, "... 1"]
    offset: Float[Tensor, "... 1"] | None = None


def normalize_rows(
    x: Float[Tensor, "... d_in"], normalization: str, *, out: Tensor | None = None
) -> tuple[Float[Tensor, "... d_in"], RowStatistics | None]:
    """Rows as an SAE of this normalisation takes them, and what `denormalize_rows` needs to undo it.

    - `constant_norm_rescale`: every norm becomes sqrt(d_in); a row of zeros stays as it is.
    - `layer_norm`: (x - mean) / (s + 1e-5), with s the standard deviation over d_in (its divisor is d_in - 1).
    - any other: the rows themselves, and None.

    Args:
        x: rows; those in less than float32 are normalised in float32.
        normalization: its name.
        out: where the result goes, of the same shape in float32 or finer; may be `x` itself.
    """
    if normalization not in RUN_TIME_NORMALIZATIONS:
        return x, None
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if normalization == CONSTANT_NORM:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.clamp_min_(_SMALLEST_NORM).div_(math.sqrt(x.shape[-1]))
        return torch.div(x, scale, out=out), RowStatistics(scale)
    mean = x.mean(dim=-1, keepdim=True)
    centred = torch.sub(x, mean, out=out)
    scale = centred.std(dim=-1, keepdim=True).add_(_LAYER_NORM_EPSILON)
    return torch.div(centred, scale, out=out), RowStatistics(scale, mean)


def denormalize_rows(y: Float[Tensor, "... d_in"], statistics: RowStatistics | None) -> Float[Tensor, "... d_in"]:
    """The inverse of `normalize_rows`, in the number format of `y`."""
    if statistics is None:
        return y
    raw = y * statistics.scale
    return (raw if statistics.offset is None else raw + statistics.offset).to(y.dtype)
