"""How fast one SAE trains on a CPU, beside the libraries that people use: float32, one thread, CPU seconds per step.

    python bench/training.py [--shape D_IN,D_SAE] [--arch A] [--density initial|trained] [--quick] [--out FILE]

Each side is a process in an environment of its own that holds an SAE with the same weights. What a step needs of memory
is measured first; then loss and gradients are compared; then the sides take steps in turn, so that a noisy machine is
noisy for all. Figures, of medians:

    A_vs_SIDE       CPU seconds per step of the side over ours: above 1, ours is faster
    topk_vs_sparsify_tuned_malloc
                    the same with both sides' C library kept from giving memory back between steps: fresh pages cost a
                    side that allocates much a large part of its step
    x_bound         ours over the bound: the encoder's product and fused Adam
    peak_mib        of each side: the SAE, its optimiser, and what a step needs

Architectures with a penalty are measured twice: as training begins, with about half of the latents active, and with 60
active, as they are once trained; `--density` chooses one. `--out` adds the figures to a results file, and writes its
table beside it.
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from bench.machine import machine
from bench.peers import DICTIONARY_LEARNING, SAE_LENS_NEWEST, SPARSIFY, peer_environment
from bench.sides.setting import PENALIZED, Setting
from bench.training_numerics import check_numerics, make_sparse, start_weights
from bench.training_table import add_results
from bench.worker import Worker
from tests.testbed.paths import CHECKOUT

ARCHITECTURES = ("topk", "batchtopk", "matryoshka_batchtopk", "standard", "gated", "jumprelu")
BATCH, BATCHES, K = 4096, 4, 32
LEARNING_RATE = 1e-3
COEFFICIENTS = {"standard": 5.0, "gated": 5.0, "jumprelu": 1.0}
# Active latents of a trained SAE.
TRAINED_ACTIVE = 60
TUNED_MALLOC = {f"MALLOC_{name}_": "4294967296" for name in ("TOP_PAD", "MMAP_THRESHOLD", "TRIM_THRESHOLD")}


@dataclass(frozen=True)
class Turns:
    """How long it is measured: `rounds` turns of `steps` steps of each side."""

    rounds: int
    steps: int


def interpreters(architecture: str) -> dict[str, Path]:
    found = {"ours": Path(sys.executable), "bound": Path(sys.executable)}
    if architecture == "topk":
        found["sparsify"] = SPARSIFY.python()
    return found | {"saelens": SAE_LENS_NEWEST.python(), "dictionary_learning": DICTIONARY_LEARNING.python()}


def measure(
    setting: Setting, start: Path, sides: dict[str, Path], turns: Turns, malloc: dict[str, str], *, numerics: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Median CPU seconds per step, and MiB, of each side."""
    environment = peer_environment() | malloc
    # The product of this checkout, whatever is installed.
    own = environment | {"PYTHONPATH": f"{CHECKOUT}/jobimage:{CHECKOUT}/operator"}
    arguments = [json.dumps(asdict(setting)), os.fspath(start)]
    workers = [
        Worker(side, python, "training_worker.py", [side, *arguments], own if side == "ours" else environment)
        for side, python in sides.items()
    ]
    for worker in workers:
        worker.answer()
    # Adam's state and buffers are made in the first of these steps.
    memory = {worker.name: worker.ask("memory 2")["mib"] for worker in workers}
    if numerics:
        with tempfile.TemporaryDirectory() as folder:
            compared = [worker for worker in workers if worker.name != "bound"]
            check_numerics(compared, Path(folder), setting.architecture, load_file(start)["W_dec"])
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    for _ in range(turns.rounds):
        for worker in workers:
            seconds[worker.name].append(worker.ask(f"steps {turns.steps}")["cpu_seconds"] / turns.steps)
    for worker in workers:
        worker.close()
    return {name: statistics.median(values) for name, values in seconds.items()}, memory


def compare(setting: Setting, density: str, turns: Turns) -> dict[str, object]:
    """Figures of one architecture at one density; what is printed on the way is for people."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "start.safetensors"
        start = start_weights(setting.architecture, setting.d_in, setting.d_sae, BATCH, BATCHES)
        if density == "trained":
            make_sparse(start, TRAINED_ACTIVE)
        save_file(start, path)
        print(f"{setting.architecture} ({density}), {setting.d_in} x {setting.d_sae}, batch {BATCH}, k {K}, one thread")
        sides = interpreters(setting.architecture)
        seconds, memory = measure(setting, path, sides, turns, {}, numerics=True)
        tuned: dict[str, float] = {}
        if setting.architecture == "topk":
            both = {side: sides[side] for side in ("ours", "sparsify")}
            tuned, _ = measure(setting, path, both, turns, TUNED_MALLOC, numerics=False)
    for side, median in sorted(seconds.items(), key=lambda item: item[1]):
        times = median / seconds["bound"]
        print(f"  {side:<20} {median:8.3f} CPU-s per step {times:8.2f} x bound {memory[side]:8.0f} MiB")
    return {"cpu_seconds": seconds, "cpu_seconds_tuned_malloc": tuned, "peak_mib": memory}


def ratios(architecture: str, suffix: str, figures: dict[str, object]) -> dict[str, object]:
    """What the last line tells."""
    seconds, tuned, memory = (figures[name] for name in ("cpu_seconds", "cpu_seconds_tuned_malloc", "peak_mib"))
    assert isinstance(seconds, dict)
    assert isinstance(tuned, dict)
    assert isinstance(memory, dict)
    found: dict[str, object] = {
        f"{architecture}_vs_{side}{suffix}": round(value / seconds["ours"], 3)
        for side, value in seconds.items()
        if side not in ("ours", "bound")
    }
    if tuned:
        found[f"{architecture}_vs_sparsify_tuned_malloc"] = round(tuned["sparsify"] / tuned["ours"], 3)
    found[f"x_bound{suffix}"] = round(seconds["ours"] / seconds["bound"], 3)
    found[f"peak_mib{suffix}"] = {side: round(value) for side, value in memory.items() if side != "bound"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="576,4608", help="d_in,d_sae (default: %(default)s)")
    parser.add_argument("--arch", default="topk", choices=ARCHITECTURES, help="default: %(default)s")
    parser.add_argument(
        "--density", choices=["initial", "trained"], help="of penalised architectures; both when left out"
    )
    parser.add_argument("--rounds", type=int, help="turns of each side")
    parser.add_argument("--quick", action="store_true", help="few turns")
    parser.add_argument("--out", type=Path, help="results file, e.g. docs/benchmarks/training.json")
    options = parser.parse_args()
    d_in, d_sae = (int(size) for size in options.shape.split(","))
    turns = Turns(2, 1) if options.quick else Turns(options.rounds or 7, 2 if d_in * d_sae < 10**7 else 1)
    setting = Setting(
        architecture=options.arch,
        d_in=d_in,
        d_sae=d_sae,
        k=K,
        batch=BATCH,
        steps=None,
        learning_rate=LEARNING_RATE,
        coefficient=COEFFICIENTS.get(options.arch, 0.0),
        seed=0,
        quality=False,
    )
    densities = ["k"]
    if options.arch in PENALIZED:
        densities = [options.density] if options.density else ["initial", "trained"]
    line: dict[str, object] = {}
    for density in densities:
        figures = compare(setting, density, turns)
        line |= ratios(options.arch, "" if len(densities) == 1 else f"_{density}", figures)
        if options.out is not None:
            key = {"shape": f"{d_in}x{d_sae}", "architecture": options.arch, "density": density}
            add_results(options.out, machine(), {**key, **asdict(turns), "batch": BATCH, "k": K, **figures})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
