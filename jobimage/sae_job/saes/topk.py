"""TopK SAEs (Gao et al. 2024): the k largest pre-activations of each row, through a ReLU."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sae_job.saes.kernels.selection import select_top_k
from sae_job.saes.kernels.sparse import ActiveLatents, top_k
from sae_job.saes.sparse_step import SelectingSAE
from sae_job.saes.weights import SavedAs


class TopKSAE(SelectingSAE):
    """A TopK SAE in training: see `TrainableSAE`."""

    def _dense_activation(self, pre: Float32[Tensor, "rows d_sae"]) -> Float32[Tensor, "rows d_sae"]:
        values, indices = top_k(pre, self.k)
        return torch.zeros_like(pre).scatter_(1, indices, values.relu_())

    def _select(self, pre: Float[Tensor, "batch d_sae"], centred: Float32[Tensor, "batch d_in"]) -> ActiveLatents:
        values, indices = select_top_k(pre, centred, self.W_enc_T, self.b_enc, self.k)
        return ActiveLatents(indices, values.relu_(), self.d_sae)

    @torch.no_grad()
    def active_latents(self, x: Float32[Tensor, "batch d_in"]) -> ActiveLatents:
        centred = self.centred(x)
        return self._select(self._pre_activations(centred), centred)

    def saved_as(self) -> SavedAs:
        return SavedAs("topk", "topk", {"k": self.k})
