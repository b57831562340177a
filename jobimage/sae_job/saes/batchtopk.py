"""BatchTopK SAEs (Bussmann et al. 2024): the k x batch largest pre-activations of a whole batch, through a ReLU.

A row in use has no batch beside it. So training follows the smallest active pre-activation, and the SAE is saved as
a JumpReLU SAE with that threshold for all latents.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sae_job.saes.base import SAE
from sae_job.saes.batch_selection import among, batch_top_k
from sae_job.saes.kernels.selection import candidates_of, settled
from sae_job.saes.kernels.sparse import ActiveLatents, active_above
from sae_job.saes.sparse_step import SelectingSAE
from sae_job.saes.trainable import Ranks
from sae_job.saes.weights import SavedAs
from sae_operator.api.sae import SaeSpec

DEFAULT_THRESHOLD_MOMENTUM = 0.99


class BatchTopKSAE(SelectingSAE):
    """A BatchTopK SAE in training: see `TrainableSAE`.

    Attributes:
        threshold: moving average of the smallest active pre-activation (of the whole batch, over all ranks), a scalar;
            0 before the first batch, which sets it.
    """

    def __init__(self, spec: SaeSpec, d_in: int, d_out: int, d_sae: int, *, device: torch.device, ranks: Ranks) -> None:
        super().__init__(spec, d_in, d_out, d_sae, device=device, ranks=ranks)
        momentum = spec.architecture.threshold_momentum
        self._momentum = DEFAULT_THRESHOLD_MOMENTUM if momentum is None else momentum
        self.threshold = torch.zeros((), dtype=torch.float32, device=device)
        self._last = 0.0

    @property
    def buffers_by_name(self) -> dict[str, Tensor]:
        return {"threshold": self.threshold}

    def _dense_activation(self, pre: Float32[Tensor, "rows d_sae"]) -> Float32[Tensor, "rows d_sae"]:
        return batch_top_k(pre, self.k).active.dense()

    def _select(self, pre: Float[Tensor, "batch d_sae"], centred: Float32[Tensor, "batch d_in"]) -> ActiveLatents:
        if pre.dtype == torch.float32:
            selection = batch_top_k(pre, self.k, last=self._last, ranks=self.ranks)
        else:
            wide = batch_top_k(pre, candidates_of(self.k, self.d_sae), ranks=self.ranks).active
            exact = wide.with_values(settled(wide, centred, self.W_enc_T, self.b_enc))
            selection = among(exact, self.k, ranks=self.ranks)
        self._follow(selection.smallest)
        return selection.active

    def _follow(self, smallest: Float32[Tensor, ""]) -> None:
        """Move the threshold towards a batch's smallest active pre-activation; where nothing is active it stays."""
        moved = torch.where(self.threshold > 0, torch.lerp(smallest, self.threshold, self._momentum), smallest)
        self.threshold.copy_(torch.where(torch.isfinite(smallest), moved, self.threshold))
        if not smallest.is_cuda:  # a GPU would be waited for, and takes no guess
            last = float(smallest)
            self._last = last if math.isfinite(last) else 0.0

    @torch.no_grad()
    def active_latents(self, x: Float32[Tensor, "batch d_in"]) -> ActiveLatents:
        """Those above the running threshold, as in the saved SAE."""
        return active_above(self._pre_activations(self.centred(x)), self.threshold)

    @torch.no_grad()
    def start_from(self, sae: SAE, *, scale: float, target_scale: float) -> None:
        """As `TrainableSAE`; the threshold is the mean of the saved SAE's."""
        if getattr(sae, "threshold", None) is None:
            raise ValueError("it has no threshold: it is of another architecture")
        self.threshold.copy_(sae.threshold.to(torch.float32).mean())
        super().start_from(sae, scale=scale, target_scale=target_scale)

    def _move_norms_to_encoder(self, norms: Float32[Tensor, " d_sae"]) -> None:
        super()._move_norms_to_encoder(norms)
        self.threshold.mul_(norms.mean())

    def saved_as(self) -> SavedAs:
        return SavedAs("jumprelu", tensors={"threshold": self.threshold.expand(self.d_sae)})
