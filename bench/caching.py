"""What caching costs beside the model: CPU time per 1,000 tokens and hook outside the bare forward loop.

Everything that a cache worker does is in it: norms and filter, rows to their places, exact sums, SHA-256, upload to a
real S3 server (its own CPU time is not). The model is replaced by activations in memory, so that what is measured is
not lost in the noise of forward passes that take hundreds of times as long; the loop over them alone is subtracted.

    python bench/caching.py [--quick]
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

import torch

from bench.object_store import s3_server
from sae_job.steps.cache import write_shards
from tests.caches import cache_spec, cache_step, prepare_tokens, step_context

WIDTH = 576
CONTEXT_SIZE = 128
BATCH_SIZE = 16
HOOKS = {"model.layers.7": WIDTH, "model.layers.15": WIDTH}


class StoredModel:
    """Gives activations from memory; enough different ones that they do not stay in a core's cache."""

    def __init__(self) -> None:
        shape = (BATCH_SIZE, CONTEXT_SIZE, WIDTH)
        self._batches = [{hook: torch.randn(shape).bfloat16() for hook in HOOKS} for _ in range(8)]
        self._next = 0

    def activations(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        self._next = (self._next + 1) % len(self._batches)
        return {hook: values[: len(tokens)] for hook, values in self._batches[self._next].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repetitions")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    tokens, repetitions = (60_000, 2) if quick else (240_000, 5)
    model = StoredModel()
    outside, wall = [], []
    with s3_server() as place:
        spec = cache_spec(
            place.directory,
            hooks=HOOKS,
            tokens=tokens,
            context_size=CONTEXT_SIZE,
            shard_bytes=2**25 if quick else 2**27,
            batch_size=BATCH_SIZE,
            max_norm_ratio=10.0,
        )
        step = cache_step(spec)
        # The first run warms up: connections, buffers, imports.
        for repetition in range(repetitions + 1):
            store = place.store(f"run-{repetition}")
            index = prepare_tokens(store, spec, HOOKS, contexts_per_block=2048)
            context = step_context(open_store=lambda location, store=store: store)
            batches = -(-index.shards[-1].stop // BATCH_SIZE)
            start = time.process_time()
            for _ in range(batches):
                model.activations(torch.empty(BATCH_SIZE, CONTEXT_SIZE, dtype=torch.int32))
            bare = time.process_time() - start
            start, begun = time.process_time(), time.perf_counter()
            result = write_shards(step, context, lambda index: model, device="cpu")
            used = time.process_time() - start - bare
            assert result.tokens == tokens
            if repetition > 0:
                outside.append(used * 1e3 / (tokens / 1000) / len(HOOKS))
                wall.append(tokens / (time.perf_counter() - begun))
    print(f"{tokens} tokens, {len(HOOKS)} hooks of {WIDTH}, bfloat16, one torch thread, S3 over loopback")
    print("CPU-ms per 1,000 tokens and hook:", ", ".join(f"{value:.2f}" for value in outside))
    print(f"tokens/s without a model (wall): {statistics.median(wall):,.0f}")
    print(json.dumps({"outside_ms_per_1k_tokens": round(statistics.median(outside), 3)}))


if __name__ == "__main__":
    main()
