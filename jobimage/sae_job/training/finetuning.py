"""The fine-tuning phase: decoders learn to reconstruct from the latents that frozen encoders give.

A sparsity penalty shrinks activations (Wright & Sharkey 2024 call it feature suppression). Here nothing but the
reconstruction loss is left, and nothing that decides which latents fire, or how strongly, is trained: a factor per
latent, and by method the decoder and its bias, learn what undoes the shrinkage.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import torch
from torch import Tensor

from sae_job.saes.base import SAE
from sae_job.saes.config import Provenance
from sae_job.saes.reconstruction import reconstruction_loss, row_weights
from sae_job.saes.trainable import Ranks, StepInput, StepStatistics, TrainableSAE
from sae_operator.api.sae import SaeSpec

Method = Literal["scale", "decoder", "unrotated_decoder"]
# The parameters of each method beside the factors.
_TRAINED: dict[Method, tuple[str, ...]] = {
    "scale": (),
    "decoder": ("W_dec", "b_dec"),
    "unrotated_decoder": ("b_dec",),
}
# Biases that are added to `(x - b_dec) W_enc`, and the logarithm of what that product is multiplied by there.
_BIASES: dict[str, str | None] = {"b_enc": None, "b_gate": None, "b_mag": "r_mag"}


class Finetunable(TrainableSAE, Protocol):
    """What fine-tuning needs of an architecture: what `TrainableWeights` has.

    Attributes:
        latent_parameters: names of its parameters that have an entry for each latent.
        W_skip: [d_out, d_in], of a transcoder with a skip connection.
    """

    spec: SaeSpec
    latent_parameters: tuple[str, ...]
    W_enc_T: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor | None


class Finetuning:
    """An SAE in its fine-tuning: y = sum_j s_j f_j(x) W_dec[j] + b_dec (+ skip), with f as it was at the switch.

    With `b_dec` trained, encoders that subtract it go on subtracting what it was at the switch. An SAE for use has one
    `b_dec` for both, so that there the encoder's biases take up the difference: see `to_inference`.

    Args:
        trained: the SAE as the training left it. Its `W_dec` is trained in place by the method `decoder`; nothing else
            of it changes.
        method: what is trained beside the factors.
        ranks: the processes that train together.

    Attributes:
        parameters_by_name: `finetuning_scaling_factor` [d_sae], which begins at 1, and those of the method.
    """

    def __init__(self, trained: Finetunable, method: Method, *, ranks: Ranks) -> None:
        self._trained = trained
        self._ranks = ranks
        for parameter in trained.parameters_by_name.values():
            parameter.grad = None
        self.finetuning_scaling_factor = torch.ones_like(trained.W_dec[:, 0], requires_grad=True)
        self.b_dec = trained.b_dec.detach().clone().requires_grad_()
        by_name = {"W_dec": trained.W_dec, "b_dec": self.b_dec}
        self.parameters_by_name: dict[str, Tensor] = {
            "finetuning_scaling_factor": self.finetuning_scaling_factor,
            **{name: by_name[name] for name in _TRAINED[method]},
        }

    @torch.no_grad()
    def step_gradients(self, batch: StepInput) -> StepStatistics:
        """Fill the gradients of the reconstruction loss; the sparsity penalty and auxiliary losses have none here."""
        trained, factors = self._trained, self.finetuning_scaling_factor
        active = trained.active_latents(batch.x)
        reconstruction = active.decode(trained.W_dec * factors.unsqueeze(1)).add_(self.b_dec)
        if trained.W_skip is not None:
            reconstruction.addmm_(batch.x, trained.W_skip.T)
        error = reconstruction.sub_(batch.target)
        weights = row_weights(batch.target, normalization=trained.mse_loss_normalization, ranks=self._ranks)
        loss, output_gradient = reconstruction_loss(error, weights, ranks=self._ranks, out=error)
        # Of the rows s_j W_dec[j]; those of s and W_dec follow by the product rule.
        scaled_gradient = active.weight_gradient(output_gradient, active.values)
        factors.grad = torch.linalg.vecdot(scaled_gradient, trained.W_dec)
        if "W_dec" in self.parameters_by_name:
            trained.W_dec.grad = scaled_gradient.mul_(factors.unsqueeze(1))
        if "b_dec" in self.parameters_by_name:
            self.b_dec.grad = output_gradient.sum(dim=0)
        return StepStatistics(loss=loss, losses={"mse_loss": loss}, fire_counts=active.fire_counts(), kernel="sparse")

    def project_gradients(self) -> None:
        """As in training, where the decoder is trained; a frozen one has no gradient to project."""
        if "W_dec" in self.parameters_by_name:
            self._trained.project_gradients()

    def after_optimizer_step(self) -> None:
        """Rows of a decoder that is trained keep their unit norm, if they had to: their length is the factor's."""
        if "W_dec" in self.parameters_by_name:
            self._trained.after_optimizer_step()

    @torch.no_grad()
    def to_inference(
        self,
        *,
        scale: float,
        target_scale: float | None = None,
        normalization: str = "none",
        provenance: Provenance | None = None,
    ) -> SAE:
        """A copy for use on raw activations, with `finetuning_scaling_factor`.

        Its latents fire as before the fine-tuning: where the encoder subtracts `b_dec`, (x - b_old) W + c equals
        (x - b_new) W + c', with c' = c + (b_new - b_old) W. The gated encoder's magnitudes see W times exp(r_mag).
        """
        trained = self._trained
        changed = {"b_dec": self.b_dec.detach()}
        if trained.spec.subtracts_b_dec:
            moved = trained.W_enc_T @ (self.b_dec - trained.b_dec)
            for name, logarithm in _BIASES.items():
                if name in trained.latent_parameters:
                    factor = 1.0 if logarithm is None else getattr(trained, logarithm).exp()
                    changed[name] = getattr(trained, name) + moved * factor
        before = {name: getattr(trained, name).detach().clone() for name in changed}
        for name, tensor in changed.items():
            getattr(trained, name).copy_(tensor)
        try:
            sae = trained.to_inference(
                scale=scale, target_scale=target_scale, normalization=normalization, provenance=provenance
            )
        finally:
            for name, tensor in before.items():
                getattr(trained, name).copy_(tensor)
        sae.cfg = dataclasses.replace(sae.cfg, finetuning_scaling_factor=True)
        factors = self.finetuning_scaling_factor.detach().to(sae.W_dec.dtype, copy=True)
        sae.finetuning_scaling_factor = torch.nn.Parameter(factors, requires_grad=False)
        return sae

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it beside the weights of the training."""
        return {"finetuning_scaling_factor": self.finetuning_scaling_factor, "b_dec": self.b_dec}
