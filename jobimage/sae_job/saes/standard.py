"""Standard SAEs: ReLU latents with a penalty on the p-norm of their activations (p = 1: Bricken et al. 2023).

Gradients are written out: five dense products, where tracing takes a sixth for the gradient of the centred input, and
once latents are few, one dense product and the rest between active latents alone.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_job.saes.ghost import ghost_gradients
from sae_job.saes.kernels.choice import kernel_name
from sae_job.saes.kernels.sparse import ActiveLatents
from sae_job.saes.norm_penalty import NormPenalty
from sae_job.saes.penalized import PenalizedSAE, Step, cleared_gradient, warmed_up
from sae_job.saes.reconstruction import reconstruction_loss
from sae_job.saes.trainable import Ranks, StepInput, StepStatistics
from sae_job.saes.weights import SavedAs
from sae_operator.api.sae import SaeSpec


class StandardSAE(PenalizedSAE):
    """A standard SAE in training: see `TrainableSAE`."""

    def __init__(self, spec: SaeSpec, d_in: int, d_out: int, d_sae: int, *, device: torch.device, ranks: Ranks) -> None:
        self._tanh = spec.architecture.activation == "tanh-relu"
        super().__init__(
            spec,
            d_in,
            d_out,
            d_sae,
            device=device,
            ranks=ranks,
            activation=(lambda pre: torch.relu(pre).tanh_()) if self._tanh else torch.relu,
        )
        architecture = spec.architecture
        assert architecture.l1_coefficient is not None
        self._coefficient = partial(warmed_up, architecture.l1_coefficient, warm_up_steps=architecture.l1_warm_up_steps)
        self._p = 1.0 if architecture.lp_norm is None else architecture.lp_norm
        self._weighted = spec.weights_penalty_by_decoder_norm
        self._ghost = bool(architecture.ghost_gradients)

    def _move_norms_to_encoder(self, norms: Float32[Tensor, " d_sae"]) -> None:
        """As in `TrainableWeights`; not of latents that pass tanh: n tanh(x) is not tanh(n x)."""
        if self._tanh:
            raise ValueError(
                "norms of its decoder rows are not 1 on this job's scale, and cannot go into an encoder whose latents "
                "pass tanh: set normalizeDecoder: false"
            )
        super()._move_norms_to_encoder(norms)

    @torch.no_grad()
    def step_gradients(self, batch: StepInput) -> StepStatistics:
        step = self.begin(batch, revives=self._ghost)
        coefficient = self._coefficient(step=batch.step)
        penalty = NormPenalty(
            p=self._p,
            weight=coefficient / step.rows,
            norms=self.decoder_norms() if self._weighted else None,
            d_sae=self.d_sae,
            device=self.W_dec.device,
        )
        sparse = self.regime.is_sparse
        mse, ghost, counts = self._sparse_step(step, penalty) if sparse else self._dense_step(step, penalty)
        assert self.W_dec.grad is not None
        losses = {"mse_loss": mse, "l1_loss": penalty.finish(self.W_dec, self.W_dec.grad)}
        if self._ghost:
            losses["ghost_grad_loss"] = ghost
        self.regime.note(batch.step, counts, step.rows)
        return StepStatistics(
            loss=sum(losses.values(), start=torch.zeros_like(mse)),
            losses=losses,
            fire_counts=counts,
            coefficient=coefficient,
            kernel=kernel_name(batch.x.device) if sparse else "dense",
        )

    def _dense_step(self, step: Step, penalty: NormPenalty) -> tuple[Tensor, Tensor, Tensor]:
        """Fill gradients; gives the reconstruction loss, the ghost loss and the fire counts."""
        x, target = step.batch.x, step.batch.target
        encoder_gradient, decoder_gradient = cleared_gradient(self.W_enc_T), cleared_gradient(self.W_dec)
        bias_gradient = torch.zeros_like(self.b_enc)
        counts = torch.zeros_like(self.b_enc)
        mse = torch.zeros((), device=x.device)
        ghost = ghost_gradients(step, self.W_dec, self.d_in)
        centred = self.encoder_input(x)
        output_gradient = self.scratch("output_gradient", x.shape[0], self.d_out)
        for part in self.blocks(x.shape[0]):
            features = self.encode_block(centred[part], self.b_enc, step)
            pre_of_dead = None if step.dead is None else features.index_select(1, step.dead)
            self._activate_(features)
            error = torch.mm(features, self.W_dec, out=output_gradient[part])
            self.add_bias_and_skip_(error, x[part]).sub_(target[part])
            if ghost is not None and pre_of_dead is not None:
                ghost.add(pre_of_dead, centred[part], error, step.weights_of(part))
            loss, slope = reconstruction_loss(error, step.weights_of(part), ranks=self.ranks, rows=step.rows, out=error)
            mse += loss
            decoder_gradient.addmm_(features.T, slope)
            gradient = self.scratch("gradient", features.shape[0])
            torch.addmm(penalty.constant_slopes, slope, self.W_dec.T, out=gradient)
            penalty.add_block(features, gradient)
            active = torch.gt(features, 0, out=self.scratch("active", features.shape[0]))
            counts += active.sum(dim=0)
            gradient.mul_(active)
            if self._tanh:
                gradient.addcmul_(gradient, features.square_(), value=-1)
            bias_gradient += gradient.sum(dim=0)
            encoder_gradient.addmm_(gradient.T, centred[part])
        if ghost is not None:
            ghost.add_to(encoder_gradient, bias_gradient, decoder_gradient)
        self.b_enc.grad = bias_gradient
        self.set_bias_and_skip_gradients(output_gradient, x, bias_gradient)
        return mse, torch.zeros_like(mse) if ghost is None else ghost.loss, counts.to(torch.int64)

    def _sparse_step(self, step: Step, penalty: NormPenalty) -> tuple[Tensor, Tensor, Tensor]:
        """The same, after the encoder's product touching only active latents."""
        x, target = step.batch.x, step.batch.target
        centred = self.encoder_input(x)
        active, pre_of_dead = self.encode_sparsely(centred, self.b_enc, 0.0, step)
        if self._tanh:
            active = active.with_values(active.values.tanh())
        error = self.add_bias_and_skip_(active.decode(self.W_dec), x).sub_(target)
        ghost = ghost_gradients(step, self.W_dec, self.d_in)
        if ghost is not None and pre_of_dead is not None:
            for part in self.blocks(x.shape[0]):
                ghost.add(pre_of_dead[part], centred[part], error[part], step.weights_of(part))
        mse, slope = reconstruction_loss(error, step.weights, ranks=self.ranks, out=error)
        gradient = active.value_gradients(slope, self.W_dec)
        penalty.add_active(active, gradient)
        if self._tanh:
            gradient.addcmul_(gradient, active.values.square(), value=-1)
        bias_gradient = active.sum_by_latent(gradient)
        encoder_gradient = active.weight_gradient(centred, gradient)
        decoder_gradient = active.weight_gradient(slope, active.values)
        if ghost is not None:
            ghost.add_to(encoder_gradient, bias_gradient, decoder_gradient)
        self.W_enc_T.grad, self.W_dec.grad, self.b_enc.grad = encoder_gradient, decoder_gradient, bias_gradient
        self.set_bias_and_skip_gradients(slope, x, bias_gradient)
        return mse, torch.zeros_like(mse) if ghost is None else ghost.loss, active.fire_counts()

    def _activate_(self, pre: Float32[Tensor, "block d_sae"]) -> Float32[Tensor, "block d_sae"]:
        pre.relu_()
        return pre.tanh_() if self._tanh else pre

    @torch.no_grad()
    def active_latents(self, x: Float32[Tensor, "batch d_in"]) -> ActiveLatents:
        active, _ = self.encode_sparsely(self.encoder_input(x), self.b_enc, 0.0)
        return active.with_values(active.values.tanh()) if self._tanh else active

    def saved_as(self) -> SavedAs:
        return SavedAs("standard", "tanh-relu" if self._tanh else "relu")
