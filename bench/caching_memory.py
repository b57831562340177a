"""How far the memory of a cache worker grows: the most that its process has over what it had with the model loaded.

The worker is a process of its own:

    python caching_memory.py MODEL TOKENS FOLDER ENDPOINT SECRETS

MODEL is `stored` or `real`. It answers `{"ready": ...}` once the model is loaded, and writes the shards of TOKENS rows
of six hooks when a line comes.
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from bench.object_store import S3Place
from bench.stored_model import BATCH_SIZE, CONTEXT_SIZE, CONTEXTS_PER_BLOCK, StoredModel, hooks_of
from bench.worker import Worker
from sae_job.models.load import load_hooked_model
from sae_job.steps.cache import write_shards
from sae_operator.api.activation_cache import ModelSource
from tests.caches import cache_spec, cache_step, prepare_tokens, step_context
from tests.testbed.data import ensure_small_model

BUFFER_BYTES, SHARD_BYTES = 100 * 2**20, 32 * 2**20
HOOKS = hooks_of(6)
# Between looks at the worker's memory: shorter than filling a shard by far.
POLL_SECONDS = 0.005


def growth_mib(model: str, tokens: int, place: S3Place) -> float:
    """Peak resident memory while so many rows are cached, over that before, in MiB."""
    folder = place.directory / f"memory-{model}-{tokens}"
    folder.mkdir()
    arguments = [model, str(tokens), os.fspath(folder), place.endpoint, os.fspath(place.secrets)]
    with Worker("cache worker", sys.executable, Path(__file__).name, arguments, os.environ) as worker:
        worker.answer()
        memory = psutil.Process(worker.pid)
        before = peak = memory.memory_info().rss
        with ThreadPoolExecutor(1) as threads:
            work = threads.submit(worker.ask, "cache")
            while not work.done():
                peak = max(peak, memory.memory_info().rss)
                time.sleep(POLL_SECONDS)
        work.result()
    return (peak - before) / 2**20


def main(kind: str, tokens: str, folder: str, endpoint: str, secrets: str) -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    directory = Path(folder)
    store = S3Place(directory, Path(secrets), endpoint).store(directory.name)
    spec = cache_spec(
        directory,
        hooks=HOOKS,
        tokens=int(tokens),
        context_size=CONTEXT_SIZE,
        shard_bytes=SHARD_BYTES,
        batch_size=BATCH_SIZE,
        max_norm_ratio=10.0,
    )
    storage = spec.storage.model_copy(update={"buffer_bytes": BUFFER_BYTES})
    spec = spec.model_copy(update={"storage": storage})
    prepare_tokens(store, spec, HOOKS, contexts_per_block=CONTEXTS_PER_BLOCK)
    if kind == "real":
        source = ModelSource(name=os.fspath(ensure_small_model()), batch_size=BATCH_SIZE)
        model = load_hooked_model(source, list(HOOKS), device="cpu")
    else:
        model = StoredModel(HOOKS)
    context = step_context(open_store=lambda location: store)
    print(json.dumps({"ready": kind}), file=answers, flush=True)
    for _ in sys.stdin:
        write_shards(cache_step(spec), context, lambda index: model, device="cpu")
        print(json.dumps({"tokens": int(tokens)}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
