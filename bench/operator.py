"""How fast, and at what cost, the operator answers: real API server, Job controller and scheduler, one operator.

    python bench/operator.py [--quick] [--only steady,burst,large,life,rest,slope,live,in-process] [--profile]

Most resources are SAETrainingJobs that read a finished cache, so that their first step (ConfigMap, Job, status, event)
is due at once. Pods are bound to a node that runs nothing; their ends are told through the API. The operator has the
rights of its ServiceAccount, and its calls are counted in the API server's audit log. Figures, by part:

    steady      steady_p50_ms, steady_p99_ms   5 resources a second: from the API server's answer to the resource until
                                               a watch shows its Job
    burst       burst_1000_s                   1,000 at once: from the first request until a watch shows the last Job
                cpu_ms_per_resource            CPU of the operator until then, by resource
                settled_cpu_ms_per_resource    the same until its writes have ended: pods listed, every status written
                rss_mib                        resident memory of the operator with the 1,000 active
    large       burst_3000_s, rss_mib_3000     the same for 3,000
                restart_3000_s                 from the start of another operator until it is quiet
                restart_rss_mib_3000, restart_writes
                unschedulable_3000_s           from the creation of one more, for whose pod there is no node, until its
                                               status says so
    life        writes_per_life                children and status of a training job on a Ready cache, without events
                events_per_life
    rest        rest_writes                    within two minutes at rest with 3,000 finished, but for the heartbeat
                rest_restart_writes, rss_mib_3000_finished, lives_per_second
    slope       rss_kib_per_life               growth of memory over 2,000 lives whose resources are deleted
    live        patches_per_second_500         status patches while 500 trainings tell other figures at each look
                progress_age_500_s             age of the oldest progress in a status
                cpu_share_500                  share of a core
    in-process  in_process_rss_kib_per_life    growth over as many lives on an API server in memory as go into 5 minutes
                in_process_lives

`--quick` takes a fraction of the resources (all parts but `rest`, `slope` and `live`, which take minutes, unless they
are asked for) and scales the bursts' times; memory is what so few need. `--profile` prints where the CPU goes until the
first Job of a resource is made, on an API server in memory.
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[1:1] = [os.path.join(sys.path[0], "operator")]

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import operator_in_process, operator_parts
from bench.operator_bed import Bed, running

# Part: what measures it, with so many resources, quickly and in full.
PARTS: dict[str, tuple[Callable[[Bed, int], operator_parts.Figures], int, int]] = {
    "steady": (operator_parts.steady, 40, 150),
    "burst": (operator_parts.burst, 200, 1000),
    "large": (operator_parts.large, 300, 3000),
    "life": (operator_parts.life, 2, 10),
    "rest": (operator_parts.rest, 100, 3000),
    "slope": (operator_parts.slope, 200, 2000),
    "live": (operator_parts.live, 50, 500),
}
IN_PROCESS, IN_PROCESS_SECONDS = "in-process", (10.0, 300.0)
LONG_PARTS = frozenset({"rest", "slope", "live"})
PROFILED = 300
# Figures that are told to a tenth.
COARSE = ("_ms", "_s", "_mib", "_3000")


def parts(text: str) -> list[str]:
    """The parts that `--only` names."""
    names = text.split(",")
    unknown = sorted(set(names) - {*PARTS, IN_PROCESS})
    if unknown:
        raise argparse.ArgumentTypeError(f"no such part: {', '.join(unknown)}")
    return names


def measure(names: list[str], *, quick: bool) -> operator_parts.Figures:
    """All figures of the parts."""
    figures: operator_parts.Figures = {}
    on_bed = [name for name in names if name in PARTS]
    if on_bed:
        with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as bed:
            for name in on_bed:
                part, few, many = PARTS[name]
                told = part(bed, few if quick else many)
                show(name, told)
                figures |= told
                bed.kubelet.scripts.clear()
                if name != on_bed[-1]:
                    bed.empty()
            if bed.problems:
                raise SystemExit("\n".join(["the operator logged errors:", *bed.problems[:10]]))
    if IN_PROCESS in names:
        told = operator_in_process.lives(IN_PROCESS_SECONDS[not quick])
        show(IN_PROCESS, told)
        figures |= told
    return figures


def show(name: str, figures: operator_parts.Figures) -> None:
    for key, value in figures.items():
        print(f"{name:<12}{key:<32}{rounded(key, value):>12}", flush=True)


def rounded(key: str, value: float) -> float:
    return round(value, 1 if key.endswith(COARSE) else 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency and cost of the operator.")
    parser.add_argument("--quick", action="store_true", help="fewer resources")
    parser.add_argument("--only", type=parts, help=f"parts, of {', '.join([*PARTS, IN_PROCESS])}")
    parser.add_argument("--profile", action="store_true", help="show where the CPU goes, in memory")
    options = parser.parse_args()
    if options.profile:
        operator_in_process.profile(PROFILED)
        return
    every = [*PARTS, IN_PROCESS]
    names = options.only or [name for name in every if not (options.quick and name in LONG_PARTS)]
    figures = measure(names, quick=options.quick)
    print(json.dumps({key: rounded(key, value) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
