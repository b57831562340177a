"""The rows of a stored shard: what the parts of hooks that are added later must follow."""

from __future__ import annotations

import torch

from sae_job.activations.format import POSITION, SEQUENCE, ShardLayout
from sae_job.activations.manifest import Sidecar, part_entry
from sae_job.activations.parts import read_tensors
from sae_job.storage.base import ObjectStore


class BaseRows:
    """Which position of which context lies at which place of a shard.

    Args:
        sequence: global index of each row's context, integer [rows].
        position: position in it, integer [rows].
        context_size: positions of a context.
    """

    def __init__(self, sequence: torch.Tensor, position: torch.Tensor, context_size: int) -> None:
        self._context_size = context_size
        self._ids, self._places = (sequence.long() * context_size + position.long()).sort()

    @classmethod
    def read(
        cls, store: ObjectStore, sidecar: Sidecar, layout: ShardLayout, *, rows_per_shard: int, context_size: int
    ) -> BaseRows:
        """From the stored part of group 0.

        Raises:
            InvalidInput: it is missing, or differs from its checksums.
            StoreError: the store cannot be read.
        """
        fields = read_tensors(store, part_entry(sidecar, rows_per_shard), layout, (SEQUENCE, POSITION))
        return cls(fields[SEQUENCE], fields[POSITION], context_size)

    def of_contexts(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the contexts `start` to `stop` (global indices): flat positions from the first of them on, ascending,
        and their places in the shard; both int64 [n]."""
        bounds = torch.tensor([start, stop]) * self._context_size
        first, end = torch.searchsorted(self._ids, bounds).tolist()
        return self._ids[first:end] - bounds[0], self._places[first:end]
