"""Time to the first batch of a cache of a terabyte: its manifest is made up, its shards are links to a few real."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

from bench.stored_model import WIDTH, build_cache, hooks_of
from sae_job.activations.format import MANIFEST_KEY
from sae_job.activations.manifest import read_manifest
from sae_job.activations.reader import CachedActivations, held_out_contexts_for
from sae_job.storage.file_store import FileStore

SHARDS, REAL_SHARDS = 4000, 2
SHARD_BYTES = 2**28
BATCH = 4096
HELD_OUT_ROWS = 20_000
_SHARD_NUMBER = re.compile(r"(?<=shards/)\d{6}")


def repeat_shards(folder: Path) -> None:
    """Make a finished cache of `REAL_SHARDS` shards one of `SHARDS`, each a link to one of its own."""
    path = folder / MANIFEST_KEY
    manifest = json.loads(path.read_bytes())
    real, contexts = manifest["shards"], manifest["shards"][-1]["stop"]
    assert len(real) == REAL_SHARDS
    shards = []
    for number in range(SHARDS):
        turn, which = divmod(number, REAL_SHARDS)
        entry = json.loads(_SHARD_NUMBER.sub(f"{number:06d}", json.dumps(real[which])))
        shards.append(entry | {name: entry[name] + turn * contexts for name in ("start", "stop")})
        if turn > 0:
            os.link(folder / f"shards/{which:06d}.safetensors", folder / f"shards/{number:06d}.safetensors")
    turns = SHARDS // REAL_SHARDS
    manifest |= {"shards": shards, "tokens": turns * manifest["tokens"], "bytes": turns * manifest["bytes"]}
    path.write_text(json.dumps(manifest))


def first_batch_seconds(directory: Path) -> float:
    """Seconds of wall time from a store to the first batch: manifest, held-out contexts, shards, mixing."""
    store = FileStore(directory / "terabyte")
    build_cache(store, directory, rows=REAL_SHARDS * (SHARD_BYTES // (2 * WIDTH + 12)), shard_bytes=SHARD_BYTES)
    repeat_shards(store.root)
    start = time.perf_counter()
    manifest = read_manifest(store)
    contexts = held_out_contexts_for(store, manifest, HELD_OUT_ROWS)
    reader = CachedActivations.open(
        store, hooks=list(hooks_of(1)), batch_size=BATCH, seed=0, held_out_contexts=contexts
    )
    reader.next_batch()
    seconds = time.perf_counter() - start
    reader.close()
    size = f"{manifest.bytes / 1e12:.2f} TB in {len(manifest.shards)} shards"
    print(f"  {size}: first batch of {BATCH} rows after {seconds:.2f} s")
    return seconds
