"""Rows of several shards gathered into one batch, and decoded."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from sae_job.activations.codecs import Codec, Plain
from sae_job.activations.format import ALIGNMENT

# Blocks of memory that are kept for later batches: of one batch of many hooks, and of the one before it.
MOST_FREE = 64


@dataclass(frozen=True)
class ShardTensors:
    """A shard in memory.

    Attributes:
        stored: hook -> suffix -> what is stored of its rows, [rows, ...]; valid while the shard is held.
        constants: hook -> suffix -> what is stored once for the shard; valid as long as this is.
        kept: which rows may be given out, bool [rows]; None when all.
    """

    stored: Mapping[str, Mapping[str, torch.Tensor]]
    constants: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    kept: np.ndarray | None = None
    _on_device: dict[torch.device, Mapping[str, Mapping[str, torch.Tensor]]] = field(default_factory=dict)

    @cached_property
    def items(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        """`stored`, each row as one opaque item."""
        return {
            hook: {suffix: _as_items(tensor) for suffix, tensor in tensors.items()}
            for hook, tensors in self.stored.items()
        }

    def constants_on(self, device: torch.device) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """The constants, copied to a device once: such a copy waits for all work that is queued there."""
        if device not in self._on_device:
            self._on_device[device] = {
                hook: {suffix: tensor.to(device) for suffix, tensor in constants.items()}
                for hook, constants in self.constants.items()
            }
        return self._on_device[device]


class BatchMemory:
    """Memory for batches, used again once nothing refers to it any more: touching fresh pages costs three times as much
    as copying rows there.

    Where there is a GPU it is pinned, and torch itself keeps it.

    Args:
        reused: False for what is gathered once: then it is pageable, and nobody keeps it.
    """

    def __init__(self, *, reused: bool = True) -> None:
        self._reused = reused
        self._pinned = reused and torch.cuda.is_available()
        self._free: list[np.ndarray] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with any content; its memory comes back when the last tensor over it is gone."""
        size = math.prod(shape) * dtype.itemsize
        if self._pinned or not self._reused or size == 0:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=self._pinned)
        block = self._block(size)
        start = -block.ctypes.data % ALIGNMENT
        memory = block[start : start + size]
        # The tensor's storage holds this very view.
        weakref.finalize(memory, self._give_back, block).atexit = False
        return torch.from_numpy(memory).view(dtype).view(tuple(shape))

    def _block(self, size: int) -> np.ndarray:
        for number, block in enumerate(self._free):
            if len(block) == size + ALIGNMENT:
                return self._free.pop(number)
        return np.empty(size + ALIGNMENT, dtype=np.uint8)

    def _give_back(self, block: np.ndarray) -> None:
        if len(self._free) < MOST_FREE:
            self._free.append(block)


class Batch:
    """Rows that are being gathered.

    Args:
        hooks: width of each hook.
        codec: how rows are stored.
        rows: rows of the full batch.
        memory: where they go.
    """

    def __init__(self, hooks: Mapping[str, int], codec: Codec, rows: int, memory: BatchMemory) -> None:
        self._codec = codec
        self._memory = memory
        self._stored = {
            hook: {suffix: memory.empty((rows, *shape), dtype) for suffix, dtype, shape in codec.row_tensors(width)}
            for hook, width in hooks.items()
        }
        self._items = {
            hook: {suffix: _as_items(tensor) for suffix, tensor in tensors.items()}
            for hook, tensors in self._stored.items()
        }
        self._widths = hooks
        self._runs: list[tuple[ShardTensors, int, int]] = []
        self._filled = 0

    def add(self, shard: ShardTensors, rows: np.ndarray) -> None:
        """Append rows of a shard, by their places in it, int64 [n].

        By numpy, which lets go of the interpreter once, for the copy: torch does for every view, and then waits for
        threads that are busy with requests.
        """
        start, stop = self._filled, self._filled + len(rows)
        for hook, items in self._items.items():
            for suffix, there in items.items():
                np.take(shard.items[hook][suffix], rows, out=there[start:stop], mode="clip")
        self._runs.append((shard, start, stop))
        self._filled = stop

    def decoded(self, device: torch.device | None) -> dict[str, torch.Tensor]:
        """The full batch, per hook [rows, d_in]: in storage dtype on the CPU, or, where that is an 8-bit one, float32,
        on `device` if that is a GPU and on the CPU otherwise."""
        return {hook: self._decoded(hook, tensors, device) for hook, tensors in self._stored.items()}

    def _decoded(self, hook: str, tensors: dict[str, torch.Tensor], device: torch.device | None) -> torch.Tensor:
        width = self._widths[hook]
        if isinstance(self._codec, Plain):
            return self._codec.decode(tensors, {})
        if device is not None and device.type == "cuda":
            tensors = {suffix: tensor.to(device, non_blocking=True) for suffix, tensor in tensors.items()}
        if not self._codec.constants(width):
            return self._codec.decode(tensors, {})
        there = next(iter(tensors.values())).device
        found = (
            self._memory.empty((self._filled, width), torch.float32)
            if there.type == "cpu"
            else torch.empty((self._filled, width), device=there)
        )
        for shard, start, stop in self._runs:
            part = {suffix: tensor[start:stop] for suffix, tensor in tensors.items()}
            found[start:stop] = self._codec.decode(part, shard.constants_on(there)[hook])
        return found


def _as_items(tensor: torch.Tensor) -> np.ndarray:
    """Rows as opaque items [rows]: numpy does not know all formats, and one row is copied like another."""
    flat = tensor if tensor.ndim > 1 else tensor.unsqueeze(1)
    data = flat.view(torch.uint8).numpy()
    return data.view(np.dtype((np.void, data.shape[1]))).reshape(len(data))
