"""On a GPU, a training step of every architecture gives what it gives on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_job.saes.architectures import TRAINABLE, build_trainable
from sae_job.saes.trainable import StepInput, TrainableSAE
from sae_operator.api.sae import SaeSpec
from tests.gpu.device import DEVICE

D_IN, D_SAE, BATCH = 256, 4096, 512
# A tie of two pre-activations may be broken differently; a wrong product is off by orders more.
TOLERANCE = 2e-3

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"type": "topk", "k": 16, "auxKCoefficient": 0},
    "topk with revival": {"type": "topk", "k": 16},
    "batchtopk": {"type": "batchtopk", "k": 16},
    "matryoshka": {"type": "matryoshka_batchtopk", "k": 16},
    "standard": {"type": "standard", "l1Coefficient": 1.0},
    "standard with ghosts": {"type": "standard", "l1Coefficient": 1.0, "ghostGradients": True},
    "gated": {"type": "gated", "l1Coefficient": 1.0},
    "jumprelu": {"type": "jumprelu", "l0Coefficient": 1.0},
    "jumprelu with tanh": {"type": "jumprelu", "l0Coefficient": 1.0, "sparsityPenalty": "tanh"},
}


def test_every_architecture_is_checked() -> None:
    assert {architecture["type"] for architecture in ARCHITECTURES.values()} == set(TRAINABLE)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """A sample to begin with, and a batch [BATCH, D_IN]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2048, D_IN, generator=generator), torch.randn(BATCH, D_IN, generator=generator)


def started(architecture: dict[str, Any], **options: Any) -> tuple[TrainableSAE, TrainableSAE]:
    """The same SAE on the CPU and on the device."""
    spec = SaeSpec.model_validate({"name": "sae", "architecture": architecture, "dSae": D_SAE})
    on_cpu = build_trainable(spec, D_IN, device="cpu", **options)
    sample, _ = data()
    on_cpu.initialize(sample, sample, torch.Generator().manual_seed(1))
    return on_cpu, copied(spec, on_cpu, **options)


def copied(spec: SaeSpec, sae: TrainableSAE, **options: Any) -> TrainableSAE:
    copy = build_trainable(spec, D_IN, device=DEVICE, **options)
    with torch.no_grad():
        for name, parameter in copy.parameters_by_name.items():
            parameter.copy_(sae.parameters_by_name[name])
        for name, buffer in copy.buffers_by_name.items():
            buffer.copy_(sae.buffers_by_name[name])
    return copy


def relative_errors(expected: TrainableSAE, found: TrainableSAE) -> dict[str, float]:
    """Of each parameter's gradient, relative to its norm."""
    errors: dict[str, float] = {}
    for name, parameter in expected.parameters_by_name.items():
        gradient = found.parameters_by_name[name].grad
        assert gradient is not None
        assert parameter.grad is not None
        errors[name] = float((gradient.cpu() - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-12))
    return errors


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_step_has_the_same_gradients(name: str) -> None:
    on_cpu, on_device = started(ARCHITECTURES[name])
    _, x = data()
    dead = torch.rand(D_SAE, generator=torch.Generator().manual_seed(2)) < 0.3
    expected = on_cpu.step_gradients(StepInput(x, x, 0, dead))
    found = on_device.step_gradients(StepInput(x.to(DEVICE), x.to(DEVICE), 0, dead.to(DEVICE)))
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-4)
    for parameter, error in relative_errors(on_cpu, on_device).items():
        assert error < TOLERANCE, parameter
    difference = (found.fire_counts.cpu() - expected.fire_counts).abs().sum()
    assert int(difference) <= TOLERANCE * int(expected.fire_counts.sum())


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_saved_sae_encodes_the_same(name: str) -> None:
    on_cpu, on_device = started(ARCHITECTURES[name])
    _, x = data()
    expected, found = on_cpu.active_latents(x).dense(), on_device.active_latents(x.to(DEVICE)).dense().cpu()
    assert float((found - expected).norm() / expected.norm()) < TOLERANCE


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.usefixtures("deterministic")
def test_two_steps_on_the_same_batch_have_the_same_bits(name: str) -> None:
    first, second = (started(ARCHITECTURES[name])[1] for _ in range(2))
    x = data()[1].to(DEVICE)
    dead = torch.rand(D_SAE, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.3
    for sae in (first, second):
        sae.step_gradients(StepInput(x, x, 0, dead))
    for parameter, tensor in first.parameters_by_name.items():
        assert tensor.grad is not None
        other = second.parameters_by_name[parameter].grad
        assert other is not None
        assert torch.equal(tensor.grad, other), parameter
