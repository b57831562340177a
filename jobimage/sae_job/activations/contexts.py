"""Contexts of a cache by their global index, from the blocks that prepare stored."""

from __future__ import annotations

import bisect
import hashlib
import json
from itertools import accumulate

import torch

from sae_job.activations.format import FormatError, parse_layout
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore
from sae_job.text.plan import INDEX_KEY, CacheIndex, block_key, block_sidecar_key

CONTEXTS = "contexts"


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
                raise self._damaged(INDEX_KEY)
            first = self._ends[number] - self._index.blocks[number].contexts
            end = min(stop, self._ends[number])
            parts.append(self._read_block(number)[start - first : end - first])
            start = end
        return torch.cat(parts) if parts else torch.empty((0, self._index.context_size), dtype=torch.int32)

    def _read_block(self, number: int) -> torch.Tensor:
        if self._block is None or self._block[0] != number:
            self._block = (number, self._load_block(number))
        return self._block[1]

    def _load_block(self, number: int) -> torch.Tensor:
        key = block_key(number)
        try:
            data = bytearray(self._store.get(key))
            proof = json.loads(self._store.get(block_sidecar_key(number)))["sha256"]
            contexts = parse_layout(memoryview(data)).tensor(memoryview(data), CONTEXTS)
        except (ObjectNotFound, FormatError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(key) from error
        shape = (self._index.blocks[number].contexts, self._index.context_size)
        if hashlib.sha256(data).hexdigest() != proof or contexts.dtype != torch.int32 or tuple(contexts.shape) != shape:
            raise self._damaged(key)
        return contexts

    def _damaged(self, key: str) -> InvalidInput:
        return InvalidInput(
            "CorruptTokens",
            f"{self._store.uri}/{key} is missing or damaged: delete the cache's tokens/ folder, and raise spec.retry "
            "to write it again",
        )
