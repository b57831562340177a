"""Tensors of shards from the store into memory: only those asked for, verified, ahead of need, within a bound.

A store of files is mapped, so that nothing is copied before rows are gathered; from any other, tensors come by parallel
range reads. Either way every tensor is checked against its CRC-32 each time that it is loaded.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from sae_job.activations.format import ALIGNMENT, TensorPlace
from sae_job.errors import InvalidInput
from sae_job.storage.base import MapsObjects, ObjectNotFound, ObjectStore

RANGE_BYTES = 2**23
RANGE_THREADS = 8
# Shards that are checked at the same time, as their bytes arrive.
SHARD_THREADS = 4
# Shards that are read ahead at most, however small they are: each takes a map or a buffer.
MOST_AHEAD = 64

T = TypeVar("T")


class ShardId(NamedTuple):
    """A shard: its number, and its rows, which tell a partial shard from the full one that replaced it."""

    number: int
    rows: int


@dataclass(frozen=True)
class TensorRead:
    """A tensor to read: where it lies in its object, and its CRC-32 as 8 hex digits."""

    name: str
    place: TensorPlace
    crc32: str

    @property
    def stop(self) -> int:
        return self.place.offset + self.place.bytes


@dataclass(frozen=True)
class PartRead:
    """Tensors to read of a group's part of a shard."""

    group: int
    key: str
    tensors: tuple[TensorRead, ...]

    @cached_property
    def spans(self) -> list[list[TensorRead]]:
        """The tensors in the order in which they lie; those without a gap between them together."""
        spans: list[list[TensorRead]] = []
        for tensor in sorted(self.tensors, key=lambda tensor: tensor.place.offset):
            if spans and spans[-1][-1].stop == tensor.place.offset:
                spans[-1].append(tensor)
            else:
                spans.append([tensor])
        return spans


@dataclass(frozen=True)
class ShardRead:
    """What to read of a shard."""

    shard: ShardId
    parts: tuple[PartRead, ...] = field(compare=False)

    @property
    def bytes(self) -> int:
        return sum(tensor.place.bytes for part in self.parts for tensor in part.tensors)


@dataclass(frozen=True)
class LoadedShard:
    """Verified tensors in memory, by group and name; valid while the loader holds them."""

    tensors: Mapping[tuple[int, str], torch.Tensor]
    buffer: np.ndarray | None = None
    """What they are views of, where that is the loader's own memory."""


class _Fetch:
    """Where the spans of a shard go in a buffer: each is aligned there as it is in its object."""

    def __init__(self, read: ShardRead, buffer: np.ndarray) -> None:
        self.buffer = buffer
        self.spans: list[tuple[PartRead, list[TensorRead], memoryview]] = []
        end = 0
        for part in read.parts:
            for span in part.spans:
                start = span[0].place.offset
                first = end + (start - end - buffer.ctypes.data) % ALIGNMENT
                end = first + span[-1].stop - start
                self.spans.append((part, span, buffer.data[first:end]))


def corrupt_shard(store: ObjectStore, key: str, why: str) -> InvalidInput:
    return InvalidInput(
        "CorruptShard",
        f"{store.uri}/{key} is corrupt ({why}): delete it and its .json, and raise the cache's spec.retry to write it "
        "again",
    )


