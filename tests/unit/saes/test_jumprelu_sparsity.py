"""That thresholds move the number of active latents, which their straight-through gradients are there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_job.saes.jumprelu import JumpReLUSAE
from sae_job.saes.trainable import ONE_PROCESS, StepInput
from tests.unit.saes.conftest import D_SAE, sae_spec


def train(architecture: dict[str, Any], steps: int) -> list[float]:
    """L0 of each step of a training on sums of few directions, scaled as training scales activations."""
    spec = sae_spec({"type": "jumprelu", **architecture})
    width, directions = 16, 48
    sae = JumpReLUSAE(spec, width, width, D_SAE, device=torch.device("cpu"), ranks=ONE_PROCESS)
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.nn.functional.normalize(torch.randn(directions, width, generator=generator), dim=1)

    def rows(count: int) -> Tensor:
        present = (torch.rand(count, directions, generator=generator) < 4 / directions).float()
        x = (present * torch.rand(count, directions, generator=generator).add_(0.5)) @ dictionary
        return x * (width**0.5 / x.square().sum(dim=1).mean().sqrt())

    sample = rows(1024)
    sae.initialize(sample, sample, generator)
    optimizer = torch.optim.Adam(list(sae.parameters_by_name.values()), lr=1e-2)
    l0 = []
    for step in range(steps):
        x = rows(256)
        statistics = sae.step_gradients(StepInput(x, x, step))
        sae.project_gradients()
        optimizer.step()
        sae.after_optimizer_step()
        l0.append(float(statistics.fire_counts.sum()) / x.shape[0])
    return l0


@pytest.mark.parametrize("target", [6.0, 12.0])
def test_l0_reaches_its_target(target: float) -> None:
    l0 = train({"sparsityPenalty": "target_l0", "targetL0": target, "l0Coefficient": 50.0}, steps=500)
    assert l0[0] > 20
    assert sum(l0[-50:]) / 50 == pytest.approx(target, rel=0.1)


@pytest.mark.parametrize("penalty", ["step", "tanh"])
def test_l0_falls_with_the_penalty(penalty: str) -> None:
    """At the default bandwidth and threshold."""
    weak, strong = (
        train({"sparsityPenalty": penalty, "l0Coefficient": coefficient}, steps=400) for coefficient in (0.01, 0.5)
    )
    assert strong[-1] < weak[-1] < weak[0]
    assert strong[-1] < 0.4 * strong[0]
