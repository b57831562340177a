"""Ranks as threads of this process: each runs the same function, and sums and gathers meet at a barrier."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
# A rank that waits so many seconds waits for one that has stopped.
_PATIENCE = 30


class SimulatedRank:
    """One of several ranks in threads."""

    def __init__(self, index: int, shared: list[Tensor | None], barrier: Barrier) -> None:
        self.index = index
        self.size = len(shared)
        self._shared = shared
        self._barrier = barrier

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._shared[self.index] = tensor.clone()
        self._barrier.wait()
        parts = [part.clone() for part in self._shared if part is not None]
        self._barrier.wait()
        return parts

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self._exchange(tensor)).sum(dim=0))

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._exchange(tensor))


def on_ranks(size: int, function: Callable[[SimulatedRank], Result]) -> list[Result]:
    """The function's results on each of several ranks."""
    barrier = Barrier(size, timeout=_PATIENCE)
    shared: list[Tensor | None] = [None] * size

    def run(index: int) -> Result:
        try:
            return function(SimulatedRank(index, shared, barrier))
        except BaseException:
            barrier.abort()  # or the others would wait
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
