"""JumpReLU SAEs (Rajamanoharan et al. 2024, "Jumping Ahead"): a threshold of its own for each latent.

    f = pre 1[pre > theta]       loss = |f W_dec + b_dec - target|^2 + penalty

A step has no gradient, so thresholds get that of a straight-through estimator (eq. 11 and 12): with the window
rect(u) = 1[-1/2 < u < 1/2] and its width, the bandwidth, a gradient g of f moves theta by -(theta / bandwidth)
rect((pre - theta) / bandwidth) g, and one of 1[pre > theta] by the same without the factor theta. Pre-activations get
the gradient of f where they are above theta. The penalty, by `sparsityPenalty`, with L0 the number of active latents:

    step        coefficient mean(L0)
    tanh        coefficient mean(sum_j tanh(scale f_j |W_dec_j|))          (Conerly et al. 2025)
    target_l0   coefficient (mean(L0) / target - 1)^2                      mean over the batch of all ranks

The threshold itself is the parameter, in float32. Its logarithm would move by a step's fraction of a small threshold,
which does not get anywhere in a training: at 0.01 and a learning rate of 1e-3, 700 steps to double it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sae_job.saes.base import SAE
from sae_job.saes.kernels.choice import kernel_name
from sae_job.saes.kernels.sparse import ActiveLatents
from sae_job.saes.penalized import PenalizedSAE, Step, cleared_gradient, warmed_up
from sae_job.saes.pre_activation_loss import PreActivationLoss
from sae_job.saes.reconstruction import reconstruction_loss
from sae_job.saes.trainable import Ranks, StepInput, StepStatistics
from sae_operator.api.sae import SaeSpec

DEFAULT_BANDWIDTH = 0.05
DEFAULT_THRESHOLD = 0.01
DEFAULT_TANH_SCALE = 4.0
_SMALLEST_NORM = 1e-12


@dataclass
class _Sums:
    """What a step gathers by latent, over this rank's rows.

    Attributes:
        counts: rows on which it is active.
        windowed: rows on which its pre-activation is within the window around its threshold.
        jump: sum of the activation's gradient over those rows.
        bias: sum of the pre-activation's gradient.
        by_norm: gradient of its decoder row's norm.
        mse, tanh: the reconstruction loss, and the tanh penalty; not by latent.
        output_gradient: gradient of the reconstruction.
    """

    counts: Int64[Tensor, " d_sae"]
    windowed: Int64[Tensor, " d_sae"]
    jump: Float32[Tensor, " d_sae"]
    bias: Float32[Tensor, " d_sae"]
    by_norm: Float32[Tensor, " d_sae"]
    mse: Float32[Tensor, ""]
    tanh: Float32[Tensor, ""]
    output_gradient: Float32[Tensor, "batch d_out"]


class JumpReLUSAE(PenalizedSAE):
    """A JumpReLU SAE in training: see `TrainableSAE`."""

    latent_parameters: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    threshold: Tensor

    def __init__(self, spec: SaeSpec, d_in: int, d_out: int, d_sae: int, *, device: torch.device, ranks: Ranks) -> None:
        architecture = spec.architecture
        assert architecture.l0_coefficient is not None
        start = DEFAULT_THRESHOLD if architecture.initial_threshold is None else architecture.initial_threshold
        self._initial_threshold = start
        self._bandwidth = DEFAULT_BANDWIDTH if architecture.bandwidth is None else architecture.bandwidth
        self._penalty = architecture.sparsity_penalty or "step"
        self._target_l0 = architecture.target_l0
        self._tanh_scale = DEFAULT_TANH_SCALE if architecture.tanh_scale is None else architecture.tanh_scale
        self._pre_activation_coefficient = architecture.pre_activation_coefficient or 0.0
        self._coefficient = partial(warmed_up, architecture.l0_coefficient, warm_up_steps=architecture.l0_warm_up_steps)
        super().__init__(
            spec,
            d_in,
            d_out,
            d_sae,
            device=device,
            ranks=ranks,
            activation=lambda pre: pre * (pre > start),
        )

    @torch.no_grad()
    def initialize(
        self,
        sample: Float32[Tensor, "rows d_in"],
        target: Float32[Tensor, "rows d_out"],
        generator: torch.Generator,
    ) -> None:
        super().initialize(sample, target, generator)
        self.threshold.fill_(self._initial_threshold)

    @torch.no_grad()
    def start_from(self, sae: SAE, *, scale: float, target_scale: float) -> None:
        """As `TrainableSAE`; thresholds below zero, which do nothing in an SAE for use, are set to zero."""
        super().start_from(sae, scale=scale, target_scale=target_scale)
        self.threshold.clamp_(min=0.0)

    @torch.no_grad()
    def step_gradients(self, batch: StepInput) -> StepStatistics:
        revives = self._pre_activation_coefficient > 0
        step = self.begin(batch, revives=revives)
        coefficient = self._coefficient(step=batch.step)
        norms = self.decoder_norms()
        revival = None
        if step.dead is not None:
            weight = self._pre_activation_coefficient / step.rows
            revival = PreActivationLoss(step.dead, self.threshold, norms, self.d_in, weight)
        sparse = self.regime.is_sparse
        sums = (self._sparse_step if sparse else self._dense_step)(step, coefficient, norms, revival)
        l0_loss, slope = self._l0_loss(sums, coefficient, step.rows)
        threshold_gradient = (self.threshold * sums.jump + sums.windowed * slope).div_(-self._bandwidth)
        encoder_gradient, decoder_gradient = self.W_enc_T.grad, self.W_dec.grad
        assert encoder_gradient is not None
        assert decoder_gradient is not None
        if self._penalty == "tanh":
            decoder_gradient.addcmul_(self.W_dec, (sums.by_norm / norms.clamp_min(_SMALLEST_NORM)).unsqueeze(1))
        losses = {"mse_loss": sums.mse, "l0_loss": l0_loss}
        if revival is not None:
            revival.add_to(encoder_gradient, sums.bias, threshold_gradient, decoder_gradient, self.W_dec)
        if revives:
            losses["pre_act_loss"] = torch.zeros_like(l0_loss) if revival is None else revival.loss
        self.b_enc.grad = sums.bias
        self.threshold.grad = threshold_gradient
        self.set_bias_and_skip_gradients(sums.output_gradient, batch.x, sums.bias)
        self.regime.note(batch.step, sums.counts + sums.windowed, step.rows)
        return StepStatistics(
            loss=sum(losses.values(), start=torch.zeros_like(l0_loss)),
            losses=losses,
            fire_counts=sums.counts,
            coefficient=coefficient,
            kernel=kernel_name(batch.x.device) if sparse else "dense",
        )

    def _l0_loss(
        self, sums: _Sums, coefficient: float, rows: int
    ) -> tuple[Float32[Tensor, ""], float | Float32[Tensor, ""]]:
        """This rank's part of the penalty, and the penalty's slope in one entry's step function."""
        if self._target_l0 is None:
            if self._penalty == "tanh":
                return sums.tanh, 0.0
            return sums.counts.sum() * (coefficient / rows), coefficient / rows
        l0 = self.ranks.sum_(sums.counts.sum().to(torch.float32)) / rows
        excess = l0 / self._target_l0 - 1
        return excess.square() * (coefficient / self.ranks.size), excess * (2 * coefficient / self._target_l0 / rows)

    def _dense_step(
        self, step: Step, coefficient: float, norms: Float32[Tensor, " d_sae"], revival: PreActivationLoss | None
    ) -> _Sums:
        x, target = step.batch.x, step.batch.target
        encoder_gradient, decoder_gradient = cleared_gradient(self.W_enc_T), cleared_gradient(self.W_dec)
        counts, windowed, jump, bias, by_norm = (torch.zeros_like(self.b_enc) for _ in range(5))
        mse, tanh = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        centred = self.encoder_input(x)
        output_gradient = self.scratch("output_gradient", x.shape[0], self.d_out)
        for part in self.blocks(x.shape[0]):
            pre = self.encode_block(centred[part], self.b_enc, step)
            if revival is not None and step.dead is not None:
                revival.add(pre.index_select(1, step.dead), centred[part])
            active = torch.gt(pre, self.threshold, out=self.scratch("active", pre.shape[0]))
            counts += active.sum(dim=0)
            features = torch.mul(pre, active, out=self.scratch("features", pre.shape[0]))
            error = torch.mm(features, self.W_dec, out=output_gradient[part])
            self.add_bias_and_skip_(error, x[part]).sub_(target[part])
            loss, slope = reconstruction_loss(error, step.weights_of(part), ranks=self.ranks, rows=step.rows, out=error)
            mse += loss
            decoder_gradient.addmm_(features.T, slope)
            gradient = torch.mm(slope, self.W_dec.T, out=self.scratch("gradient", pre.shape[0]))
            if self._penalty == "tanh":
                steps, slopes = self._tanh(features, norms)
                tanh += steps.sum() * (coefficient / step.rows)
                gradient.addcmul_(slopes, norms, value=coefficient / step.rows)
                by_norm += slopes.mul_(features).sum(dim=0) * (coefficient / step.rows)
            window = torch.sub(pre, self.threshold, out=features).abs_().lt_(self._bandwidth / 2)
            windowed += window.sum(dim=0)
            jump += window.mul_(gradient).sum(dim=0)
            gradient.mul_(active)
            bias += gradient.sum(dim=0)
            encoder_gradient.addmm_(gradient.T, centred[part])
        return _Sums(counts.to(torch.int64), windowed.to(torch.int64), jump, bias, by_norm, mse, tanh, output_gradient)

    def _sparse_step(
        self, step: Step, coefficient: float, norms: Float32[Tensor, " d_sae"], revival: PreActivationLoss | None
    ) -> _Sums:
        """The same, after the encoder's product touching only latents that are active or within their windows."""
        x, target = step.batch.x, step.batch.target
        centred = self.encoder_input(x)
        near, pre_of_dead = self.encode_sparsely(centred, self.b_enc, self.threshold - self._bandwidth / 2, step)
        if revival is not None and pre_of_dead is not None:
            revival.add(pre_of_dead, centred)
        threshold = self.threshold[near.latents]
        on = (near.values > threshold).to(torch.float32)
        window = ((near.values - threshold).abs_() < self._bandwidth / 2).to(torch.float32)
        active = near.with_values(near.values * on)
        error = self.add_bias_and_skip_(active.decode(self.W_dec), x).sub_(target)
        mse, slope = reconstruction_loss(error, step.weights, ranks=self.ranks, out=error)
        gradient = near.value_gradients(slope, self.W_dec)
        tanh, by_norm = torch.zeros_like(mse), torch.zeros_like(norms)
        if self._penalty == "tanh":
            norms_of = norms[near.latents]
            steps, slopes = self._tanh(active.values, norms_of)
            tanh += steps.sum() * (coefficient / step.rows)
            gradient.addcmul_(slopes, norms_of, value=coefficient / step.rows)
            by_norm += near.sum_by_latent(slopes.mul_(active.values)) * (coefficient / step.rows)
        jump = near.sum_by_latent(window * gradient)
        gradient.mul_(on)
        self.W_enc_T.grad = near.weight_gradient(centred, gradient)
        self.W_dec.grad = near.weight_gradient(slope, active.values)
        return _Sums(
            counts=near.sum_by_latent(on).to(torch.int64),
            windowed=near.sum_by_latent(window).to(torch.int64),
            jump=jump,
            bias=near.sum_by_latent(gradient),
            by_norm=by_norm,
            mse=mse,
            tanh=tanh,
            output_gradient=slope,
        )

    def _tanh(
        self, features: Float32[Tensor, "*entries"], norms: Float32[Tensor, "*entries"]
    ) -> tuple[Float32[Tensor, "*entries"], Float32[Tensor, "*entries"]]:
        """tanh(scale f n) of activations and norms, and its slope in f n."""
        steps = (features * norms).mul_(self._tanh_scale).tanh_()
        return steps, steps.square().sub_(1).mul_(-self._tanh_scale)

    @torch.no_grad()
    def active_latents(self, x: Float32[Tensor, "batch d_in"]) -> ActiveLatents:
        return self.encode_sparsely(self.encoder_input(x), self.b_enc, self.threshold)[0]

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """As for all, and thresholds that went below zero are set to zero.

        Below it a latent would give negative activations, which the SAE for use does not. This is done to the value,
        not in the loss: a threshold at zero keeps its gradient, and may rise again.
        """
        super().after_optimizer_step()
        self.threshold.clamp_(min=0.0)
