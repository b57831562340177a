"""One training of the quality benchmark: one side, one setting, on rows of a file.

    python quality_worker.py SIDE SETTING_JSON ROWS.npy OUT

Run by the Python of the side's own environment. Rows are read in the file's order, and in a permutation of it for each
further epoch: the same for every side. Writes the trained SAE to OUT.safetensors, and what is to be told of the
training to OUT.json.

A setting with `"steer": true` moves the penalty's coefficient from a fifth to four fifths of the training until the
target number of latents is active, and keeps what it came to: a search for the coefficient in one run, the same for
every side. Its results are used to choose, not to compare.
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from safetensors.torch import save_file

from bench.sides import side_of
from bench.sides.setting import PENALIZED, Setting, Side

STEER_FROM, STEER_TO, STEER_AVERAGE = 0.2, 0.8, 0.1
# Of the relative distance of L0 from its target, the part by which the coefficient moves per step; the distance counts
# for this much at most.
STEER_GAIN, STEER_MOST = 0.02, 0.5


def batches(rows: np.ndarray, batch: int, steps: int) -> Iterator[torch.Tensor]:
    """`steps` batches of rows; what is left over at an epoch's end is left out."""
    per_epoch = len(rows) // batch
    order = np.arange(len(rows))
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0 and epoch > 0:
            order = np.random.default_rng(epoch).permutation(len(rows))
        chosen = order[place * batch : (place + 1) * batch]
        yield torch.from_numpy(rows[chosen])


def train(side: Side, setting: Setting, rows: np.ndarray, *, steer: bool) -> list[float]:
    """Train; returns the numbers of active latents that the side told."""
    assert setting.steps is not None
    side.begin(lambda count: torch.from_numpy(np.array(rows[:count])))
    told: list[float] = []
    tried: list[float] = []
    last = int(STEER_TO * setting.steps)
    for step, x in enumerate(batches(rows, setting.batch, setting.steps)):
        active = side.step(x)
        if active is None:
            continue
        told.append(active)
        if steer and STEER_FROM * setting.steps <= step < last:
            distance = math.log(max(active, 0.01) / setting.k)
            move = STEER_GAIN * max(-STEER_MOST, min(STEER_MOST, distance))
            side.set_coefficient(side.coefficient * math.exp(move))
            tried.append(side.coefficient)
        elif steer and step == last:
            recent = tried[-int(STEER_AVERAGE * setting.steps) :]
            side.set_coefficient(sum(recent) / len(recent))
    return told


def main(name: str, setting_json: str, rows_path: str, out: str) -> None:
    torch.set_num_threads(1)
    wanted = json.loads(setting_json)
    steer = wanted.pop("steer")
    setting = Setting(**wanted)
    rows = np.load(rows_path, mmap_mode="r")
    side = side_of(name, setting)
    before = time.process_time()
    told = train(side, setting, rows, steer=steer and setting.architecture in PENALIZED)
    seconds = time.process_time() - before
    sae = side.trained()
    save_file({key: tensor.float().contiguous() for key, tensor in sae.tensors.items()}, f"{out}.safetensors")
    facts = {
        "activation": sae.activation,
        "subtracts_b_dec": sae.subtracts_b_dec,
        "cpu_seconds": round(seconds, 1),
        "coefficient": side.coefficient if setting.architecture in PENALIZED and told else None,
        "training_l0": sum(told[-50:]) / len(told[-50:]) if told else None,
    }
    with open(f"{out}.json.partial", "w") as file:
        json.dump(facts, file)
    os.replace(f"{out}.json.partial", f"{out}.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
