"""How fast one SAE trains on a CPU, beside the libraries that people use: float32, one thread, CPU seconds per step.

    python bench/training.py [--shape D_IN,D_SAE] [--arch topk|standard] [--quick] [--keep-pages]

Each side is a process in an environment of its own that holds an SAE with the same weights. Loss and gradients are
compared first. Then the sides take steps in turn, so that a noisy machine is noisy for all. Figures:

    topk_vs_sparsify, topk_vs_saelens   median CPU seconds per step of the peer over ours: above 1, ours is faster
    x_bound                             ours over the bound: the encoder's product and fused Adam

`--keep-pages` keeps the C library from giving memory back between steps, for all sides: fresh pages cost a side that
allocates much a large part of its step.
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
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.peers import SAE_LENS_NEWEST, SPARSIFY, peer_environment
from bench.worker import Worker

BATCH, K = 4096, 32
BATCHES = 4
# Relative difference of gradients in float32, whatever the order of summation.
TOLERANCE = 1e-3
KEEP_PAGES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "67108864",
}


def write_start(path: Path, d_in: int, d_sae: int) -> None:
    """Weights as training begins with, and batches of random activations."""
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    save_file(
        {
            "W_enc": (0.5 * W_dec.T).contiguous(),
            "b_enc": torch.zeros(d_sae),
            "W_dec": W_dec,
            "b_dec": 0.1 * torch.randn(d_in, generator=generator),
            "batches": torch.randn(BATCHES, BATCH, d_in, generator=generator),
        },
        path,
    )


def check_numerics(workers: list[Worker], folder: Path, W_dec: torch.Tensor) -> None:
    """Raises `RuntimeError` where a side's loss or gradients are not ours.

    Of the decoder's gradient without its part along the rows `W_dec`, which have unit norm: some sides penalize
    activations times that norm, some keep rows there, and neither moves a row otherwise.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for worker in workers:
        path = folder / f"{worker.name}.safetensors"
        worker.ask(f"gradients {path}")
        gradients = load_file(path)
        gradients["W_dec"] -= torch.linalg.vecdot(gradients["W_dec"], W_dec).unsqueeze(1) * W_dec
        found[worker.name] = gradients
    ours = found.pop("ours")
    for side, theirs in found.items():
        for name, tensor in ours.items():
            error = float(torch.linalg.vector_norm(theirs[name] - tensor) / torch.linalg.vector_norm(tensor))
            print(f"  {side:<10} {name:<6} relative difference {error:.1e}")
            if not error <= TOLERANCE:
                raise RuntimeError(f"{side} computes another {name}: the steps cannot be compared")


def compare(architecture: str, d_in: int, d_sae: int, *, rounds: int, steps: int, keep_pages: bool) -> dict[str, float]:
    """CPU seconds per step of each side: the median of `rounds` turns of `steps` steps."""
    interpreters = {"ours": Path(sys.executable), "bound": Path(sys.executable)}
    if architecture == "topk":
        interpreters["sparsify"] = SPARSIFY.python()
    interpreters["saelens"] = SAE_LENS_NEWEST.python()
    environment = peer_environment() | (KEEP_PAGES if keep_pages else {})
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.safetensors"
        write_start(start, d_in, d_sae)
        arguments = [architecture, str(K), str(BATCH), os.fspath(start)]
        workers = [
            Worker(side, python, "training_worker.py", [side, *arguments], environment)
            for side, python in interpreters.items()
        ]
        for worker in workers:
            worker.answer()
        print(f"{architecture}, {d_in} x {d_sae}, batch {BATCH}, k {K}, float32, one thread")
        compared = [worker for worker in workers if worker.name != "bound"]
        check_numerics(compared, Path(folder), load_file(start)["W_dec"])
        for worker in workers:
            worker.ask("steps 2")  # Adam's state and buffers are made in the first
        seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
        for _ in range(rounds):
            for worker in workers:
                seconds[worker.name].append(worker.ask(f"steps {steps}")["cpu_seconds"] / steps)
        for worker in workers:
            worker.close()
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="576,4608", help="d_in,d_sae (default: %(default)s)")
    parser.add_argument("--arch", default="topk", choices=["topk", "standard"], help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="few turns")
    parser.add_argument("--keep-pages", action="store_true", help="keep freed memory, in all sides")
    options = parser.parse_args()
    d_in, d_sae = (int(size) for size in options.shape.split(","))
    rounds, steps = (3, 1) if options.quick else (7, 2)
    seconds = compare(options.arch, d_in, d_sae, rounds=rounds, steps=steps, keep_pages=options.keep_pages)
    for side, median in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"  {side:<10} {median:8.3f} CPU-s per step {median / seconds['bound']:8.2f} x bound")
    ours = seconds["ours"]
    peers = [side for side in ("sparsify", "saelens") if side in seconds]
    figures = {f"{options.arch}_vs_{side}": round(seconds[side] / ours, 3) for side in peers}
    print(json.dumps({**figures, "x_bound": round(ours / seconds["bound"], 3)}))


if __name__ == "__main__":
    main()
