"""Inputs of SAEs on the outputs of attention heads: [..., n_heads, d_head] as well as flat."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

Heads = tuple[int, int]


def flatten_heads(x: Float[Tensor, ...], d_in: int) -> tuple[Float[Tensor, "... d_in"], Heads | None]:
    """Flat rows, and n_heads and d_head where the input had them; an input whose last size is d_in is flat.

    Raises:
        ValueError: the input is neither flat nor of heads that make d_in dimensions.
    """
    if x.shape[-1] == d_in:
        return x, None
    heads = (x.shape[-2], x.shape[-1]) if x.dim() > 1 else (1, x.shape[-1])
    if math.prod(heads) != d_in:
        raise ValueError(f"inputs are {list(x.shape)}, but the last two sizes must multiply to {d_in}")
    return x.flatten(-2), heads


def with_heads(y: Float[Tensor, "... d_in"], heads: Heads | None) -> Float[Tensor, ...]:
    """The inverse."""
    return y if heads is None else y.unflatten(-1, heads)
