"""Shards to the store: rows are put where they lie in the file, then summed, hashed and uploaded beside the forward
pass."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
import torch

from sae_job.activations.format import (
    POSITION,
    SEQUENCE,
    TOKEN_IDS,
    ShardLayout,
    layout_of_shard,
    shard_key,
    sidecar_key,
)
from sae_job.activations.harvest import HostBatch
from sae_job.activations.manifest import Sidecar, stored_sidecar
from sae_job.activations.mixing import seeded_generator
from sae_job.activations.statistics import sums_of
from sae_job.storage.base import NoSpaceLeft, ObjectStore, StoreError

# Shards that are encoded and uploaded while the next one is filled. Memory is this many and one more.
IN_FLIGHT = 2
# Tries of one upload, each of which the store has repeated itself already; 1, 2, 4 seconds between them.
UPLOAD_ATTEMPTS = 4
HASH_BYTES = 2**20


class OpenShard:
    """A shard that is being filled: its rows are scattered to their shuffled places as they come.

    Args:
        number: index of the shard.
        rows: rows that it will hold.
        layout: where they lie.
        buffer: at least `layout.size` bytes.
        seed: seed of the cache.
    """

    def __init__(self, number: int, rows: int, layout: ShardLayout, buffer: np.ndarray, seed: int) -> None:
        self.number = number
        self.rows = rows
        self.layout = layout
        self.buffer = buffer
        self.filled = 0
        self.dropped = 0
        self._places = torch.randperm(rows, generator=seeded_generator("shard", seed, number))
        view = self.bytes
        view[: len(layout.header)] = layout.header
        self._tensors = {name: layout.tensor(view, name) for name in layout.tensors}

    @property
    def bytes(self) -> memoryview:
        """The shard's file."""
        return self.buffer.data[: self.layout.size]

    @property
    def full(self) -> bool:
        return self.filled == self.rows

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def add(self, batch: HostBatch) -> int:
        """Take the rows of a batch that may be kept, in order, until the shard is full; returns how many."""
        kept = torch.nonzero(batch.keep).flatten()[: self.rows - self.filled]
        if len(kept) == 0:
            self.dropped += int(batch.usable.sum()) if not self.full else 0
            return 0
        places = self._places[self.filled : self.filled + len(kept)]
        self.filled += len(kept)
        # Positions after the row that fills the shard are not looked at.
        seen = int(kept[-1]) + 1 if self.full else len(batch.usable)
        self.dropped += int((batch.usable[:seen] & ~batch.keep[:seen]).sum())
        for name, values in (
            (TOKEN_IDS, batch.token_ids),
            (SEQUENCE, batch.sequence),
            (POSITION, batch.position),
            *batch.activations.items(),
        ):
            self._put(name, places.numpy(), torch.index_select(values, 0, kept))
        return len(kept)

    def _put(self, name: str, places: np.ndarray, rows: torch.Tensor) -> None:
        """Write rows to their places. numpy copies an opaque item at a time, three times as fast as torch's
        index_copy_."""
        place = self.layout.tensors[name]
        row = np.dtype((np.void, place.bytes // self.rows))
        there = np.frombuffer(self.buffer, dtype=row, count=self.rows, offset=place.offset)
        there[places] = rows.reshape(-1).view(torch.uint8).numpy().view(row)


class ShardWriter:
    """Stores shards, each followed by the sidecar that proves it, in the background.

    At most `in_flight` shards are on their way while one is filled, so memory is bounded: `in_flight + 1` shards.

    Args:
        store: the cache's folder.
        hooks: width of each hook, in the order of the spec.
        dtype: storage dtype.
        seed: seed of the cache.
        rows_per_shard: rows of a full shard.
        software: versions that wrote the shard.
        device: what the model ran on.
        in_flight: shards that are encoded and uploaded at the same time.
        pause: waits so many seconds between tries of an upload.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        hooks: Mapping[str, int],
        dtype: torch.dtype,
        seed: int,
        rows_per_shard: int,
        software: Mapping[str, str],
        device: str,
        in_flight: int = IN_FLIGHT,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._hooks = hooks
        self._dtype = dtype
        self._seed = seed
        self._rows_per_shard = rows_per_shard
        self._software = dict(software)
        self._device = device
        self._pause = pause
        self._buffers: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        for _ in range(in_flight + 1):
            self._buffers.put(None)
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="shard-upload")
        self._uploads: list[Future[None]] = []
        self._stored = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Shards that are on their way are complete: they are stored even when the work ends early.
        self._threads.shutdown()
        if error is None:
            self.drain()

    @property
    def stored(self) -> int:
        """Shards that are stored, with their sidecars."""
        return self._stored

    def begin(self, number: int, rows: int) -> OpenShard:
        """An empty shard to fill; waits until the memory for it is free.

        Raises:
            Exception: what an earlier upload ended with.
        """
        self._raise_failed()
        layout = layout_of_shard(rows, self._hooks, self._dtype)
        buffer = self._buffers.get()
        self._raise_failed()
        if buffer is None or len(buffer) < layout.size:
            buffer = np.empty(layout.size, dtype=np.uint8)
        return OpenShard(number, rows, layout, buffer, self._seed)

    def finish(self, shard: OpenShard, median_norms: Mapping[str, float]) -> None:
        """Store a full shard in the background."""
        self._uploads.append(self._threads.submit(self._store_shard, shard, dict(median_norms)))

    def drain(self) -> None:
        """Wait until all shards are stored.

        Raises:
            Exception: what the first upload that failed ended with.
        """
        for upload in self._uploads:
            upload.result()

    def _raise_failed(self) -> None:
        for upload in [upload for upload in self._uploads if upload.done()]:
            upload.result()
            self._uploads.remove(upload)

    def _store_shard(self, shard: OpenShard, median_norms: Mapping[str, float]) -> None:
        try:
            sidecar = self._describe(shard, median_norms)
            key = shard_key(shard.number, shard.rows, self._rows_per_shard)
            self._put(key, shard.bytes)
            self._put(sidecar_key(key), sidecar.to_bytes())
            with self._lock:
                self._stored += 1
        finally:
            self._buffers.put(shard.buffer)

    def _describe(self, shard: OpenShard, median_norms: Mapping[str, float]) -> Sidecar:
        sha256, crc32 = hashlib.sha256(), 0
        view = shard.bytes
        for start in range(0, len(view), HASH_BYTES):
            piece = view[start : start + HASH_BYTES]
            sha256.update(piece)
            crc32 = zlib.crc32(piece, crc32)
        return Sidecar(
            shard=shard.number,
            rows=shard.rows,
            bytes=len(view),
            sha256=sha256.hexdigest(),
            crc32=f"{crc32:08x}",
            hooks={
                hook: sums_of(shard.tensor(hook), hook, calibration_median_norm=median_norms.get(hook))
                for hook in self._hooks
            },
            dropped=shard.dropped,
            software=self._software,
            device=self._device,
        )

    def _put(self, key: str, data: bytes | memoryview) -> None:
        for attempt in range(UPLOAD_ATTEMPTS):
            try:
                self._store.put(key, data)
            except NoSpaceLeft:
                raise
            except StoreError:
                if attempt + 1 == UPLOAD_ATTEMPTS:
                    raise
                self._pause(2.0**attempt)
            else:
                return


def is_stored(store: ObjectStore, number: int, rows: int, rows_per_shard: int) -> bool:
    """Whether a shard is stored whole: its sidecar is there, and it has the size that the sidecar tells."""
    return stored_sidecar(store, number, rows, rows_per_shard) is not None