class ShardLoader:
    """Loads shards and holds those that are wanted.

    Args:
        store: the cache's folder.
        read_ahead_bytes: bytes of tensors that may be held before they are needed, besides those in use.
    """

    def __init__(self, store: ObjectStore, *, read_ahead_bytes: int) -> None:
        self._store = store
        self._read_ahead_bytes = read_ahead_bytes
        self._held: dict[ShardId, Future[LoadedShard]] = {}
        # Touching fresh memory costs more than reading into it, so buffers are used again.
        self._free: list[np.ndarray] = []
        self._shard_threads = ThreadPoolExecutor(SHARD_THREADS, thread_name_prefix="shard")
        self._range_threads = ThreadPoolExecutor(RANGE_THREADS, thread_name_prefix="range")

    def want(self, now: Iterable[ShardRead], later: Iterable[ShardRead]) -> None:
        """Hold the shards `now`, read ahead as many of `later`, in order, as the bound allows, and let all others
        go."""
        wanted = within_bound(now, later, bytes_of=lambda read: read.bytes, bound=self._read_ahead_bytes)
        for shard in self._held.keys() - {read.shard for read in wanted}:
            self._let_go(self._held.pop(shard))
        for read in wanted:
            if read.shard not in self._held:
                self._held[read.shard] = self._load(read)

    def get(self, shard: ShardId) -> LoadedShard:
        """A shard that `want` asked for; waits until it is there.

        Raises:
            InvalidInput: it is missing, cut short, or differs from its checksums.
            StoreError: the store cannot be read.
        """
        return self._held[shard].result()

    def close(self) -> None:
        """Let everything go; reads that are under way end first."""
        self._shard_threads.shutdown(cancel_futures=True)
        self._range_threads.shutdown(cancel_futures=True)
        self._held.clear()
        self._free.clear()

    def _load(self, read: ShardRead) -> Future[LoadedShard]:
        if isinstance(self._store, MapsObjects):
            return self._shard_threads.submit(self._map, self._store, read)
        # The ranges of all shards queue up in the order in which they are needed, so that no thread is idle.
        fetch = _Fetch(read, self._buffer_for(read))
        ranges = [self._start(part.key, span[0].place.offset, view) for part, span, view in fetch.spans]
        return self._shard_threads.submit(self._verify_all, fetch, ranges)

    def _buffer_for(self, read: ShardRead) -> np.ndarray:
        size = read.bytes + sum(ALIGNMENT * len(part.spans) for part in read.parts)
        for number, buffer in enumerate(self._free):
            if len(buffer) >= size:
                return self._free.pop(number)
        return np.empty(size, dtype=np.uint8)

    def _let_go(self, future: Future[LoadedShard]) -> None:
        # Of one that is cancelled, ranges may still arrive: its buffer is not used again.
        if future.cancel():
            return
        # Its shard was asked for and is not needed any more, so how reading it ended does not matter.
        if future.exception() is None and (buffer := future.result().buffer) is not None:
            self._free.append(buffer)

    def _map(self, store: MapsObjects, read: ShardRead) -> LoadedShard:
        found: dict[tuple[int, str], torch.Tensor] = {}
        for part in read.parts:
            start, stop = part.spans[0][0].place.offset, part.spans[-1][-1].stop
            try:
                view = store.map(part.key, start, stop - start)
            except ObjectNotFound as error:
                raise corrupt_shard(self._store, part.key, "it is missing") from error
            for tensor in part.tensors:
                data = view[tensor.place.offset - start : tensor.stop - start]
                if len(data) < tensor.place.bytes:
                    raise self._cut_short(part, tensor)
                self._check(part, tensor, zlib.crc32(data))
                found[part.group, tensor.name] = _view(data, tensor.place)
        return LoadedShard(found)

    def _verify_all(self, fetch: _Fetch, ranges: list[list[Future[int]]]) -> LoadedShard:
        found: dict[tuple[int, str], torch.Tensor] = {}
        try:
            for (part, span, view), reads in zip(fetch.spans, ranges, strict=True):
                self._verify(part, span, view, reads)
                for tensor in span:
                    first = tensor.place.offset - span[0].place.offset
                    found[part.group, tensor.name] = _view(view[first : first + tensor.place.bytes], tensor.place)
        finally:
            # Nothing may write to the buffer once it can be used again.
            wait_for([read for reads in ranges for read in reads])
        return LoadedShard(found, fetch.buffer)

    def _start(self, key: str, offset: int, view: memoryview) -> list[Future[int]]:
        return [
            self._range_threads.submit(self._store.read_into, key, offset + start, view[start : start + RANGE_BYTES])
            for start in range(0, len(view), RANGE_BYTES)
        ]

    def _verify(self, part: PartRead, span: list[TensorRead], view: memoryview, ranges: list[Future[int]]) -> None:
        """Check the tensors of a span in order, as ranges arrive, while later ones are still on the way."""
        arrived = 0
        for tensor in span:
            place, stop = (bound - span[0].place.offset for bound in (tensor.place.offset, tensor.stop))
            crc32 = 0
            while place < stop:
                if place == arrived:
                    arrived += self._wait(part, tensor, ranges[arrived // RANGE_BYTES], len(view) - arrived)
                upto = min(stop, arrived)
                crc32 = zlib.crc32(view[place:upto], crc32)
                place = upto
            self._check(part, tensor, crc32)

    def _wait(self, part: PartRead, tensor: TensorRead, read: Future[int], left: int) -> int:
        """Bytes of a range, once it has arrived."""
        try:
            count = read.result()
        except ObjectNotFound as error:
            raise corrupt_shard(self._store, part.key, "it is missing") from error
        if count < min(RANGE_BYTES, left):
            raise self._cut_short(part, tensor)
        return count

    def _cut_short(self, part: PartRead, tensor: TensorRead) -> InvalidInput:
        return corrupt_shard(self._store, part.key, f"it ends before the end of tensor {tensor.name!r}")

    def _check(self, part: PartRead, tensor: TensorRead, crc32: int) -> None:
        if f"{crc32:08x}" != tensor.crc32:
            raise corrupt_shard(
                self._store, part.key, f"the CRC-32 of tensor {tensor.name!r} differs from the recorded one"
            )


def within_bound(now: Iterable[T], later: Iterable[T], *, bytes_of: Callable[[T], int], bound: int) -> list[T]:
    """What to hold: all of `now`, and of `later`, in order, as much as `bound` allows beside it; few of small ones."""
    wanted = dict.fromkeys(now)
    most, ahead = len(wanted) + MOST_AHEAD, 0
    for item in later:
        if item in wanted:
            continue
        ahead += bytes_of(item)
        if ahead > bound or len(wanted) == most:
            break
        wanted[item] = None
    return list(wanted)


def _view(data: memoryview, place: TensorPlace) -> torch.Tensor:
    if place.bytes == 0:
        return torch.empty(place.shape, dtype=place.dtype)
    return torch.frombuffer(data, dtype=place.dtype).view(place.shape)
