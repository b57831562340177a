"""How fast training reads a cache, beside SAELens, a plain download, and memory.

vs_saelens         rows per CPU second over those of SAELens's store of cached activations
gb_per_cpu_s       GB of bfloat16 activations, verified, decoded and mixed, per CPU second, from files, in the first
                   epoch
vs_plain_download  GB per second from a real S3 server over those of a plain download with as many threads
s3_vs_memory       rate of a loop that multiplies each batch by an encoder of 8 times its width, fed from a real S3
                   server, over that of the same loop fed from memory (1 is perfect)

python bench/reading.py [--quick]
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import statistics
import time
import zlib
from pathlib import Path

import torch

from bench.first_batch import first_batch_seconds
from bench.object_store import S3Place, s3_server
from bench.peers import SAE_LENS_REFERENCE
from bench.reading_peer import compare_reading
from bench.reading_s3 import RemoteCache
from bench.stored_model import WIDTH, build_cache, open_reader
from sae_job.storage.file_store import FileStore
from sae_operator.api.activation_cache import StorageDtype

BATCH = 4096
DTYPES: tuple[StorageDtype, ...] = ("bfloat16", "float8", "int8")


def epoch_rates(folder: Path, *, epochs: int, shard_bytes: int) -> list[float]:
    """Rows per CPU second of each epoch of a cache in a folder."""
    reader = open_reader(FileStore(folder), batch=BATCH, shard_bytes=shard_bytes)
    batches = reader.training_rows // BATCH
    rates = []
    for _ in range(epochs):
        start = time.process_time()
        for _ in range(batches):
            reader.next_batch()
        rates.append(batches * BATCH / (time.process_time() - start))
    reader.close()
    return rates


def from_files(directory: Path, *, rows: int, shard_bytes: int, repetitions: int) -> float:
    """GB per CPU second of bfloat16 in the first epoch; all formats are shown."""
    for dtype in DTYPES:
        build_cache(FileStore(directory / dtype), directory, rows=rows, shard_bytes=shard_bytes, dtype=dtype)
    found: dict[StorageDtype, list[list[float]]] = {dtype: [] for dtype in DTYPES}
    # The first run warms up.
    for _ in range(repetitions + 1):
        for dtype, runs in found.items():
            runs.append(epoch_rates(directory / dtype, epochs=2, shard_bytes=shard_bytes))
    medians = {
        dtype: [statistics.median(run[epoch] for run in runs[1:]) for epoch in range(2)]
        for dtype, runs in found.items()
    }
    print(f"{rows} rows of {WIDTH}, batches of {BATCH}, shards of {shard_bytes >> 20} MiB, one torch thread")
    print(f"CRC-32 alone: {checking_rate():.2f} GB per CPU second")
    for dtype, (first, later) in medians.items():
        item = 2 if dtype == "bfloat16" else 1
        told = f"{first * WIDTH * item / 1e9:.2f} and {later * WIDTH * item / 1e9:.2f} GB"
        print(f"  {dtype:<9} from files, first and second epoch: {told}, {first:,.0f} and {later:,.0f} rows, per CPU-s")
    return medians["bfloat16"][0] * WIDTH * 2 / 1e9


def checking_rate() -> float:
    """GB per CPU second of CRC-32 alone: no verified read can be faster."""
    data = bytes(2**26)
    start = time.process_time()
    zlib.crc32(data)
    return len(data) / 1e9 / (time.process_time() - start)


def from_s3(place: S3Place, *, rows: int, shard_bytes: int, repetitions: int) -> tuple[float, float]:
    """`vs_plain_download` and `s3_vs_memory`."""
    cache = RemoteCache(place, rows=rows, shard_bytes=shard_bytes)
    reading, plain, training = [], [], []
    for _ in range(repetitions + 1):
        plain.append(cache.download_rate())
        reading.append(cache.reading_rate())
    # Each batch takes a quarter of a CPU second, the most of it the product's.
    training = [cache.training_over_memory(20) for _ in range(repetitions)]
    print(f"  S3: reader {statistics.median(reading[1:]):.2f}, plain download {statistics.median(plain[1:]):.2f} GB/s")
    print("  S3 over memory, rate of a training loop:", ", ".join(f"{value:.3f}" for value in training))
    ratios = [ours / theirs for ours, theirs in zip(reading[1:], plain[1:], strict=True)]
    return statistics.median(ratios), statistics.median(training)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller caches and fewer repetitions")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    # Small beside the cache, so that touching the buffers for the first time weighs as little as in a long run.
    shard_bytes = 2**22 if quick else 2**23
    rows, repetitions = (BATCH * 40, 2) if quick else (BATCH * 160, 5)
    with s3_server() as place:
        gigabytes = from_files(place.directory, rows=rows, shard_bytes=shard_bytes, repetitions=repetitions)
        rates = compare_reading(SAE_LENS_REFERENCE, place.directory, turns=repetitions)
        print(
            f"  rows per CPU second: {SAE_LENS_REFERENCE.name} {rates.theirs:,.0f}; ours from bfloat16 "
            f"{rates.bfloat16:,.0f}, made float32 {rates.widened:,.0f}; from float32 {rates.float32:,.0f}"
        )
        # A real shard is many ranges: here a few.
        over_plain, over_memory = from_s3(place, rows=rows, shard_bytes=4 * shard_bytes, repetitions=repetitions)
        first_batch_seconds(place.directory)
    figures = {
        "vs_saelens": rates.bfloat16 / rates.theirs,
        "gb_per_cpu_s": gigabytes,
        "vs_plain_download": over_plain,
        "s3_vs_memory": over_memory,
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
