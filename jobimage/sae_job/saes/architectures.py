"""The table of architectures. Adding one is one file and one row here (and its `type` in the resource's model)."""

from __future__ import annotations

from typing import Protocol

import torch

from sae_job.saes.batchtopk import BatchTopKSAE
from sae_job.saes.gated import GatedSAE
from sae_job.saes.jumprelu import JumpReLUSAE
from sae_job.saes.matryoshka import MatryoshkaBatchTopKSAE
from sae_job.saes.sparse_step import SelectingSAE, Selection
from sae_job.saes.standard import StandardSAE
from sae_job.saes.step_memory import StepMemory
from sae_job.saes.topk import TopKSAE
from sae_job.saes.trainable import ONE_PROCESS, MseNormalization, Ranks, TrainableSAE
from sae_operator.api.sae import SaeSpec


class _Build(Protocol):
    def __call__(
        self, spec: SaeSpec, d_in: int, d_out: int, d_sae: int, *, device: torch.device, ranks: Ranks
    ) -> TrainableSAE: ...


TRAINABLE: dict[str, _Build] = {
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "matryoshka_batchtopk": MatryoshkaBatchTopKSAE,
    "standard": StandardSAE,
    "gated": GatedSAE,
    "jumprelu": JumpReLUSAE,
}


def build_trainable(
    spec: SaeSpec,
    d_in: int,
    d_out: int | None = None,
    *,
    device: torch.device | str,
    ranks: Ranks = ONE_PROCESS,
    mse_loss_normalization: MseNormalization = "none",
    selection: Selection = "exact",
    memory: StepMemory | None = None,
) -> TrainableSAE:
    """The trainable SAE of a spec, with weights that are not yet initialised.

    Args:
        d_in: width of the activations.
        d_out: width of a transcoder's target; `d_in` when None.
        ranks: the processes that train together.
        mse_loss_normalization: the job's.
        selection: the job's; of no meaning to architectures that select nothing.
        memory: what SAEs that step one after another share; its own when None.
    """
    build = TRAINABLE[spec.architecture.type]
    d_out = d_in if d_out is None else d_out
    sae = build(spec, d_in, d_out, spec.latents(d_in), device=torch.device(device), ranks=ranks)
    sae.mse_loss_normalization = mse_loss_normalization
    if memory is not None:
        sae.memory = memory
    if isinstance(sae, SelectingSAE):
        sae.selection = selection
    return sae
