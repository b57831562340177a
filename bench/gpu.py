"""How fast one TopK SAE trains on a GPU, beside sparsify and SAELens and the floor: bfloat16, synthetic activations.

    python bench/gpu.py [--quick] [--device cpu] [--shape D_IN,D_SAE ...] [--no-peers]

No cluster, no model, no store: activations are made on the device. Each side is a process in an environment of its
own, one after the other, since each fills the GPU; a peer whose environment cannot be made here, or that sees no GPU,
is told and left out. Figures, per shape, named by the number of latents:

    tokens_per_second_N, ms_per_step_N      ours; a step is a batch
    topk_vs_sparsify_N, topk_vs_saelens_N   the peer's time per step over ours: above 1, ours is faster
    x_floor_N                               our step's time over the floors of its parts

Random activations make all latents fire alike; a trained SAE has some that fire on every row. `--device cpu` tries the
benchmark itself: its times say nothing of a GPU.
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import statistics
from pathlib import Path

import torch

from bench.gpu_parts import Device, Shape, measured_device, parts_of_a_step, print_parts
from bench.peers import SAE_LENS_NEWEST, SPARSIFY, Peer, peer_environment
from bench.worker import Worker

K, BATCH = 64, 8192
SHAPES = ("2304,16384", "2304,65536")
PEERS: dict[str, Peer] = {"sparsify": SPARSIFY, "saelens": SAE_LENS_NEWEST}
# Small enough for a CPU.
CPU_SHAPE, CPU_K, CPU_BATCH = "64,512", 8, 256


def interpreters(with_peers: bool) -> dict[str, Path]:
    """The Python of each side that can be had."""
    found = {"ours": Path(sys.executable)}
    for side, peer in PEERS.items() if with_peers else ():
        try:
            found[side] = peer.python()
        except (RuntimeError, OSError) as error:
            last_line = str(error).strip().splitlines()[-1]
            print(f"{side} is left out: its environment cannot be made here ({last_line})")
    return found


def seconds_per_step(side: str, python: Path, shape: Shape, device: str, *, steps: int, turns: int) -> float | None:
    """Median over turns of `steps` steps; None where the side cannot run here."""
    sizes = [str(size) for size in (shape.d_in, shape.d_sae, shape.k, shape.batch)]
    try:
        with Worker(side, python, "gpu_worker.py", [side, device, *sizes], peer_environment()) as worker:
            answer = worker.answer()
            if "unable" in answer:
                print(f"  {side} is left out: {answer['unable']}")
                return None
            worker.ask(f"steps {steps}")  # compiles, and makes Adam's state
            return statistics.median(worker.ask(f"steps {steps}")["seconds"] / steps for _ in range(turns))
    except (RuntimeError, BrokenPipeError) as error:
        if side == "ours":
            raise
        print(f"  {side} is left out: {error}; its last words are above")
        return None


def figures_of(shape: Shape, on: Device, sides: dict[str, Path], *, steps: int, turns: int) -> dict[str, float | None]:
    print(f"{shape.d_in} x {shape.d_sae}, k {shape.k}, batch {shape.batch}, bfloat16")
    seconds: dict[str, float] = {}
    for side, python in sides.items():
        taken = seconds_per_step(side, python, shape, on.device.type, steps=steps, turns=turns)
        if taken is not None:
            seconds[side] = taken
            print(f"  {side:<10} {1e3 * taken:10.3f} ms per step {shape.batch / taken:14,.0f} tokens/s")
    parts = parts_of_a_step(shape, on, repeats=steps)
    print_parts(parts, on.device)
    ours, floor = seconds["ours"], sum(part.floor for part in parts if part.floor is not None) / 1e3
    print(f"  the whole step is {ours / floor:.2f} times the sum of the floors, {1e3 * floor:.3f} ms")
    compared = {
        f"topk_vs_{side}_{shape.d_sae}": round(seconds[side] / ours, 3) if side in seconds else None for side in PEERS
    }
    return {
        f"tokens_per_second_{shape.d_sae}": round(shape.batch / ours),
        f"ms_per_step_{shape.d_sae}": round(1e3 * ours, 3),
        **compared,
        f"x_floor_{shape.d_sae}": round(ours / floor, 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and turns")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default: %(default)s")
    parser.add_argument("--shape", action="append", help="d_in,d_sae; may be given several times")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and there is none", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    small = device.type == "cpu"
    steps, turns = (2, 2) if small else (20, 3) if options.quick else (50, 7)
    on = measured_device(device, repeats=steps)
    name = "CPU" if small else torch.cuda.get_device_name()
    rates = f"{on.bytes_per_second / 1e12:.3f} TB/s copied, {on.operations_per_second / 1e12:.3f} Tflop/s in bfloat16"
    print(f"{name}, PyTorch {torch.__version__}: {rates}")
    sides = interpreters(not options.no_peers)
    figures: dict[str, float | None] = {}
    for text in options.shape or ([CPU_SHAPE] if small else SHAPES):
        d_in, d_sae = (int(size) for size in text.split(","))
        shape = Shape(d_in, d_sae, CPU_K if small else K, CPU_BATCH if small else BATCH)
        figures |= figures_of(shape, on, sides, steps=steps, turns=turns)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
