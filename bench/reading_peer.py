"""Reading cached activations for training beside SAELens: the same rows, in turns, CPU seconds.

SAELens reads a dataset that it wrote itself, in float32; ours a cache in bfloat16, and one in float32.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.peers import Peer, peer_environment
from bench.stored_model import BATCH_SIZE, CONTEXT_SIZE, WIDTH, build_cache, hooks_of, open_reader
from bench.worker import Worker
from sae_job.activations.reader import CachedActivations
from sae_job.storage.file_store import FileStore
from sae_operator.api.activation_cache import StorageDtype

(HOOK,) = hooks_of(1)
ROWS_PER_BATCH = 4096
BATCHES = 20
SHARD_BYTES = 2**22
# Batches of a turn: whole buffers of the peer's, and whole epochs of ours.
PEER_BATCHES, OUR_BATCHES = 10, 40


@dataclass(frozen=True)
class ReadingRates:
    """Rows per CPU second, medians over turns.

    Attributes:
        theirs: of the peer.
        bfloat16: ours, from bfloat16, as stored.
        widened: ours, from bfloat16, made float32.
        float32: ours, from float32.
    """

    theirs: float
    bfloat16: float
    widened: float
    float32: float


def compare_reading(peer: Peer, directory: Path, *, turns: int) -> ReadingRates:
    """Read in turns.

    Args:
        peer: a release of SAELens.
        directory: scratch folder.
        turns: of each side, after one that warms up.

    Raises:
        RuntimeError: the peer reads other rows than ours.
    """
    folder = directory / "peer"
    folder.mkdir()
    readers: dict[StorageDtype, CachedActivations] = {}
    for dtype in ("bfloat16", "float32"):
        store = FileStore(folder / dtype)
        build_cache(store, folder, rows=BATCHES * ROWS_PER_BATCH, shard_bytes=SHARD_BYTES, dtype=dtype)
        readers[dtype] = open_reader(store, batch=ROWS_PER_BATCH, shard_bytes=SHARD_BYTES)
    epoch = torch.cat([readers["bfloat16"].next_batch()[HOOK] for _ in range(BATCHES)]).float()
    save_file({"rows": epoch.reshape(-1, CONTEXT_SIZE, WIDTH)}, folder / "rows.safetensors")
    ours: dict[str, Callable[[], torch.Tensor]] = {
        "bfloat16": lambda: readers["bfloat16"].next_batch()[HOOK],
        "widened": lambda: readers["bfloat16"].next_batch()[HOOK].float(),
        "float32": lambda: readers["float32"].next_batch()[HOOK],
    }
    found: dict[str, list[float]] = {name: [] for name in ("theirs", *ours)}
    paths = [os.fspath(folder / "rows.safetensors"), os.fspath(folder / "dataset")]
    arguments = ["reading", *paths, str(BATCH_SIZE), str(ROWS_PER_BATCH)]
    with Worker(peer.name, peer.python(), "saelens_worker.py", arguments, peer_environment()) as theirs:
        theirs.answer()
        theirs.ask(f"export {folder / 'batch.safetensors'}")
        _check(epoch, load_file(folder / "batch.safetensors")["rows"])
        for _ in range(turns + 1):
            for name, next_batch in ours.items():
                found[name].append(OUR_BATCHES * ROWS_PER_BATCH / _cpu_seconds(next_batch))
            answer = theirs.ask(f"batches {PEER_BATCHES}")
            found["theirs"].append(answer["rows"] / answer["cpu_seconds"])
    for reader in readers.values():
        reader.close()
    return ReadingRates(**{name: statistics.median(rates[1:]) for name, rates in found.items()})


def _cpu_seconds(next_batch: Callable[[], torch.Tensor]) -> float:
    start = time.process_time()
    for _ in range(OUR_BATCHES):
        next_batch()
    return time.process_time() - start


def _check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Eight values tell rows of random numbers apart."""
    known = set(map(tuple, ours[:, :8].tolist()))
    if len(theirs) != ROWS_PER_BATCH or not known.issuperset(map(tuple, theirs[:, :8].tolist())):
        raise RuntimeError("the peer reads other rows: its costs cannot be compared")
