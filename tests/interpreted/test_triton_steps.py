"""Training steps whose sparse products are Triton's, run by its interpreter, have the gradients of PyTorch's.

They need a process of their own: see `test_triton_products.py`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from sae_job.saes.architectures import build_trainable
from sae_job.saes.kernels.choice import Kernels, forced_kernels
from sae_job.saes.trainable import MseNormalization, StepInput, StepStatistics, TrainableSAE
from sae_operator.api.sae import SaeSpec
from tests.kernel_cases import random

D_IN, D_SAE, BATCH = 12, 40, 16
TOPK = {"type": "topk", "k": 4}
CASES: dict[str, tuple[dict[str, Any], MseNormalization]] = {
    "topk": ({**TOPK, "auxKCoefficient": 0}, "none"),
    "topk with revival": (TOPK, "none"),
    "topk, dense_batch": (TOPK, "dense_batch"),
    "batchtopk": ({"type": "batchtopk", "k": 4}, "none"),
    "matryoshka": ({"type": "matryoshka_batchtopk", "k": 4}, "none"),
    "jumprelu": ({"type": "jumprelu", "l0Coefficient": 1.0}, "none"),
}


def step(
    architecture: dict[str, Any], normalization: MseNormalization, kernels: Kernels
) -> tuple[TrainableSAE, StepStatistics]:
    spec = SaeSpec.model_validate({"name": "sae", "architecture": architecture, "dSae": D_SAE})
    sae = build_trainable(spec, D_IN, device="cpu", mse_loss_normalization=normalization)
    sample, x = random(200, D_IN, seed=0), random(BATCH, D_IN, seed=1)
    sae.initialize(sample, sample, torch.Generator().manual_seed(2))
    dead = torch.arange(D_SAE) % 3 == 0
    with forced_kernels(kernels):
        return sae, sae.step_gradients(StepInput(x, x, 0, dead))


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_step_has_the_gradients_of_pytorchs_operators(case: str) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "start these with TRITON_INTERPRET=1"
    found, told = step(*CASES[case], "triton")
    expected, reference = step(*CASES[case], "sparse")
    assert float(told.loss) == pytest.approx(float(reference.loss), rel=1e-5)
    assert torch.equal(told.fire_counts, reference.fire_counts)
    for name, parameter in expected.parameters_by_name.items():
        gradient = found.parameters_by_name[name].grad
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-5), name
