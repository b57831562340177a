"""Contexts of a cache by their global index, from the blocks that prepare stored."""

from __future__ import annotations

import bisect
from itertools import accumulate

import torch

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectStore
from sae_job.text.blocks import read_block
from sae_job.text.plan import INDEX_KEY, CacheIndex


class ContextReader:
    """Reads contexts; keeps the block that was read last.

    Args:
        store: the cache's folder.
        index: its plan.
    """

    def __init__(self, store: ObjectStore, index: CacheIndex) -> None:
        self._store = store
        self._index = index
        self._ends = list(accumulate(block.contexts for block in index.blocks))
        self._block: tuple[int, torch.Tensor] | None = None

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Contexts `start` to `stop` (global indices, in shuffled order), int32 [stop - start, context_size].

        Raises:
            InvalidInput: a block is missing or damaged.
        """
        parts = []
        while start < stop:
            number = bisect.bisect_right(self._ends, start)
            if number == len(self._ends):
                raise InvalidInput(
                    "CorruptTokens",
                    f"{self._store.uri}/{INDEX_KEY} plans contexts that no block holds: remove it and retry",
                )
            first = self._ends[number] - self._index.blocks[number].contexts
            end = min(stop, self._ends[number])
            parts.append(self._read_block(number)[start - first : end - first])
            start = end
        return torch.cat(parts) if parts else torch.empty((0, self._index.context_size), dtype=torch.int32)

    def _read_block(self, number: int) -> torch.Tensor:
        if self._block is None or self._block[0] != number:
            self._block = (number, read_block(self._store, number, sha256=self._index.blocks[number].sha256))
        return self._block[1]
