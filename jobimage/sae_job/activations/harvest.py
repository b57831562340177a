"""From contexts to rows on the host: the model's forward pass, with copies off the device beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sae_job.activations.sink_filter import SinkFilter, usable_positions


class ActivationModel(Protocol):
    """A model that gives activations at hooks."""

    def activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Activations of tokens [contexts, positions]: per hook [contexts, positions, d_in], on the model's device."""
        ...


@dataclass(frozen=True)
class HostBatch:
    """All positions of a few contexts, on the host; valid until the next batch is taken.

    Attributes:
        activations: per hook [contexts · positions, d_in] in storage dtype.
        token_ids: int32 [contexts · positions].
        sequence: global index of each position's context, int32.
        position: int32.
        usable: positions that are not special tokens.
        keep: usable positions that pass the norm filter: these may become rows.
    """

    activations: dict[str, torch.Tensor]
    token_ids: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    usable: torch.Tensor
    keep: torch.Tensor


class HostCopy:
    """Copies from a GPU into pinned memory on a stream of their own, so that the next forward pass runs meanwhile.

    Two sets of buffers take turns: one is being read on the host while the other is filled. On a CPU nothing is copied.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, str, torch.Size, torch.dtype], torch.Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._turn = 0

    @property
    def asynchronous(self) -> bool:
        """Whether what was copied last came from a GPU."""
        return self._stream is not None

    def start(self, tensors: Mapping[str, torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
        """Begin to copy; the function returned waits for the end and gives the copies."""
        if all(tensor.device.type == "cpu" for tensor in tensors.values()):
            return lambda: dict(tensors)
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        stream = self._stream
        self._turn = 1 - self._turn
        copies = {}
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                key = (self._turn, name, tensor.shape, tensor.dtype)
                if key not in self._buffers:
                    self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies[name] = self._buffers[key].copy_(tensor, non_blocking=True)
                # The allocator must not give the memory to the next forward pass while it is still being copied.
                tensor.record_stream(stream)
            done = stream.record_event()

        def wait() -> dict[str, torch.Tensor]:
            done.synchronize()
            return copies

        return wait


def harvest(
    model: ActivationModel,
    batches: Iterator[tuple[int, torch.Tensor]],
    *,
    sink_filter: SinkFilter,
    excluded: Sequence[int],
    dtype: torch.dtype,
    copies: HostCopy,
) -> Iterator[HostBatch]:
    """Run the model over batches of contexts; on a GPU each batch is given out while the next one is already running.

    Args:
        model: the model.
        batches: global index of the first context, and tokens int32 [contexts, positions].
        sink_filter: which rows to drop by their norm.
        excluded: ids of tokens that never become rows.
        dtype: storage dtype.
        copies: the buffers to copy into.
    """
    before: Callable[[], HostBatch] | None = None
    for first, tokens in batches:
        after = _launch(model, first, tokens, sink_filter, excluded, dtype, copies)
        if not copies.asynchronous:
            yield after()
            continue
        if before is not None:
            yield before()
        before = after
    if before is not None:
        yield before()


# No hook can have this name.
_KEEP = "/keep"


def _launch(
    model: ActivationModel,
    first: int,
    tokens: torch.Tensor,
    sink_filter: SinkFilter,
    excluded: Sequence[int],
    dtype: torch.dtype,
    copies: HostCopy,
) -> Callable[[], HostBatch]:
    activations = model.activations(tokens)
    below = sink_filter.keep(activations)
    tensors = {hook: values.reshape(-1, values.shape[-1]).to(dtype) for hook, values in activations.items()}
    if below is not None:
        tensors[_KEEP] = below.reshape(-1)
    wait = copies.start(tensors)

    def finish() -> HostBatch:
        count, length = tokens.shape
        copied = wait()
        usable = usable_positions(tokens.reshape(-1), excluded)
        kept = copied.pop(_KEEP, None)
        return HostBatch(
            activations=copied,
            token_ids=tokens.reshape(-1).to(torch.int32),
            sequence=torch.arange(first, first + count, dtype=torch.int32).repeat_interleave(length),
            position=torch.arange(length, dtype=torch.int32).repeat(count),
            usable=usable,
            keep=usable if kept is None else usable & kept,
        )

    return finish
