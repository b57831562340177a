"""The architecture that docs/adding-an-architecture.md adds works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from sae_job.saes.trainable import ONE_PROCESS, StepInput
from sae_operator.api.base import Count
from sae_operator.api.sae import Architecture, SaeSpec
from tests.unit.saes.conftest import D_IN, D_SAE, batch, trainable

PAGE = Path(__file__).parents[3] / "docs" / "adding-an-architecture.md"
K, STEPS = 4, 100


class AnnealedArchitecture(Architecture):
    type: Literal["topk", "annealed_topk"]  # pyright: ignore[reportIncompatibleVariableOverride]
    anneal_steps: Count | None = None


class AnnealedSpec(SaeSpec):
    architecture: AnnealedArchitecture  # pyright: ignore[reportIncompatibleVariableOverride]


@pytest.fixture(scope="module")
def documented() -> Any:
    """The class of the page."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, PAGE.name, "exec"), names)
    return names["AnnealedTopKSAE"]


def built(documented: Any, *, anneal_steps: int = STEPS) -> Any:
    spec = AnnealedSpec.model_validate(
        {
            "name": "sae",
            # Its own type would need a row in FIELD_TYPES, which the page adds.
            "architecture": {"type": "topk", "k": K, "annealSteps": anneal_steps},
            "dSae": D_SAE,
        }
    )
    return documented(spec, D_IN, D_IN, D_SAE, device=torch.device("cpu"), ranks=ONE_PROCESS)


def test_the_number_of_active_latents_falls_to_k(documented: Any) -> None:
    sae = built(documented)
    assert [sae.k_at(step) for step in (0, 50, 100, 1000)] == [4 * K, 2.5 * K, K, K]


@pytest.mark.parametrize(("step", "k"), [(0, 4 * K), (50, 10), (STEPS, K)])
def test_a_step_is_that_of_a_topk_sae_with_as_many(documented: Any, step: int, k: int) -> None:
    plain, annealed, x = trainable({"type": "topk", "k": k}), built(documented), batch()
    with torch.no_grad():
        for name, parameter in annealed.parameters_by_name.items():
            parameter.copy_(plain.parameters_by_name[name])
    expected = plain.step_gradients(StepInput(x, x, step))
    found = annealed.step_gradients(StepInput(x, x, step))
    assert torch.equal(found.loss, expected.loss)
    for name, parameter in annealed.parameters_by_name.items():
        gradient = plain.parameters_by_name[name].grad
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient), name


def test_the_copy_for_use_is_a_topk_sae(documented: Any) -> None:
    sae = built(documented)
    sae.step_gradients(StepInput(batch(), batch(), 0))
    # Its type as the page has it, which nobody may load as one of an SAE for use.
    annealed = sae.spec.architecture.model_copy(update={"type": "annealed_topk"})
    sae.spec = sae.spec.model_copy(update={"architecture": annealed})
    used = sae.to_inference(scale=1.0)
    assert (used.cfg.architecture, used.cfg.k) == ("topk", K)
    assert sae.active_latents(batch()).values.shape[-1] == K
