"""On a GPU, training steps give what they give on the CPU. Run by `make gpu-check`; fails where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_job.saes.architectures import build_trainable
from sae_job.saes.trainable import StepInput
from sae_operator.api.sae import SaeSpec

D_IN, D_SAE, BATCH = 256, 4096, 512


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    """TF32 would round the products' inputs to 10 bits."""
    assert torch.cuda.is_available(), "this check needs a CUDA device"
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize(
    "architecture",
    [
        {"type": "topk", "k": 16},
        {"type": "topk", "k": 16, "auxKCoefficient": 0.03125},
        {"type": "standard", "l1Coefficient": 1.0},
    ],
    ids=["topk", "topk with revival", "standard"],
)
def test_a_step_has_the_same_gradients(architecture: dict[str, Any]) -> None:
    spec = SaeSpec.model_validate({"name": "sae", "architecture": architecture, "dSae": D_SAE})
    generator = torch.Generator().manual_seed(0)
    sample, x = (torch.randn(rows, D_IN, generator=generator) for rows in (2048, BATCH))
    dead = torch.rand(D_SAE, generator=generator) < 0.3
    on_cpu = build_trainable(spec, D_IN, device="cpu")
    on_cpu.initialize(sample, sample, torch.Generator().manual_seed(1))
    on_gpu = build_trainable(spec, D_IN, device="cuda")
    with torch.no_grad():
        for name, parameter in on_gpu.parameters_by_name.items():
            parameter.copy_(on_cpu.parameters_by_name[name])
    expected = on_cpu.step_gradients(StepInput(x, x, 0, dead))
    found = on_gpu.step_gradients(StepInput(x.cuda(), x.cuda(), 0, dead.cuda()))
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-4)
    for name, parameter in on_cpu.parameters_by_name.items():
        gradient = on_gpu.parameters_by_name[name].grad
        assert gradient is not None
        assert parameter.grad is not None
        error = (gradient.cpu() - parameter.grad).norm() / parameter.grad.norm()
        # A tie of two pre-activations may be broken differently; a wrong product is off by orders more.
        assert float(error) < 2e-3, name
