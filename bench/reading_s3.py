"""Reading from a real S3 server beside what nobody can beat: a plain download, and memory. Wall time."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from bench.object_store import BUCKET, S3Place
from bench.stored_model import WIDTH, build_cache, hooks_of, open_reader
from sae_job.activations.loading import RANGE_BYTES, RANGE_THREADS

(HOOK,) = hooks_of(1)
PREFIX = "cache"
BATCH = 4096
LATENTS = 8 * WIDTH


class RemoteCache:
    """A cache on an S3 server.

    Args:
        place: the server.
        rows: of the cache; whole batches.
        shard_bytes: of a full shard.
    """

    def __init__(self, place: S3Place, *, rows: int, shard_bytes: int) -> None:
        self._store = place.store(PREFIX)
        self._rows, self._shard_bytes = rows, shard_bytes
        build_cache(self._store, place.directory, rows=rows, shard_bytes=shard_bytes)
        self._client = place.client()

    def reading_rate(self) -> float:
        """GB of activations per second of a reader, over its second epoch: as fast as it goes on."""
        reader = open_reader(self._store, batch=BATCH, shard_bytes=self._shard_bytes)
        batches = self._rows // BATCH
        for _ in range(batches):
            reader.next_batch()
        start = time.perf_counter()
        for _ in range(batches):
            reader.next_batch()
        seconds = time.perf_counter() - start
        reader.close()
        return batches * BATCH * WIDTH * 2 / 1e9 / seconds

    def download_rate(self) -> float:
        """GB per second of a plain download of the shards into memory that is there already: ranges of the same size
        in as many threads."""
        shards = [stored for stored in self._store.list("shards/") if stored.key.endswith(".safetensors")]
        ranges = [
            (shard.key, first, min(first + RANGE_BYTES, shard.size))
            for shard in shards
            for first in range(0, shard.size, RANGE_BYTES)
        ]
        memory = memoryview(bytearray(sum(shard.size for shard in shards)))
        places, place = [], 0
        for _, first, last in ranges:
            places.append(memory[place : place + last - first])
            place += last - first

        def fetch(key: str, first: int, last: int, into: memoryview) -> None:
            answer = self._client.get_object(Bucket=BUCKET, Key=f"{PREFIX}/{key}", Range=f"bytes={first}-{last - 1}")
            if answer["Body"].readinto(into) != len(into):
                raise RuntimeError(f"{key} is shorter than it was")

        with ThreadPoolExecutor(RANGE_THREADS) as threads:
            start = time.perf_counter()
            for done in [threads.submit(fetch, *part, into) for part, into in zip(ranges, places, strict=True)]:
                done.result()
            return len(memory) / 1e9 / (time.perf_counter() - start)

    def training_over_memory(self, batches: int) -> float:
        """Rate of a loop that computes with each batch, fed from the server, over the same loop fed from memory."""
        reader = open_reader(self._store, batch=BATCH, shard_bytes=self._shard_bytes)
        from_s3 = _trained(batches, lambda: reader.next_batch()[HOOK])
        reader.close()
        memory = torch.randn(BATCH, WIDTH).bfloat16()
        return from_s3 / _trained(batches, lambda: memory)


def _trained(batches: int, next_batch: Callable[[], torch.Tensor]) -> float:
    """Batches per second; each is multiplied by an encoder of 8 times its width."""
    encoder = torch.randn(WIDTH, LATENTS)
    out = torch.empty(BATCH, LATENTS)
    start = time.perf_counter()
    for _ in range(batches):
        torch.mm(next_batch().float(), encoder, out=out)
    return batches / (time.perf_counter() - start)
