"""Memory that steps write and use again: fresh pages would cost a step as much as a product."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class StepMemory:
    """What a step writes and nobody reads after it.

    SAEs that step one after another may share it: what is of size batch x d_sae is then there once, whatever their
    number and their sizes.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, *shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor for a purpose, with whatever it held before; the next one of this name overwrites it."""
        key, size = (name, dtype, device), math.prod(shape)
        if key not in self._held or self._held[key].numel() < size:
            # The smaller one goes before the larger one comes.
            self._held.pop(key, None)
            self._held[key] = torch.empty(size, dtype=dtype, device=device)
        return self._held[key][:size].view(shape)

    @property
    def bytes(self) -> int:
        """What is held."""
        return sum(tensor.nbytes for tensor in self._held.values())
