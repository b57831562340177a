"""One side of the training benchmark: holds an SAE, and trains it so many steps when told to.

    python training_worker.py SIDE SETTING_JSON START

Run by the Python of the side's own environment, so it imports nothing but PyTorch before it knows the side. It reads
one request a line and answers with one line of JSON:

    steps N          trains N steps; the CPU seconds that they took
    memory N         trains N steps; MiB that the process needed for them and for the SAE, beside what it held before
    gradients PATH   writes the loss and the gradients of the first batch, with the weights of START, to PATH

START is a safetensors file with the weights to begin with and the batches, the same for all sides. Weights of START
are taken over again after `memory` and `gradients`.
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
import time
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench.sides import import_side, side_of
from bench.sides.setting import Setting


def memory_mib(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Let `VmHWM` begin anew."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def main(name: str, setting_json: str, start_path: str) -> None:
    torch.set_num_threads(1)
    # Libraries print as they please; answers go where standard output was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    setting = Setting(**json.loads(setting_json))
    import_side(name)
    start = load_file(start_path)
    batches = start.pop("batches")
    forget_peak()
    before_mib = memory_mib("VmRSS")
    side = side_of(name, setting)
    side.load(start)
    side.begin(lambda count: batches.flatten(0, 1)[:count])
    steps = 0
    print(json.dumps({"ready": name}), file=answers, flush=True)

    def train(count: int) -> float:
        nonlocal steps
        before = time.process_time()
        for _ in range(count):
            side.step(batches[steps % len(batches)])
            steps += 1
        return time.process_time() - before

    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        answer: dict[str, Any]
        if command == "gradients":
            gradients = side.gradients(batches[0])
            save_file({key: tensor.detach().clone().contiguous() for key, tensor in gradients.items()}, argument)
            side.load(start)
            answer = {"written": argument}
        elif command == "memory":
            train(int(argument))
            answer = {"mib": memory_mib("VmHWM") - before_mib}
            side.load(start)
        else:
            answer = {"cpu_seconds": train(int(argument))}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
