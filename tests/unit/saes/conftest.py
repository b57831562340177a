"""What the specifications of SAEs share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_job.saes.architectures import build_trainable
from sae_job.saes.standard import StandardSAE
from sae_job.saes.topk import TopKSAE
from sae_operator.api.sae import SaeSpec

D_IN, D_SAE, BATCH = 12, 64, 24


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums differ in the last bit between thread counts."""
    torch.set_num_threads(1)


def sae_spec(architecture: dict[str, Any], **fields: Any) -> SaeSpec:
    return SaeSpec.model_validate({"name": "sae", "architecture": architecture, "dSae": D_SAE, **fields})


def trainable(architecture: dict[str, Any], *, seed: int = 0, **fields: Any) -> TopKSAE | StandardSAE:
    """An initialised SAE in training, with biases that are not zero."""
    sae = build_trainable(sae_spec(architecture, **fields), D_IN, device="cpu")
    assert isinstance(sae, TopKSAE | StandardSAE)
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(200, D_IN, generator=generator) + 0.5
    sae.initialize(sample, sample, generator)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(D_SAE, generator=generator))
    return sae


def batch(seed: int = 1, rows: int = BATCH) -> torch.Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(seed)) + 0.5


TOPK = {"type": "topk", "k": 5}
STANDARD = {"type": "standard", "l1Coefficient": 0.3}
