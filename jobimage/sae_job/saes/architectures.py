"""The table of architectures. Adding one is one file and one row here (and its `type` in the resource's model)."""

from __future__ import annotations

from typing import Protocol

import torch

from sae_job.saes.standard import StandardSAE
from sae_job.saes.topk import TopKSAE
from sae_job.saes.trainable import TrainableSAE
from sae_operator.api.training_job import SaeSpec


class _Build(Protocol):
    def __call__(self, spec: SaeSpec, d_in: int, d_sae: int, device: torch.device) -> TrainableSAE: ...


TRAINABLE: dict[str, _Build] = {
    "topk": TopKSAE,
    "standard": StandardSAE,
}

DEFAULT_EXPANSION_FACTOR = 8


def build_trainable(spec: SaeSpec, d_in: int, *, device: torch.device | str) -> TrainableSAE:
    """The trainable SAE of a spec, with weights that are not yet initialised."""
    d_sae = spec.d_sae if spec.d_sae is not None else d_in * (spec.expansion_factor or DEFAULT_EXPANSION_FACTOR)
    return TRAINABLE[spec.architecture.type](spec, d_in, d_sae, torch.device(device))
