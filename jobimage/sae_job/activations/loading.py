"""Shards from the store into memory: parallel range reads, verified, ahead of need, within a bound."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

import numpy as np
import torch

from sae_job.activations.format import (
    LENGTH_BYTES,
    SEQUENCE,
    FormatError,
    ShardLayout,
    header_length,
    parse_layout,
)
from sae_job.activations.manifest import ShardEntry
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore

RANGE_BYTES = 2**23
RANGE_THREADS = 8
# Shards that are read at the same time: while one is hashed, the next one's bytes arrive.
SHARD_THREADS = 2


def corrupt_shard(store: ObjectStore, key: str, why: str) -> InvalidInput:
    return InvalidInput(
        "CorruptShard",
        f"{store.uri}/{key} is corrupt ({why}): delete it, its .json and the cache's manifest.json, and raise the "
        "cache's spec.retry to write it again",
    )


class LoadedShard:
    """A verified shard in memory: tensors are views of its buffer, valid while it is held."""

    def __init__(self, buffer: np.ndarray, layout: ShardLayout) -> None:
        self.buffer = buffer
        self._layout = layout
        self._tensors: dict[str, torch.Tensor] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """Rows of one hook [rows, d_in] in storage dtype, or one of the int32 row fields [rows]."""
        if name not in self._tensors:
            self._tensors[name] = self._layout.tensor(self.buffer.data, name)
        return self._tensors[name]


class ShardLoader:
    """Loads shards and holds those that are wanted.

    The first time a shard is read its SHA-256 is verified; when it is read again, its CRC-32, which costs a third.

    Args:
        store: the cache's folder.
        largest_bytes: bytes of the largest shard that will be wanted.
        read_ahead_bytes: bytes of shards that may be held before they are needed, besides those in use.
    """

    def __init__(self, store: ObjectStore, *, largest_bytes: int, read_ahead_bytes: int) -> None:
        self._store = store
        self._read_ahead_bytes = read_ahead_bytes
        self._held: dict[ShardEntry, Future[LoadedShard]] = {}
        self._verified: set[ShardEntry] = set()
        # Touching fresh memory costs more than reading into it, so buffers are used again.
        self._buffer_bytes = largest_bytes
        self._free: list[np.ndarray] = []
        self._shard_threads = ThreadPoolExecutor(SHARD_THREADS, thread_name_prefix="shard")
        self._range_threads = ThreadPoolExecutor(RANGE_THREADS, thread_name_prefix="range")

    def want(self, now: Iterable[ShardEntry], later: Iterable[ShardEntry]) -> None:
        """Hold the shards `now`, read ahead as many of `later`, in order, as the bound allows, and let all others
        go."""
        wanted = dict.fromkeys(now)
        ahead = 0
        for shard in later:
            if shard in wanted:
                continue
            ahead += shard.bytes
            if ahead > self._read_ahead_bytes:
                break
            wanted[shard] = None
        for shard in [shard for shard in self._held if shard not in wanted]:
            self._let_go(self._held.pop(shard))
        for shard in wanted:
            if shard not in self._held:
                buffer = self._free.pop() if self._free else np.empty(self._buffer_bytes, dtype=np.uint8)
                self._held[shard] = self._shard_threads.submit(self._load, shard, buffer)

    def get(self, shard: ShardEntry) -> LoadedShard:
        """A shard that `want` asked for; waits until it is there.

        Raises:
            InvalidInput: it is missing or corrupt.
            StoreError: the store cannot be read.
        """
        return self._held[shard].result()

    def close(self) -> None:
        """Let everything go; reads that are under way end first."""
        self._shard_threads.shutdown(cancel_futures=True)
        self._range_threads.shutdown(cancel_futures=True)
        self._held.clear()
        self._free.clear()

    def _let_go(self, future: Future[LoadedShard]) -> None:
        if future.cancel():
            return
        # Its shard was asked for and is not needed any more, so how reading it ended does not matter.
        if future.exception() is None:
            self._free.append(future.result().buffer)

    def _load(self, entry: ShardEntry, buffer: np.ndarray) -> LoadedShard:
        view = buffer.data[: entry.bytes]
        reads = [
            self._range_threads.submit(self._store.read_into, entry.key, start, view[start : start + RANGE_BYTES])
            for start in range(0, entry.bytes, RANGE_BYTES)
        ]
        try:
            self._verify(entry, view, reads)
            layout = parse_layout(view)
        except ObjectNotFound as error:
            raise corrupt_shard(self._store, entry.key, "it is missing") from error
        except FormatError as error:
            raise corrupt_shard(self._store, entry.key, str(error)) from error
        finally:
            # Nothing may write to the buffer once it can be used again.
            wait_for(reads)
        return LoadedShard(buffer, layout)

    def _verify(self, entry: ShardEntry, view: memoryview, reads: Sequence[Future[int]]) -> None:
        """Check ranges in order, as they arrive, while later ones are still on the way."""
        sha256, crc32 = hashlib.sha256(), 0
        again = entry in self._verified
        for number, read in enumerate(reads):
            piece = view[number * RANGE_BYTES : (number + 1) * RANGE_BYTES]
            if read.result() < len(piece):
                raise corrupt_shard(self._store, entry.key, f"it is shorter than {entry.bytes} bytes")
            if again:
                crc32 = zlib.crc32(piece, crc32)
            else:
                sha256.update(piece)
        if again and f"{crc32:08x}" != entry.crc32:
            raise corrupt_shard(self._store, entry.key, "its CRC-32 differs from the recorded one")
        if not again and sha256.hexdigest() != entry.sha256:
            raise corrupt_shard(self._store, entry.key, "its SHA-256 differs from the recorded one")
        self._verified.add(entry)


def read_sequence(store: ObjectStore, entry: ShardEntry) -> torch.Tensor:
    """Context (global index) of each row of a shard, int32 [rows], without reading the rest of it.

    Raises:
        InvalidInput: the shard is missing or damaged.
    """
    try:
        header = store.get_range(entry.key, 0, header_length(store.get_range(entry.key, 0, LENGTH_BYTES)))
        place = parse_layout(header).tensors[SEQUENCE]
        data = bytearray(store.get_range(entry.key, place.offset, place.bytes))
    except ObjectNotFound as error:
        raise corrupt_shard(store, entry.key, "it is missing") from error
    except (FormatError, KeyError) as error:
        raise corrupt_shard(store, entry.key, "its header is damaged") from error
    if len(data) != 4 * entry.rows or place.dtype != torch.int32:
        raise corrupt_shard(store, entry.key, f"it does not hold {entry.rows} rows")
    return torch.frombuffer(data, dtype=torch.int32) if data else torch.empty(0, dtype=torch.int32)
