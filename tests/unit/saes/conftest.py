"""What the specifications of SAEs share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_job.saes.architectures import build_trainable
from sae_job.saes.trainable import ONE_PROCESS, MseNormalization, Ranks
from sae_job.saes.weights import TrainableWeights
from sae_operator.api.sae import SaeSpec

D_IN, D_OUT, D_SAE, BATCH = 12, 9, 64, 24


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums differ in the last bit between thread counts."""
    torch.set_num_threads(1)


def sae_spec(architecture: dict[str, Any], **fields: Any) -> SaeSpec:
    return SaeSpec.model_validate({"name": "sae", "architecture": architecture, "dSae": D_SAE, **fields})


def trainable(
    architecture: dict[str, Any],
    *,
    seed: int = 0,
    ranks: Ranks = ONE_PROCESS,
    mse_loss_normalization: MseNormalization = "none",
    **fields: Any,
) -> TrainableWeights:
    """An initialised SAE of any architecture in training, with encoder biases (and a skip connection) not zero.

    With `targetHook` it is a transcoder from D_IN to D_OUT.
    """
    spec = sae_spec(architecture, **fields)
    d_out = D_IN if spec.target_hook is None else D_OUT
    sae = build_trainable(spec, D_IN, d_out, device="cpu", ranks=ranks, mse_loss_normalization=mse_loss_normalization)
    assert isinstance(sae, TrainableWeights)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(200, D_IN, generator=generator) + 0.5
    target = sample if spec.target_hook is None else transcoded(sample)
    sae.initialize(sample, target, generator)
    with torch.no_grad():
        for name in set(sae.latent_parameters) - {"threshold"}:
            getattr(sae, name).add_(0.1 * torch.randn(sae.d_sae, generator=generator))
        if sae.W_skip is not None:
            sae.W_skip.copy_(0.1 * torch.randn(D_OUT, D_IN, generator=generator))
    return sae


def batch(seed: int = 1, rows: int = BATCH) -> torch.Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(seed)) + 0.5


def transcoded(x: torch.Tensor) -> torch.Tensor:
    """Rows of D_OUT that depend on rows of D_IN: what a transcoder is to learn."""
    weights = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(7)) / D_IN**0.5
    return (x @ weights.T).relu() - 0.3


TOPK = {"type": "topk", "k": 5}
BATCHTOPK = {"type": "batchtopk", "k": 5}
MATRYOSHKA = {"type": "matryoshka_batchtopk", "k": 5, "widths": [8, 24, 64]}
STANDARD = {"type": "standard", "l1Coefficient": 0.3}
