"""Which positions of contexts may become rows: those of the slice, without excluded tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_operator.api.activation_cache import Sampling


def excluded_token_ids(sampling: Sampling, special_token_ids: Sequence[int]) -> list[int]:
    """Ids of tokens that never become rows, ascending."""
    special = special_token_ids if sampling.exclude_special_tokens else ()
    return sorted({*special, *sampling.exclude_token_ids})


def usable_positions(tokens: Tensor, excluded: Sequence[int], positions: range) -> Tensor:
    """Positions that may become rows before any filter by norm: bool, of the shape of `tokens`.

    Args:
        tokens: integer [..., context].
        excluded: ids of tokens that never become rows.
        positions: positions of a context that may.
    """
    usable = torch.zeros_like(tokens, dtype=torch.bool)
    usable[..., positions.start : positions.stop : positions.step] = True
    if excluded:
        usable &= ~torch.isin(tokens, torch.tensor(sorted(excluded), dtype=tokens.dtype, device=tokens.device))
    return usable
