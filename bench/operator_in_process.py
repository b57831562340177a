"""Lives of the real controller on an API server in memory: its own CPU without sockets, and whether memory grows."""

from __future__ import annotations

import cProfile
import os
import pstats
import statistics
import sys
import time
from pathlib import Path

from bench.operator_bed import rss_mib
from sae_operator.controller import progress
from tests.chaos.life import JOBS, Life, Specs

AT_ONCE = 10
LIFE_SECONDS = 120.0
FIRST_LIVES = 200


def lives(seconds: float) -> dict[str, float]:
    """As many lives as go into so many seconds; each resource is deleted in the end."""
    samples: list[tuple[float, float]] = []
    number, began = 0, time.perf_counter()
    life = Life(0)
    ask, progress.ask = progress.ask, life.answer_poll  # type: ignore[assignment]
    life.invariants.most_writes = sys.maxsize
    try:
        life.start_operator()
        while time.perf_counter() - began < seconds or len(samples) < 4:
            names = [f"life-{number + i}" for i in range(AT_ONCE)]
            lead(life, names)
            number += AT_ONCE
            if number >= FIRST_LIVES or seconds < 60:
                samples.append((number, rss_mib(os.getpid())))
    finally:
        life.close()
        progress.ask = ask
    later = samples[len(samples) // 2 :]
    value = statistics.linear_regression(*zip(*later, strict=True)).slope
    return {"in_process_lives": number, "in_process_rss_kib_per_life": 1024 * value}


def lead(life: Life, names: list[str]) -> None:
    """Jobs that share a cache, from their making to their end."""
    for name in names:
        life.create(JOBS, name, Specs.job(name, {"cache": Specs.cache(0)}))
    ended = life.wait_until(
        lambda: all(found["status"].get("phase") == "Succeeded" for found in life.server.all(JOBS)), LIFE_SECONDS, 5.0
    )
    if not ended:
        raise RuntimeError("lives that never end")
    for name in names:
        life.delete(JOBS, name)
    life.wait(5.0)
    life.store.rows.clear()
    life.store.hooks.clear()
    life.store.outputs.clear()


def profile(count: int, path: Path | None = None) -> None:
    """Prints where the CPU of so many first Jobs goes, in functions of the operator and of what it calls."""
    life = Life(0)
    ask, progress.ask = progress.ask, life.answer_poll  # type: ignore[assignment]
    life.invariants.most_writes = sys.maxsize
    try:
        life.set_mood("long")
        life.start_operator()
        life.wait(1.0)
        profiler = cProfile.Profile(time.process_time)
        profiler.enable()
        for number in range(count):
            life.create(JOBS, f"job-{number}", Specs.job(f"job-{number}", {"uri": "s3://saes/there"}))
        life.wait(5.0)
        profiler.disable()
        stats = pstats.Stats(profiler)
        stats.sort_stats("cumulative").print_stats(r"sae_operator|pydantic", 45)
        if path is not None:
            stats.dump_stats(path)
    finally:
        life.close()
        progress.ask = ask
