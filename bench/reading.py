"""How fast training reads a cache: batches per CPU-second, and whether reading from S3 holds training up.

`gb_per_cpu_s`: bytes of activations in batches per CPU-second of this process, from a folder, each shard verified by
its SHA-256 as it is read for the first time. `s3_vs_memory`: rate of a loop that multiplies each batch by an encoder
of 8 times its width, fed from a real S3 server, over the rate of the same loop fed from memory (1 is perfect).

    python bench/reading.py [--quick]
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.object_store import s3_server
from sae_job.activations.reader import CachedActivations
from sae_job.steps.cache import write_shards
from sae_job.steps.finalize import run_finalize
from sae_job.storage.base import ObjectStore
from sae_job.storage.file_store import FileStore
from tests.caches import cache_spec, cache_step, prepare_tokens, step_context

HOOK = "model.layers.15"
WIDTH = 576
LATENTS = 8 * WIDTH
BATCH = 4096


class RandomModel:
    """Random activations, made once."""

    def __init__(self) -> None:
        self._values = torch.randn(16, 128, WIDTH).bfloat16()

    def activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return {HOOK: self._values[: len(tokens)]}


def build_cache(store: ObjectStore, directory: Path, *, rows: int, shard_bytes: int) -> None:
    hooks = {HOOK: WIDTH}
    spec = cache_spec(directory, hooks=hooks, tokens=rows, context_size=128, shard_bytes=shard_bytes, batch_size=16)
    prepare_tokens(store, spec, hooks, contexts_per_block=8192)
    step = cache_step(spec)
    context = step_context(open_store=lambda location: store)
    write_shards(step, context, lambda index: RandomModel(), device="cpu")
    run_finalize(step, context)


def open_reader(store: ObjectStore, shard_bytes: int) -> CachedActivations:
    return CachedActivations.open(
        store,
        hooks=[HOOK],
        batch_size=BATCH,
        seed=0,
        held_out_contexts=0,
        mix_shards=4,
        read_ahead_bytes=2 * shard_bytes + 2**20,
    )


def rate(batches: int, clock: Callable[[], float], next_batch: Callable[[], object]) -> float:
    """Gigabytes of activations per second of `clock`."""
    start = clock()
    for _ in range(batches):
        next_batch()
    return batches * BATCH * WIDTH * 2 / 1e9 / (clock() - start)


def from_folder(folder: Path, *, epochs: int, shard_bytes: int) -> list[float]:
    """GB per CPU-second of each epoch; the first verifies SHA-256, the others CRC-32."""
    reader = open_reader(FileStore(folder), shard_bytes)
    batches = reader.training_rows // BATCH
    rates = [rate(batches, time.process_time, reader.next_batch) for _ in range(epochs)]
    reader.close()
    return rates


def hashing_rate() -> float:
    """GB per CPU-second of SHA-256 alone: no verified read can be faster."""
    data = bytes(2**26)
    start = time.process_time()
    hashlib.sha256(data)
    return len(data) / 1e9 / (time.process_time() - start)


def trained(batches: int, next_batch: Callable[[], torch.Tensor]) -> float:
    """Batches per second of wall time of a loop that computes with each."""
    encoder = torch.randn(WIDTH, LATENTS)
    out = torch.empty(BATCH, LATENTS)
    start = time.perf_counter()
    for _ in range(batches):
        torch.mm(next_batch().float(), encoder, out=out)
    return batches / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller cache and fewer repetitions")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    # Small beside the cache, so that touching the buffers for the first time weighs as little as in a long run.
    shard_bytes = 2**22 if quick else 2**23
    rows, repetitions = (BATCH * 40, 2) if quick else (BATCH * 160, 3)
    with tempfile.TemporaryDirectory(prefix="sae-bench-") as name, s3_server() as place:
        directory = Path(name)
        build_cache(FileStore(directory / "cache"), directory, rows=rows, shard_bytes=shard_bytes)
        remote = place.store("cache")
        build_cache(remote, directory, rows=rows, shard_bytes=shard_bytes)

        # The first run warms up.
        folder = [from_folder(directory / "cache", epochs=3, shard_bytes=shard_bytes) for _ in range(repetitions + 1)]
        first = statistics.median(rates[0] for rates in folder[1:])
        later = statistics.median(value for rates in folder[1:] for value in rates[1:])

        ratios = []
        memory = torch.randn(BATCH, WIDTH).bfloat16()
        # Each takes a quarter of a CPU-second, the most of it the product's.
        batches = 20 if quick else 40
        for _ in range(repetitions):
            reader = open_reader(remote, shard_bytes)
            from_s3 = trained(batches, lambda reader=reader: reader.next_batch()[HOOK])
            reader.close()
            ratios.append(from_s3 / trained(batches, lambda: memory))
    print(f"{rows} rows of {WIDTH}, bfloat16, batches of {BATCH}, shards of {shard_bytes >> 20} MiB, one torch thread")
    print(f"SHA-256 alone: {hashing_rate():.2f} GB per CPU-second")
    print(f"from a folder, GB per CPU-second: first epoch {first:.2f} (SHA-256), later ones {later:.2f} (CRC-32)")
    print("S3 over memory, rate of the loop:", ", ".join(f"{value:.3f}" for value in ratios))
    print(json.dumps({"s3_vs_memory": round(statistics.median(ratios), 3), "gb_per_cpu_s": round(first, 3)}))


if __name__ == "__main__":
    main()
