"""What caching costs beside the model, how it compares with SAELens, and how much memory it takes.

    outside_ms_per_1k_tokens            CPU milliseconds per 1,000 tokens and hook outside the bare forward loop
    six_hooks_outside_ms_per_1k_tokens  the same, with six hooks at once
    vs_saelens                          our tokens per CPU second over those of SAELens's runner, on a real model
    growth_mib                          peak memory over that with the model loaded, with a buffer of 100 MiB

For the first two the model is replaced by activations in memory, so that what is measured is not lost in the noise of
forward passes that take hundreds of times as long; the loop over them alone is subtracted. Everything that a cache
worker does is in it: norms and filter, rows to their places, exact sums, checksums, upload to a real S3 server (whose
own CPU time is not).

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
from dataclasses import dataclass

import torch

from bench.caching_memory import growth_mib
from bench.caching_peer import compare_caching
from bench.object_store import S3Place, s3_server
from bench.peers import SAE_LENS_NEWEST
from bench.stored_model import BATCH_SIZE, CONTEXT_SIZE, CONTEXTS_PER_BLOCK, WIDTH, StoredModel, hooks_of
from sae_job.steps.cache import write_shards
from tests.caches import cache_spec, cache_step, prepare_tokens, step_context

SHARD_BYTES = 2**25
# Bytes of a row beside its activations: token id, context and position.
ROW_OVERHEAD_BYTES = 12


@dataclass(frozen=True)
class Cost:
    """What writing a cache took.

    Attributes:
        outside_ms: CPU milliseconds per 1,000 tokens and hook outside the bare loop.
        tokens_per_second: of wall time, without a model.
        bytes_per_token: of shards with their sidecars, as the store has them.
        ideal_bytes_per_token: of activations, token id, context and position alone.
    """

    outside_ms: float
    tokens_per_second: float
    bytes_per_token: float
    ideal_bytes_per_token: int


def cost(place: S3Place, name: str, *, hooks: int, tokens: int) -> Cost:
    """Write a cache of a stored model in bfloat16 to a new folder of the S3 server."""
    widths = hooks_of(hooks)
    model = StoredModel(widths)
    store = place.store(name)
    spec = cache_spec(
        place.directory,
        hooks=widths,
        tokens=tokens,
        context_size=CONTEXT_SIZE,
        shard_bytes=SHARD_BYTES,
        batch_size=BATCH_SIZE,
        max_norm_ratio=10.0,
    )
    index = prepare_tokens(store, spec, widths, contexts_per_block=CONTEXTS_PER_BLOCK)
    step, context = cache_step(spec), step_context(open_store=lambda location: store)
    start = time.process_time()
    for _ in range(-(-index.shards[-1].stop // BATCH_SIZE)):
        model.activations(torch.empty(BATCH_SIZE, CONTEXT_SIZE, dtype=torch.int32))
    bare = time.process_time() - start
    start, begun = time.process_time(), time.perf_counter()
    result = write_shards(step, context, lambda index: model, device="cpu")
    used = time.process_time() - start - bare
    seconds = time.perf_counter() - begun
    assert result.tokens == tokens
    return Cost(
        outside_ms=used * 1e3 / (tokens / 1000) / hooks,
        tokens_per_second=tokens / seconds,
        bytes_per_token=sum(stored.size for stored in store.list("shards/")) / tokens,
        ideal_bytes_per_token=hooks * WIDTH * 2 + ROW_OVERHEAD_BYTES,
    )


def outside(place: S3Place, *, rows: int, repetitions: int) -> dict[int, float]:
    """Median cost outside the bare loop of one hook and of six; `rows` rows of one hook are written in either case."""
    print(f"{rows} rows of {WIDTH}, bfloat16, one torch thread, S3 over loopback; CPU-ms per 1,000 tokens and hook")
    found: dict[int, list[Cost]] = {1: [], 6: []}
    # The first run warms up: connections, buffers, imports.
    for repetition in range(repetitions + 1):
        for hooks, costs in found.items():
            costs.append(cost(place, f"outside-{hooks}-{repetition}", hooks=hooks, tokens=rows // hooks))
    for hooks, costs in found.items():
        del costs[0]
        print(f"  {hooks} hook(s)   ", ", ".join(f"{one.outside_ms:.2f}" for one in costs))
        print(f"     tokens/s without a model (wall): {statistics.median(one.tokens_per_second for one in costs):,.0f}")
        stored, ideal = costs[-1].bytes_per_token, costs[-1].ideal_bytes_per_token
        print(f"     bytes per token: {stored:.1f}, {stored / ideal:.4f} of {ideal}")
    return {hooks: statistics.median(one.outside_ms for one in costs) for hooks, costs in found.items()}


def against_saelens(place: S3Place, *, contexts: int, turns: int) -> float:
    """Our tokens per CPU second over those of the newest SAELens."""
    rates = compare_caching(SAE_LENS_NEWEST, place, place.directory, contexts=contexts, turns=turns)
    ours, theirs = statistics.median(rates.ours), statistics.median(rates.theirs)
    print(f"  ours {ours:.0f}, {SAE_LENS_NEWEST.name} {theirs:.0f} tokens per CPU second, ratio {rates.ratio:.3f}")
    return rates.ratio


def growth(place: S3Place, *, tokens: int, real: bool) -> float:
    """The larger growth of memory of so many tokens and of ten times as many."""
    found: list[float] = []
    for model in ("stored", "real")[: 2 if real else 1]:
        for count in (tokens, 10 * tokens):
            found.append(growth_mib(model, count, place))
            print(f"  memory of {count} tokens and six hooks, {model} model: + {found[-1]:.0f} MiB")
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer tokens and repetitions; memory with a stored model alone"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    with s3_server() as place:
        costs = outside(place, rows=120_000 if quick else 240_000, repetitions=2 if quick else 5)
        ratio = against_saelens(place, contexts=32 if quick else 64, turns=3 if quick else 7)
        mib = growth(place, tokens=24_000, real=not quick)
    figures = {
        "outside_ms_per_1k_tokens": round(costs[1], 3),
        "six_hooks_outside_ms_per_1k_tokens": round(costs[6], 3),
        "vs_saelens": round(ratio, 3),
        "growth_mib": round(mib, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
