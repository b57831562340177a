"""Eight SAEs from one read of a cache in a real S3 server, against eight jobs of one SAE each.

bytes_ratio   bytes read from the store by the eight jobs together, over those of the one job (8 is perfect)
cpu_ratio     CPU seconds of the eight jobs together over those of the one job: above 1, one job is cheaper

Bytes are counted where the steps read: what they ask of the store, below the cache's prefix. The SAEs are TopK SAEs of
the sizes that differ by seed alone, and each job trains on one pass over the cache.

python bench/many_saes.py [--quick]
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.object_store import BUCKET, SECRET, S3Place, s3_server
from bench.stored_model import WIDTH, build_cache, hooks_of
from sae_job.steps.train import run_train
from sae_job.storage.base import ObjectInfo, ObjectStore
from sae_job.storage.open import open_store
from sae_operator.api.steps import TrainStep
from sae_operator.api.store import SecretRef, StoreLocation
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.caches import step_context

(HOOK,) = hooks_of(1)
SAES, K, BATCH = 8, 32, 4096
HELD_OUT = 1024
PREFIX = "cache"


class CountingStore:
    """A store that counts the bytes that are read from it; see `ObjectStore`."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self.bytes = 0

    @property
    def uri(self) -> str:
        return self._store.uri

    def _count(self, size: int) -> None:
        with self._lock:
            self.bytes += size

    def get(self, key: str) -> bytes:
        data = self._store.get(key)
        self._count(len(data))
        return data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        data = self._store.get_range(key, start, length)
        self._count(len(data))
        return data

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        size = self._store.read_into(key, start, buffer)
        self._count(size)
        return size

    def head(self, key: str) -> ObjectInfo | None:
        return self._store.head(key)

    def put(
        self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False, if_match: str | None = None
    ) -> ObjectInfo:
        return self._store.put(key, data, if_absent=if_absent, if_match=if_match)

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        return self._store.put_file(key, path)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        self._store.delete(key)


class Jobs:
    """Trains SAEs from the cache.

    Args:
        place: the server.
        d_sae: latents of each SAE.
    """

    def __init__(self, place: S3Place, *, d_sae: int) -> None:
        self._place, self._d_sae = place, d_sae
        self._location = StoreLocation(
            uri=f"s3://{BUCKET}/{PREFIX}", endpoint_url=place.endpoint, secret_ref=SecretRef(name=SECRET)
        )

    def train(self, name: str, seeds: range) -> tuple[int, float]:
        """Train an SAE of each seed in one job; bytes read of the cache, and CPU seconds."""
        saes = [
            {"name": f"sae-{seed}", "seed": seed, "dSae": self._d_sae, "architecture": {"type": "topk", "k": K}}
            for seed in seeds
        ]
        location: dict[str, Any] = self._location.to_manifest()
        spec = SAETrainingJobSpec.model_validate(
            {
                "activations": location,
                "saes": saes,
                "training": {"batchSize": BATCH},
                # Evaluations on the way would be much of so short a training.
                "evaluation": {"heldOutTokens": HELD_OUT, "everyTokens": 10**9},
                "output": {"uri": f"file://{self._place.directory}/out/{name}"},
            }
        )
        step = TrainStep(step="train", namespace="bench", name=name, uid=name, spec=spec, activations=self._location)
        counted: list[CountingStore] = []

        def open_counted(location: StoreLocation) -> ObjectStore:
            store = open_store(location, secrets_directory=self._place.secrets)
            if location.uri != self._location.uri:
                return store
            counted.append(CountingStore(store))
            return counted[-1]

        before = time.process_time()
        run_train(step, step_context(open_store=open_counted))
        return sum(store.bytes for store in counted), time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, shard_bytes = (16_384, 2**22) if options.quick else (131_072, 2**25)
    with s3_server() as place:
        build_cache(place.store(PREFIX), place.directory, rows=rows, shard_bytes=shard_bytes)
        jobs = Jobs(place, d_sae=2 * WIDTH)
        jobs.train("warm-up", range(1))
        together_bytes, together_seconds = jobs.train("together", range(SAES))
        alone = [jobs.train(f"alone-{seed}", range(seed, seed + 1)) for seed in range(SAES)]
    alone_bytes, alone_seconds = (sum(values) for values in zip(*alone, strict=True))
    print(f"{rows} rows of {WIDTH} in bfloat16, {SAES} TopK SAEs with {2 * WIDTH} latents, one pass, one thread")
    print(f"  one job     {together_bytes / 1e6:9.1f} MB read {together_seconds:8.1f} CPU-s")
    print(f"  {SAES} jobs      {alone_bytes / 1e6:9.1f} MB read {alone_seconds:8.1f} CPU-s")
    figures = {"bytes_ratio": alone_bytes / together_bytes, "cpu_ratio": alone_seconds / together_seconds}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
