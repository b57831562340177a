"""Gradients, losses and counts of ranks add up to those of one process with all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_job.saes.trainable import StepInput
from tests.unit.saes.conftest import BATCHTOPK, D_SAE, MATRYOSHKA, TOPK, batch, trainable, transcoded
from tests.unit.saes.simulated_ranks import SimulatedRank, on_ranks

ROWS = 32
DEAD = torch.arange(D_SAE) % 3 == 0
TYPES: dict[str, dict[str, Any]] = {"topk": TOPK, "batchtopk": BATCHTOPK, "matryoshka": MATRYOSHKA}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "": ({"auxKCoefficient": 0}, {}),
    ", dead latents revived": ({"auxKCoefficient": 0.5, "auxK": 4}, {}),
    ", dead latents revived in SAELens's form": ({"auxKForm": "saelens", "auxK": 4}, {}),
    ", errors relative to distances": ({"auxKCoefficient": 0}, {"mse_loss_normalization": "dense_batch"}),
    ", as a transcoder": ({}, {"hook": "in", "targetHook": "out", "skipConnection": True}),
}
CASES = {kind + option: (TYPES[kind], *OPTIONS[option]) for kind in TYPES for option in OPTIONS}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_add_up_to_one_process(case: str, size: int) -> None:
    kind, settings, fields = CASES[case]
    architecture = {**kind, **settings}
    rows = ROWS // size

    def steps(rank: SimulatedRank | None) -> dict[str, torch.Tensor]:
        options = fields if rank is None else {**fields, "ranks": rank}
        sae = trainable(architecture, **options)
        found: dict[str, torch.Tensor] = {}
        for step in range(3):
            x = batch(seed=step, rows=ROWS)
            target = transcoded(x) if sae.spec.target_hook is not None else x
            mine = slice(None) if rank is None else slice(rank.index * rows, (rank.index + 1) * rows)
            statistics = sae.step_gradients(StepInput(x[mine], target[mine], step, DEAD))
            found |= {f"{step} {name}": loss for name, loss in statistics.losses.items()}
            found |= {f"{step} loss": statistics.loss, f"{step} counts": statistics.fire_counts}
            for name, parameter in sae.parameters_by_name.items():
                assert parameter.grad is not None
                found[f"{step} {name}"] = parameter.grad.clone()
            found |= {f"{step} buffer {name}": buffer.clone() for name, buffer in sae.buffers_by_name.items()}
        return found

    alone = steps(None)
    together = on_ranks(size, steps)
    for name, expected in alone.items():
        parts = torch.stack([found[name] for found in together])
        if "buffer" in name:  # every rank has the same
            assert torch.equal(parts, expected.expand_as(parts)), name
        elif "counts" in name:
            assert torch.equal(parts.sum(dim=0), expected), name
        else:
            assert torch.allclose(parts.sum(dim=0), expected, rtol=1e-4, atol=1e-6), name
