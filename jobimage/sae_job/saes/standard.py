"""Standard SAEs: ReLU latents with a penalty on the p-norm of their activations (p = 1: Bricken et al. 2023).

With `scaleSparsityPenaltyByDecoderNorm` each activation is weighted by its decoder row's norm (Conerly et al. 2024).
Gradients are written
out: five dense products, where tracing takes a sixth for the gradient of the centred input.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_job.saes.base import SAE
from sae_job.saes.config import Provenance
from sae_job.saes.kernels.sparse import ActiveLatents
from sae_job.saes.trainable import Ranks, StepInput, StepStatistics
from sae_job.saes.weights import TrainableWeights
from sae_operator.api.sae import SaeSpec

_SMALLEST_NORM = 1e-12


class StandardSAE(TrainableWeights):
    """A standard SAE in training: see `TrainableSAE`."""

    def __init__(self, spec: SaeSpec, d_in: int, d_out: int, d_sae: int, *, device: torch.device, ranks: Ranks) -> None:
        super().__init__(spec, d_in, d_out, d_sae, device=device, ranks=ranks, activation=torch.relu)
        architecture = spec.architecture
        assert architecture.l1_coefficient is not None
        self._coefficient = architecture.l1_coefficient
        self._warm_up_steps = architecture.l1_warm_up_steps or 0
        self._p = 1.0 if architecture.lp_norm is None else architecture.lp_norm
        self._weighted = bool(architecture.scale_sparsity_penalty_by_decoder_norm)

    def coefficient(self, step: int) -> float:
        """The penalty's weight in a step: rises linearly from 0 over the warm-up."""
        if self._warm_up_steps == 0:
            return self._coefficient
        return self._coefficient * min(step / self._warm_up_steps, 1.0)

    @torch.no_grad()
    def step_gradients(self, batch: StepInput) -> StepStatistics:
        rows = batch.x.shape[0] * self.ranks.size
        centred = self.centred(batch.x)
        features = torch.addmm(self.b_enc, centred, self.W_enc_T.T).relu_()
        error = torch.addmm(self.b_dec, features, self.W_dec).sub_(batch.target)
        mse = error.square().sum() / rows
        coefficient = self.coefficient(batch.step)

        output_gradient = error * (2 / rows)
        feature_gradient = output_gradient @ self.W_dec.T
        decoder_gradient = features.T @ output_gradient
        sparsity = self._penalize(features, coefficient, rows, feature_gradient, decoder_gradient)
        pre_gradient = feature_gradient.mul_(features > 0)
        bias_gradient = pre_gradient.sum(dim=0)
        decoder_bias_gradient = output_gradient.sum(dim=0)
        if self.spec.subtracts_b_dec:
            decoder_bias_gradient -= bias_gradient @ self.W_enc_T

        self.W_enc_T.grad = pre_gradient.T @ centred
        self.b_enc.grad = bias_gradient
        self.W_dec.grad = decoder_gradient
        self.b_dec.grad = decoder_bias_gradient
        counts = (features > 0).sum(dim=0)
        return StepStatistics(
            loss=mse + sparsity,
            losses={"mse_loss": mse, "l1_loss": sparsity},
            fire_counts=counts,
            coefficient=coefficient,
        )

    @torch.no_grad()
    def active_latents(self, x: Float32[Tensor, "batch d_in"]) -> ActiveLatents:
        features = torch.addmm(self.b_enc, self.centred(x), self.W_enc_T.T).relu_()
        most = max(1, int((features > 0).sum(dim=1).max()))
        values, indices = features.topk(most, dim=1, sorted=False)
        return ActiveLatents(indices, values, self.d_sae)

    def _penalize(
        self,
        features: Float32[Tensor, "batch d_sae"],
        coefficient: float,
        rows: int,
        feature_gradient: Float32[Tensor, "batch d_sae"],
        decoder_gradient: Float32[Tensor, "d_sae d_in"],
    ) -> Float32[Tensor, ""]:
        """The sparsity loss; its gradients are added to the two given ones."""
        if self._p == 1 and not self._weighted:
            feature_gradient += coefficient / rows  # masked by the ReLU afterwards
            return coefficient * features.sum() / rows
        norms = torch.linalg.vector_norm(self.W_dec, dim=1) if self._weighted else None
        weighted = features if norms is None else features * norms
        row_norms = torch.linalg.vector_norm(weighted, ord=self._p, dim=1, keepdim=True)
        # d||a||_p / da = (a / ||a||_p)^(p - 1) for a >= 0; zero where nothing is active.
        gradient = (weighted / row_norms.clamp_min(_SMALLEST_NORM)).pow_(self._p - 1)
        gradient.masked_fill_(weighted <= 0, 0.0).mul_(coefficient / rows)
        if norms is None:
            feature_gradient += gradient
        else:
            feature_gradient.addcmul_(gradient, norms)
            by_norm = (gradient * features).sum(dim=0) / norms.clamp_min(_SMALLEST_NORM)
            decoder_gradient.addcmul_(self.W_dec, by_norm.unsqueeze(1))
        return coefficient * row_norms.sum() / rows

    def to_inference(
        self,
        *,
        scale: float,
        target_scale: float | None = None,
        normalization: str = "none",
        provenance: Provenance | None = None,
    ) -> SAE:
        return self.export("relu", {}, scale=scale, normalization=normalization, provenance=provenance)
