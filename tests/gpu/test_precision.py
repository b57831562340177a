"""On a GPU, 16-bit products change a step by no more than 16 bits can, and selection by them not at all."""

from __future__ import annotations

import torch

from sae_job.saes.kernels.selection import pre_activations, select_top_k
from sae_job.saes.products import products_in
from sae_job.saes.step_memory import StepMemory
from sae_job.saes.trainable import StepInput
from tests.gpu.device import DEVICE
from tests.gpu.test_steps import ARCHITECTURES, BATCH, D_IN, D_SAE, data, relative_errors, started
from tests.kernel_cases import random


def test_bfloat16_products_change_gradients_by_their_rounding() -> None:
    """Operands of 8 bits are off by 2^-9 each at most, but a few latents near the k-th place, or near the ReLU's zero,
    come and go: 0.15 in all, measured on a CPU. A wrong product is off by 1."""
    for name in ("topk", "standard"):
        on_cpu, on_device = started(ARCHITECTURES[name])
        _, x = data()
        on_cpu.step_gradients(StepInput(x, x, 0, None))
        with products_in("bfloat16", torch.device(DEVICE)):
            on_device.step_gradients(StepInput(x.to(DEVICE), x.to(DEVICE), 0, None))
        errors = relative_errors(on_cpu, on_device)
        assert all(error < 0.3 for error in errors.values()), (name, errors)
        assert errors["W_dec"] > 1e-6, "the products were not rounded"


def test_selection_in_bfloat16_has_the_support_of_float32() -> None:
    x, bias = random(8 * BATCH, D_IN, seed=0), 0.1 * random(D_SAE, seed=1)
    weight = random(D_SAE, D_IN, seed=2) / D_IN**0.5
    encoder = (x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE))
    pre = pre_activations(*encoder, StepMemory(), rounded=True)
    values, indices = select_top_k(pre, *encoder, 32)
    exact = x.double() @ weight.double().T + bias
    expected = exact.topk(32, dim=1).indices.sort(dim=1).values
    same = (indices.cpu().sort(dim=1).values == expected).all(dim=1)
    assert float(same.float().mean()) >= 0.999
    assert float((values.cpu() - exact.gather(1, indices.cpu())).abs().max()) < 1e-4


def test_training_with_selection_in_bfloat16_has_the_gradients_of_float32() -> None:
    on_cpu, on_device = started(ARCHITECTURES["topk"], selection="bfloat16")
    _, x = data()
    on_cpu.step_gradients(StepInput(x, x, 0, None))
    on_device.step_gradients(StepInput(x.to(DEVICE), x.to(DEVICE), 0, None))
    assert all(error < 1e-2 for error in relative_errors(on_cpu, on_device).values())
