"""Gated SAEs (Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders").

Which latents fire and how strongly are decided apart, by two encoders that share their directions (eq. 6 to 8):

    s = centred(x) W_enc       u = relu(s + b_gate)       f = 1[u > 0] relu(s exp(r_mag) + b_mag)
    loss = |f W_dec + b_dec - target|^2 + coefficient sum_j u_j |W_dec_j| + |u sg(W_dec) + sg(b_dec) - target|^2

The step function gives the gate no gradient from the first term; it learns from the last two, of which the auxiliary
reconstruction takes the decoder for a constant (sg). Both encoders' outputs come from one product, and both gradients
go back through one: seven dense products in all, and one once latents are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sae_job.saes.kernels.choice import kernel_name
from sae_job.saes.kernels.sparse import ActiveLatents
from sae_job.saes.norm_penalty import NormPenalty
from sae_job.saes.penalized import PenalizedSAE, Step, cleared_gradient, warmed_up
from sae_job.saes.reconstruction import reconstruction_loss
from sae_job.saes.trainable import Ranks, StepInput, StepStatistics
from sae_operator.api.sae import SaeSpec


@dataclass(frozen=True)
class _Outcome:
    """What either way of doing a step gives besides the gradients of W_enc_T, W_dec, b_dec and W_skip."""

    mse: Float32[Tensor, ""]
    auxiliary: Float32[Tensor, ""]
    counts: Int64[Tensor, " d_sae"]
    open_gates: Int64[Tensor, " d_sae"]
    gate_bias: Float32[Tensor, " d_sae"]
    magnitude_bias: Float32[Tensor, " d_sae"]
    # Sum over rows of the magnitudes' gradient times s.
    magnitude_scale: Float32[Tensor, " d_sae"]


class GatedSAE(PenalizedSAE):
    """A gated SAE in training: see `TrainableSAE`."""

    latent_parameters: ClassVar[tuple[str, ...]] = ("b_gate", "r_mag", "b_mag")
    b_gate: Tensor
    r_mag: Tensor
    b_mag: Tensor

    def __init__(self, spec: SaeSpec, d_in: int, d_out: int, d_sae: int, *, device: torch.device, ranks: Ranks) -> None:
        super().__init__(spec, d_in, d_out, d_sae, device=device, ranks=ranks, activation=torch.relu)
        architecture = spec.architecture
        assert architecture.l1_coefficient is not None
        self._coefficient = partial(warmed_up, architecture.l1_coefficient, warm_up_steps=architecture.l1_warm_up_steps)

    @torch.no_grad()
    def step_gradients(self, batch: StepInput) -> StepStatistics:
        step = self.begin(batch)
        coefficient = self._coefficient(step=batch.step)
        penalty = NormPenalty(
            p=1, weight=coefficient / step.rows, norms=self.decoder_norms(), d_sae=self.d_sae, device=self.W_dec.device
        )
        sparse = self.regime.is_sparse
        outcome = self._sparse_step(step, penalty) if sparse else self._dense_step(step, penalty)
        self.b_gate.grad = outcome.gate_bias
        self.b_mag.grad = outcome.magnitude_bias
        self.r_mag.grad = outcome.magnitude_scale * torch.exp(self.r_mag)
        assert self.W_dec.grad is not None
        losses = {
            "mse_loss": outcome.mse,
            "l1_loss": penalty.finish(self.W_dec, self.W_dec.grad),
            "auxiliary_reconstruction_loss": outcome.auxiliary,
        }
        self.regime.note(batch.step, outcome.open_gates, step.rows)
        return StepStatistics(
            loss=sum(losses.values(), start=torch.zeros_like(outcome.mse)),
            losses=losses,
            fire_counts=outcome.counts,
            coefficient=coefficient,
            kernel=kernel_name(batch.x.device) if sparse else "dense",
        )

    def _dense_step(self, step: Step, penalty: NormPenalty) -> _Outcome:
        x, target = step.batch.x, step.batch.target
        encoder_gradient, decoder_gradient = cleared_gradient(self.W_enc_T), cleared_gradient(self.W_dec)
        stretch = torch.exp(self.r_mag)
        counts, open_gates, gate_bias, magnitude_bias, magnitude_scale = (
            torch.zeros_like(self.b_gate) for _ in range(5)
        )
        mse, auxiliary = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        centred = self.encoder_input(x)
        output_gradient = self.scratch("output_gradient", x.shape[0], self.d_out)
        for part in self.blocks(x.shape[0]):
            pre = self.encode_block(centred[part], None, step)
            rows = pre.shape[0]
            gates = torch.add(pre, self.b_gate, out=self.scratch("gates", rows)).relu_()
            mask = torch.gt(gates, 0, out=self.scratch("mask", rows))
            open_gates += mask.sum(dim=0)
            features = torch.addcmul(self.b_mag, pre, stretch, out=self.scratch("features", rows)).relu_().mul_(mask)
            error = self._error(features, x[part], target[part], out=output_gradient[part])
            by_gates = self._error(gates, x[part], target[part], out=self.scratch("by_gates", rows, self.d_out))
            loss, slope = reconstruction_loss(error, step.weights_of(part), ranks=self.ranks, rows=step.rows, out=error)
            mse += loss
            loss, gate_slope = reconstruction_loss(by_gates, None, ranks=self.ranks, rows=step.rows, out=by_gates)
            auxiliary += loss
            decoder_gradient.addmm_(features.T, slope)
            torch.gt(features, 0, out=mask)
            counts += mask.sum(dim=0)
            magnitude_gradient = torch.mm(slope, self.W_dec.T, out=features).mul_(mask)
            magnitude_bias += magnitude_gradient.sum(dim=0)
            magnitude_scale += torch.mul(magnitude_gradient, pre, out=mask).sum(dim=0)
            gate_gradient = torch.addmm(penalty.constant_slopes, gate_slope, self.W_dec.T, out=pre)
            penalty.add_block(gates, gate_gradient)
            gate_gradient.mul_(torch.gt(gates, 0, out=mask))
            gate_bias += gate_gradient.sum(dim=0)
            gradient = gate_gradient.addcmul_(magnitude_gradient, stretch)
            encoder_gradient.addmm_(gradient.T, centred[part])
        self.set_bias_and_skip_gradients(output_gradient, x, gate_bias + magnitude_bias * stretch)
        return _Outcome(
            mse,
            auxiliary,
            counts.to(torch.int64),
            open_gates.to(torch.int64),
            gate_bias,
            magnitude_bias,
            magnitude_scale,
        )

    def _sparse_step(self, step: Step, penalty: NormPenalty) -> _Outcome:
        """The same, after the encoder's product touching only latents with open gates."""
        x, target = step.batch.x, step.batch.target
        centred = self.encoder_input(x)
        opened, _ = self.encode_sparsely(centred, None, -self.b_gate, step)
        pre, latents = opened.values, opened.latents
        gates = opened.with_values(pre + self.b_gate[latents])
        active = opened.with_values(self._magnitudes(opened))
        error = self.add_bias_and_skip_(active.decode(self.W_dec), x).sub_(target)
        by_gates = self.add_bias_and_skip_(gates.decode(self.W_dec), x).sub_(target)
        mse, slope = reconstruction_loss(error, step.weights, ranks=self.ranks, out=error)
        auxiliary, gate_slope = reconstruction_loss(by_gates, None, ranks=self.ranks, out=by_gates)
        magnitude_gradient = active.value_gradients(slope, self.W_dec).mul_(active.values > 0)
        gate_gradient = gates.value_gradients(gate_slope, self.W_dec)
        penalty.add_active(gates, gate_gradient)
        gate_bias, magnitude_bias = opened.sum_by_latent(gate_gradient), opened.sum_by_latent(magnitude_gradient)
        magnitude_scale = opened.sum_by_latent(magnitude_gradient * pre)
        stretch = torch.exp(self.r_mag)
        self.W_enc_T.grad = opened.weight_gradient(centred, gate_gradient + magnitude_gradient * stretch[latents])
        self.W_dec.grad = active.weight_gradient(slope, active.values)
        self.set_bias_and_skip_gradients(slope, x, gate_bias + magnitude_bias * stretch)
        open_gates = torch.bincount(latents, minlength=self.d_sae)
        return _Outcome(mse, auxiliary, active.fire_counts(), open_gates, gate_bias, magnitude_bias, magnitude_scale)

    def _error(
        self,
        features: Float32[Tensor, "block d_sae"],
        x: Float32[Tensor, "block d_in"],
        target: Float32[Tensor, "block d_out"],
        *,
        out: Float32[Tensor, "block d_out"],
    ) -> Float32[Tensor, "block d_out"]:
        return self.add_bias_and_skip_(torch.mm(features, self.W_dec, out=out), x).sub_(target)

    def _magnitudes(self, opened: ActiveLatents) -> Float32[Tensor, " n"]:
        """Activations of latents with open gates, from their s."""
        latents = opened.latents
        return torch.addcmul(self.b_mag[latents], opened.values, torch.exp(self.r_mag)[latents]).relu_()

    @torch.no_grad()
    def active_latents(self, x: Float32[Tensor, "batch d_in"]) -> ActiveLatents:
        opened, _ = self.encode_sparsely(self.encoder_input(x), None, -self.b_gate)
        return opened.with_values(self._magnitudes(opened))
