"""From contexts to rows on the host: the model's forward pass, with copies off the device beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sae_job.activations.codecs import Codec
from sae_job.activations.sink_filter import SinkFilter


class ActivationModel(Protocol):
    """A model that gives activations at hooks."""

    def activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Activations of tokens [contexts, positions]: per hook [contexts, positions, d_in], on the model's device."""
        ...


@dataclass(frozen=True)
class ContextBatch:
    """Contexts that are given to the model together, and the positions whose rows are wanted.

    Attributes:
        first: global index of the first context.
        tokens: [contexts, positions].
        wanted: flat positions, ascending, int64 [n]; all when None.
        places: where the wanted rows go in the shard, int64 [n]; None where that is decided after the norm filter.
    """

    first: int
    tokens: torch.Tensor
    wanted: torch.Tensor | None
    places: torch.Tensor | None = None

    @property
    def positions(self) -> torch.Tensor:
        """The wanted flat positions, int64 [n]."""
        return torch.arange(self.tokens.numel()) if self.wanted is None else self.wanted


@dataclass(frozen=True)
class HostBatch:
    """The wanted rows of a few contexts, encoded, on the host; valid until the next batch is taken.

    Attributes:
        contexts: what they are of.
        rows: tensor name (hook and suffix of the codec) -> [n, ...].
        below: group -> which rows pass its norm filter, bool [n]; groups without a filter are left out.
    """

    contexts: ContextBatch
    rows: dict[str, torch.Tensor]
    below: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Encoding:
    """How rows are stored, and which of them are dropped.

    Attributes:
        codec: number format.
        constants: the codec's, per hook.
        filters: per group, with the hooks that it looks at.
        hooks: per group, all of its hooks.
    """

    codec: Codec
    constants: Mapping[str, Mapping[str, torch.Tensor]]
    filters: Mapping[int, SinkFilter]
    hooks: Mapping[int, Sequence[str]]

    def only(self, groups: Collection[int]) -> Encoding:
        """The same for some of the groups."""
        hooks = {group: hooks for group, hooks in self.hooks.items() if group in groups}
        return replace(self, hooks=hooks)


class HostCopy:
    """Copies from a GPU into pinned memory on a stream of their own, so that the next forward pass runs meanwhile.

    Two sets of buffers take turns: one is being read on the host while the other is filled. On a CPU nothing is copied.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, str], torch.Tensor] = {}
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
                copies[name] = self._buffer(name, tensor).copy_(tensor, non_blocking=True)
                # The allocator must not give the memory to the next forward pass while it is still being copied.
                tensor.record_stream(stream)
            done = stream.record_event()

        def wait() -> dict[str, torch.Tensor]:
            done.synchronize()
            return copies

        return wait

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Pinned memory for a tensor; batches differ in their rows, so it is cut from what the largest one took."""
        key = (self._turn, name)
        size = like.numel() * like.itemsize
        if key not in self._buffers or len(self._buffers[key]) < size:
            self._buffers[key] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._buffers[key][:size].view(like.dtype).view(like.shape)


def harvest(
    model: ActivationModel, batches: Iterator[ContextBatch], *, encoding: Encoding, copies: HostCopy
) -> Iterator[HostBatch]:
    """Run the model over batches of contexts; on a GPU each batch is given out while the next one is already running.

    Rows are chosen and encoded where the model runs, so that no more than is stored is copied.

    Args:
        model: the model; it gives at least the hooks of the encoding.
        batches: contexts and the positions wanted.
        encoding: how rows are stored.
        copies: the buffers to copy into.
    """
    before: Callable[[], HostBatch] | None = None
    for contexts in batches:
        after = _launch(model, contexts, encoding, copies)
        if not copies.asynchronous:
            yield after()
            continue
        if before is not None:
            yield before()
        before = after
    if before is not None:
        yield before()


# No hook can have a name that begins like this.
_BELOW = "/below/"


def _launch(
    model: ActivationModel, contexts: ContextBatch, encoding: Encoding, copies: HostCopy
) -> Callable[[], HostBatch]:
    activations = model.activations(contexts.tokens)
    wanted = contexts.wanted
    tensors: dict[str, torch.Tensor] = {}
    for group, hooks in encoding.hooks.items():
        rows = {hook: activations[hook].reshape(-1, activations[hook].shape[-1]) for hook in hooks}
        if wanted is not None:
            rows = {hook: values.index_select(0, wanted.to(values.device)) for hook, values in rows.items()}
        below = encoding.filters[group].keep(rows)
        if below is not None:
            tensors[f"{_BELOW}{group}"] = below
        for hook, values in rows.items():
            for suffix, encoded in encoding.codec.encode(values, encoding.constants.get(hook, {})).items():
                tensors[hook + suffix] = encoded
    wait = copies.start(tensors)

    def finish() -> HostBatch:
        copied = wait()
        below = {group: copied.pop(name) for group in encoding.hooks if (name := f"{_BELOW}{group}") in copied}
        return HostBatch(contexts, copied, below)

    return finish
