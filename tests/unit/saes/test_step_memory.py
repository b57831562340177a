"""SAEs that step one after another share the memory that a step writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_job.saes.architectures import build_trainable
from sae_job.saes.step_memory import StepMemory
from sae_job.saes.trainable import StepInput, TrainableSAE
from tests.unit.saes.conftest import BATCHTOPK, D_IN, MATRYOSHKA, STANDARD, TOPK, batch, sae_spec

CPU = torch.device("cpu")
# Of several widths, and each kind twice: what one leaves behind is there when the next one steps.
SAES: list[tuple[dict[str, Any], int]] = [
    (TOPK, 64),
    ({**TOPK, "noiseScale": 0.1}, 200),
    (STANDARD, 48),
    (BATCHTOPK, 100),
    ({**MATRYOSHKA, "widths": [8]}, 64),
    ({"type": "gated", "l1Coefficient": 0.2}, 72),
    ({"type": "jumprelu", "l0Coefficient": 0.2, "noiseScale": 0.1}, 80),
    (STANDARD, 96),
    (TOPK, 32),
]


def test_what_is_taken_again_is_the_same_memory() -> None:
    memory = StepMemory()
    large = memory.take("pre", 6, 5, device=CPU)
    small = memory.take("pre", 2, 7, device=CPU)
    assert small.shape == (2, 7)
    assert small.is_contiguous()
    assert small.data_ptr() == large.data_ptr()
    assert memory.take("pre", 6, 5, device=CPU).data_ptr() == large.data_ptr()


@pytest.mark.parametrize("other", [{"name": "noise", "dtype": torch.float32}, {"name": "pre", "dtype": torch.bfloat16}])
def test_other_names_and_formats_have_memory_of_their_own(other: dict[str, Any]) -> None:
    memory = StepMemory()
    first = memory.take("pre", 3, device=CPU).fill_(1.0)
    memory.take(other["name"], 3, device=CPU, dtype=other["dtype"]).fill_(2.0)
    assert torch.equal(first, torch.ones(3))


def steps(sae: TrainableSAE, number: int) -> dict[str, torch.Tensor]:
    """Gradients and active latents of one step."""
    x = batch(number, 40)
    dead = torch.arange(sae.d_sae) % 3 == 0
    statistics = sae.step_gradients(StepInput(x, x, number, dead, torch.Generator().manual_seed(number)))
    found = {
        f"gradient of {name}": tensor.grad.clone()
        for name, tensor in sae.parameters_by_name.items()
        if tensor.grad is not None
    }
    assert len(found) == len(sae.parameters_by_name)
    found |= {f"buffer {name}": tensor.clone() for name, tensor in sae.buffers_by_name.items()}
    return found | {"active": sae.active_latents(x).dense(), "loss": statistics.loss}


def built(memory: StepMemory | None) -> list[TrainableSAE]:
    saes = []
    for seed, (architecture, d_sae) in enumerate(SAES):
        sae = build_trainable(sae_spec(architecture, dSae=d_sae), D_IN, device=CPU, memory=memory)
        sample = batch(99, 200)
        sae.initialize(sample, sample, torch.Generator().manual_seed(seed))
        saes.append(sae)
    return saes


def test_saes_that_share_it_are_bit_for_bit_what_they_are_alone() -> None:
    alone, together = built(None), built(StepMemory())
    expected = [[steps(sae, number) for number in range(3)] for sae in alone]
    found = [[steps(sae, number) for sae in together] for number in range(3)]
    for index in range(len(SAES)):
        for number in range(3):
            for name, tensor in expected[index][number].items():
                assert torch.equal(found[number][index][name], tensor), (SAES[index], number, name)


def test_saes_of_one_kind_take_the_memory_of_the_widest() -> None:
    def taken(widths: list[int]) -> int:
        memory = StepMemory()
        for width in widths:
            sae = build_trainable(sae_spec(TOPK, dSae=width), D_IN, device=CPU, memory=memory)
            sae.step_gradients(StepInput(batch(), batch(), 0))
        return memory.bytes

    assert taken([64, 32, 96, 64]) == taken([96])
