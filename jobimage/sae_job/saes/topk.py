"""TopK SAEs (Gao et al. 2024): the k largest pre-activations, through a ReLU.

Gradients are written out instead of traced: nothing of size batch x d_sae is kept but the pre-activations, in one
buffer that is used again, and everything after the encoder's product touches only active latents.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from sae_job.saes.auxk import AuxiliaryLoss, auxiliary_loss
from sae_job.saes.base import SAE
from sae_job.saes.config import Provenance
from sae_job.saes.kernels.sparse import ActiveLatents, top_k
from sae_job.saes.trainable import Ranks, StepInput, StepStatistics
from sae_job.saes.weights import TrainableWeights
from sae_operator.api.sae import SaeSpec


class TopKSAE(TrainableWeights):
    """A TopK SAE in training: see `TrainableSAE`."""

    def __init__(self, spec: SaeSpec, d_in: int, d_out: int, d_sae: int, *, device: torch.device, ranks: Ranks) -> None:
        assert spec.architecture.k is not None
        self.k = spec.architecture.k
        super().__init__(spec, d_in, d_out, d_sae, device=device, ranks=ranks, activation=self._dense_activation)
        self._aux_coefficient = spec.architecture.aux_k_coefficient or 0.0
        self._aux_k = spec.architecture.aux_k or max(1, d_in // 2)
        self._pre: Tensor | None = None

    def _dense_activation(self, pre: Float32[Tensor, "rows d_sae"]) -> Float32[Tensor, "rows d_sae"]:
        values, indices = top_k(pre, self.k)
        return torch.zeros_like(pre).scatter_(1, indices, values.relu_())

    def _pre_activations(self, centred: Float32[Tensor, "batch d_in"]) -> Float32[Tensor, "batch d_sae"]:
        """In a buffer that the next step overwrites: a large part of a step would go into fresh pages."""
        if self._pre is None or self._pre.shape[0] != centred.shape[0]:
            self._pre = torch.empty(centred.shape[0], self.d_sae, dtype=centred.dtype, device=centred.device)
        return torch.addmm(self.b_enc, centred, self.W_enc_T.T, out=self._pre)

    @torch.no_grad()
    def step_gradients(self, batch: StepInput) -> StepStatistics:
        x, target, dead = batch.x, batch.target, batch.dead
        rows = x.shape[0] * self.ranks.size
        centred = self.centred(x)
        pre = self._pre_activations(centred)
        values, indices = top_k(pre, self.k)
        active = ActiveLatents(indices, values.relu_(), self.d_sae)
        error = active.decode(self.W_dec).add_(self.b_dec).sub_(target)
        mse = error.square().sum() / rows

        output_gradient = error * (2 / rows)
        value_gradient = active.value_gradients(output_gradient, self.W_dec)
        value_gradient.mul_(active.values > 0)
        encoder_bias_gradient = active.sum_by_latent(value_gradient)
        encoder_gradient = active.weight_gradient(centred, value_gradient)
        decoder_gradient = active.weight_gradient(output_gradient, active.values)
        decoder_bias_gradient = output_gradient.sum(dim=0)

        losses = {"mse_loss": mse}
        loss = mse
        if self._aux_coefficient > 0 and dead is not None:
            aux = self._auxiliary(target, pre, error, centred, dead)
            loss = mse + aux.loss
            losses["auxiliary_reconstruction_loss"] = aux.loss
            encoder_bias_gradient += aux.encoder_bias_gradient
            encoder_gradient += aux.encoder_gradient
            decoder_gradient += aux.decoder_gradient
        if self.spec.subtracts_b_dec:
            # The column sums of the pre-activations' gradient times the encoder: what the input's centring sends back.
            decoder_bias_gradient -= encoder_bias_gradient @ self.W_enc_T

        self.W_enc_T.grad = encoder_gradient
        self.b_enc.grad = encoder_bias_gradient
        self.W_dec.grad = decoder_gradient
        self.b_dec.grad = decoder_bias_gradient
        return StepStatistics(loss=loss, losses=losses, fire_counts=active.fire_counts(), kernel="sparse")

    @torch.no_grad()
    def active_latents(self, x: Float32[Tensor, "batch d_in"]) -> ActiveLatents:
        values, indices = top_k(self._pre_activations(self.centred(x)), self.k)
        return ActiveLatents(indices, values.relu_(), self.d_sae)

    def _auxiliary(
        self,
        x: Float32[Tensor, "batch d_in"],
        pre: Float32[Tensor, "batch d_sae"],
        error: Float32[Tensor, "batch d_in"],
        centred: Float32[Tensor, "batch d_in"],
        dead: Bool[Tensor, " d_sae"],
    ) -> AuxiliaryLoss:
        return auxiliary_loss(
            pre=pre,
            dead=dead,
            x=x,
            residual=-error,
            centred=centred,
            W_dec=self.W_dec,
            k=self._aux_k,
            coefficient=self._aux_coefficient,
        )

    def to_inference(
        self,
        *,
        scale: float,
        target_scale: float | None = None,
        normalization: str = "none",
        provenance: Provenance | None = None,
    ) -> SAE:
        return self.export("topk", {"k": self.k}, scale=scale, normalization=normalization, provenance=provenance)
