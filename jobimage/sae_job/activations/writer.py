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
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from sae_job.activations.format import HEADER, KEEP, ShardLayout, shard_key, sidecar_key
from sae_job.activations.harvest import Encoding
from sae_job.activations.manifest import Sidecar
from sae_job.activations.open_shard import OpenPart, OpenShard
from sae_job.activations.statistics import sums_of_stored
from sae_job.storage.base import NoSpaceLeft, ObjectStore, StoreError

# Shards in memory by default: one is filled, the others are encoded and uploaded.
SHARDS_IN_MEMORY = 3
# At most, however small they are: each beside the one that is filled has a thread, and more of these are no faster.
MOST_SHARDS_IN_MEMORY = 5
# Tries of one upload, each of which the store has repeated itself already; 1, 2, 4 seconds between them.
UPLOAD_ATTEMPTS = 4
# Hashed at a time, by both checksums: it stays in the cache of a core between them.
HASH_BYTES = 2**18


def shards_in_memory(buffer_bytes: int | None, shard_bytes: int) -> int:
    """Shards that a worker holds at most: as many as the buffer takes, but at least one and no more than
    `MOST_SHARDS_IN_MEMORY`.

    Args:
        buffer_bytes: `storage.bufferBytes`.
        shard_bytes: bytes of all parts of a full shard that are written together.
    """
    if buffer_bytes is None:
        return SHARDS_IN_MEMORY
    return min(max(1, buffer_bytes // max(shard_bytes, 1)), MOST_SHARDS_IN_MEMORY)


def checksums(data: memoryview, layout: ShardLayout) -> tuple[str, dict[str, str]]:
    """SHA-256 of a part, and CRC-32 of its header and of each of its tensors, in one pass over its bytes."""
    sha256 = hashlib.sha256()
    crc32: dict[str, str] = {}
    ranges = [(HEADER, 0, len(layout.header))]
    ranges += [(name, place.offset, place.offset + place.bytes) for name, place in layout.tensors.items()]
    for name, begin, end in ranges:
        crc = 0
        for start in range(begin, end, HASH_BYTES):
            piece = data[start : min(start + HASH_BYTES, end)]
            sha256.update(piece)
            crc = zlib.crc32(piece, crc)
        crc32[name] = f"{crc:08x}"
    return sha256.hexdigest(), crc32


class ShardWriter:
    """Stores shards, each part followed by the sidecar that proves it, in the background.

    One shard is filled while others are on their way, and no more than `in_memory` are held: a part's buffer is used
    again for the next shard.

    Args:
        store: the cache's folder.
        encoding: how rows are stored.
        seed: seed of the cache.
        rows_per_shard: rows of a full shard.
        software: versions that wrote the shard.
        device: what the model ran on.
        in_memory: shards held at a time, at least 1.
        before_upload: called in the background before each part of a shard is stored; ends the work by raising.
        pause: waits so many seconds between tries of an upload.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        encoding: Encoding,
        seed: int,
        rows_per_shard: int,
        software: Mapping[str, str],
        device: str,
        in_memory: int = SHARDS_IN_MEMORY,
        before_upload: Callable[[OpenShard], None] = lambda shard: None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._encoding = encoding
        self._seed = seed
        self._rows_per_shard = rows_per_shard
        self._software = dict(software)
        self._device = device
        self._before_upload = before_upload
        self._pause = pause
        self._buffers: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        for _ in range(in_memory):
            self._buffers.put(None)
        self._threads = ThreadPoolExecutor(max(in_memory - 1, 1), thread_name_prefix="shard-upload")
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

    def begin(
        self, number: int, rows: int, layouts: Mapping[int, ShardLayout], *, base: Sidecar | None = None
    ) -> OpenShard:
        """An empty shard to fill; waits until the memory for it is free.

        Args:
            number: index of the shard.
            rows: rows that it will hold.
            layouts: of the parts to write, by group.
            base: sidecar of the stored part of group 0, when that is not among them.

        Raises:
            Exception: what an earlier upload ended with.
        """
        self._raise_failed()
        buffer = self._buffers.get()
        self._raise_failed()
        size = OpenShard.bytes_for(layouts)
        if buffer is None or len(buffer) < size:
            # The smaller one must go before there is a larger one.
            buffer = None
            buffer = np.empty(size, dtype=np.uint8)
        shard = OpenShard(number, rows, layouts, buffer, self._seed, base=base)
        for part in shard.parts.values():
            for hook in self._encoding.hooks[part.group]:
                for suffix, constant in self._encoding.constants.get(hook, {}).items():
                    part.tensor(hook + suffix).copy_(constant)
        return shard

    def finish(self, shard: OpenShard) -> None:
        """Store a full shard in the background."""
        self._uploads.append(self._threads.submit(self._store_shard, shard))

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

    def _store_shard(self, shard: OpenShard) -> None:
        try:
            base = shard.base
            for group, part in sorted(shard.parts.items()):
                sidecar = self._describe(shard, part, base)
                key = shard_key(shard.number, shard.rows, self._rows_per_shard, group)
                self._before_upload(shard)
                # A sidecar that is there proves nothing, or this would not be written: it must not stand beside a part
                # that it is not about.
                self._repeat(partial(self._remove, sidecar_key(key)))
                self._repeat(partial(self._store.put, key, part.bytes))
                self._repeat(partial(self._store.put, sidecar_key(key), sidecar.to_bytes()))
                base = sidecar if group == 0 else base
            with self._lock:
                self._stored += 1
        finally:
            self._buffers.put(shard.buffer)

    def _describe(self, shard: OpenShard, part: OpenPart, base: Sidecar | None) -> Sidecar:
        encoding, codec = self._encoding, self._encoding.codec
        hooks = encoding.hooks[part.group]
        # First, so that what cannot be trained on is not hashed.
        keep = part.tensor(KEEP) if part.group > 0 else None
        sums = {}
        for hook in hooks:
            width = part.tensor(hook).shape[1]
            sums[hook] = sums_of_stored(
                {suffix: part.tensor(hook + suffix) for suffix, _, _ in codec.row_tensors(width)},
                {suffix: part.tensor(hook + suffix) for suffix, _, _ in codec.constants(width)},
                codec,
                hook,
                keep=keep,
                calibration_median_norm=encoding.filters[part.group].median_norms.get(hook),
            )
        sha256, crc32 = checksums(part.bytes, part.layout)
        return Sidecar(
            shard=shard.number,
            group=part.group,
            rows=shard.rows,
            bytes=len(part.bytes),
            sha256=sha256,
            crc32=crc32,
            hooks=sums,
            dropped=shard.dropped if keep is None else int((keep == 0).sum()),
            software=self._software,
            device=self._device,
            follows=None if base is None else base.row_order,
        )

    def _remove(self, key: str) -> None:
        # Nearly never there: most who write need no permission to delete.
        if self._store.head(key) is not None:
            self._store.delete(key)

    def _repeat(self, action: Callable[[], object]) -> None:
        for attempt in range(UPLOAD_ATTEMPTS):
            try:
                action()
            except NoSpaceLeft:
                raise
            except StoreError:
                if attempt + 1 == UPLOAD_ATTEMPTS:
                    raise
                self._pause(2.0**attempt)
            else:
                return
