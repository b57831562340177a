"""One training step of SAEs whose latents are selected: TopK, BatchTopK, Matryoshka.

Gradients are written out instead of traced: nothing of size batch x d_sae is kept but the pre-activations, in memory
that is used again, and everything after the encoder's product touches only active latents.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sae_job.saes.auxk import AuxK, auxiliary_gradients
from sae_job.saes.kernels.choice import kernel_name
from sae_job.saes.kernels.selection import is_faster_in_bfloat16, pre_activations
from sae_job.saes.kernels.sparse import ActiveLatents
from sae_job.saes.reconstruction import reconstruction_loss, row_weights
from sae_job.saes.trainable import Ranks, StepInput, StepStatistics
from sae_job.saes.weights import TrainableWeights
from sae_operator.api.sae import SaeSpec

# Norms are equal up to this factor, as far as 16-bit weights can tell.
_EQUAL_NORMS = 1.01
# `training.selection`.
Selection = Literal["exact", "bfloat16"]


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction of a batch, and the gradient of its loss.

    Attributes:
        losses: named parts; `mse_loss` is of all latents together.
        loss: their sum.
        value_gradient: of the activations, before the ReLU.
        output_gradient: of what is added to what latents decode to: `b_dec`, and the skip connection.
        decoded: the entries, on rows that go with `decoded_gradient`.
        decoded_gradient: of what is decoded from these rows.
        error: the reconstruction minus the target; None where nobody asked.
    """

    losses: dict[str, Float32[Tensor, ""]]
    loss: Float32[Tensor, ""]
    value_gradient: Float32[Tensor, "*entries"]
    output_gradient: Float32[Tensor, "batch d_out"]
    decoded: ActiveLatents
    decoded_gradient: Float32[Tensor, "rows d_out"]
    error: Float32[Tensor, "batch d_out"] | None


class SelectingSAE(TrainableWeights):
    """What SAEs that select their active latents share: see `TrainableSAE`.

    Attributes:
        selection: the job's, which `build_trainable` sets. `bfloat16`: candidates are found by a product in bfloat16,
            where the device is faster at it, and computed again in float32.
    """

    selection: Selection = "exact"

    def __init__(self, spec: SaeSpec, d_in: int, d_out: int, d_sae: int, *, device: torch.device, ranks: Ranks) -> None:
        assert spec.architecture.k is not None
        self.k = spec.architecture.k
        super().__init__(spec, d_in, d_out, d_sae, device=device, ranks=ranks, activation=self._dense_activation)
        self._aux = AuxK.of(spec.architecture, d_in=d_in, d_sae=d_sae)

    def _move_norms_to_encoder(self, norms: Float32[Tensor, " d_sae"]) -> None:
        """As in `TrainableWeights`; what is selected stays the same only where all norms are."""
        if float(norms.max() / norms.min()) > _EQUAL_NORMS:
            raise ValueError(
                "norms of its decoder rows differ, and which latents are the largest would change with rows of unit "
                "norm: set normalizeDecoder: false"
            )
        super()._move_norms_to_encoder(norms)

    @abstractmethod
    def _dense_activation(self, pre: Float32[Tensor, "rows d_sae"]) -> Float32[Tensor, "rows d_sae"]:
        """The activation function as it reads, for initialisation."""

    @abstractmethod
    def _select(self, pre: Float[Tensor, "batch d_sae"], centred: Float32[Tensor, "batch d_in"]) -> ActiveLatents:
        """The active latents of a training batch, with float32 activations.

        Args:
            pre: pre-activations with noise; those in bfloat16 are of candidates, to be computed again.
            centred: the encoder's input.
        """

    def _pre_activations(
        self, centred: Float32[Tensor, "batch d_in"], *, rounded: bool = False, noise: torch.Generator | None = None
    ) -> Float[Tensor, "batch d_sae"]:
        """In memory that the next step overwrites.

        Args:
            rounded: whether they are in bfloat16.
            noise: its source; None where there is none to add.
        """
        pre = pre_activations(centred, self.W_enc_T, self.b_enc, self.memory, rounded=rounded)
        if noise is not None:
            self.add_noise_(pre, noise)
        return pre

    @torch.no_grad()
    def step_gradients(self, batch: StepInput) -> StepStatistics:
        centred = self.centred(batch.x)
        noise = self.source_of_noise(batch)
        # Noise is part of what is selected, and is not there to be computed again.
        rounded = self.selection == "bfloat16" and noise is None and is_faster_in_bfloat16(centred.device.type)
        pre = self._pre_activations(centred, rounded=rounded, noise=noise)
        active = self._select(pre, centred)
        dead = self._to_revive(batch)
        result = self._reconstruct(active, batch, keep_error=dead is not None)
        value_gradient = result.value_gradient.mul_(active.values > 0)
        self.b_enc.grad = active.sum_by_latent(value_gradient)
        if result.decoded is active:
            self.W_dec.grad, self.W_enc_T.grad = active.weight_gradients(
                (result.decoded_gradient, active.values), (centred, value_gradient)
            )
        else:
            self.W_dec.grad = result.decoded.weight_gradient(result.decoded_gradient, result.decoded.values)
            self.W_enc_T.grad = active.weight_gradient(centred, value_gradient)
        losses, loss = result.losses, result.loss
        if self._aux is not None:
            revival = loss.new_zeros(())
            if dead is not None and result.error is not None:
                revival = self._revive(self._aux, dead, pre, centred, batch.target, result.error)
                loss = loss + revival
            losses["auxiliary_reconstruction_loss"] = revival
        self.set_bias_and_skip_gradients(result.output_gradient, batch.x, self.b_enc.grad)
        return StepStatistics(
            loss=loss, losses=losses, fire_counts=active.fire_counts(), kernel=kernel_name(batch.x.device)
        )

    def _reconstruct(self, active: ActiveLatents, batch: StepInput, *, keep_error: bool) -> Reconstruction:
        """The reconstruction, its loss and that one's gradients."""
        weights = row_weights(batch.target, normalization=self.mse_loss_normalization, ranks=self.ranks)
        if kernel_name(batch.x.device) == "triton":
            return self._reconstruct_in_one_pass(active, batch, weights)
        error = self.add_bias_and_skip_(active.decode(self.W_dec), batch.x).sub_(batch.target)
        kept = error.clone() if keep_error else None
        mse, gradient = reconstruction_loss(error, weights, ranks=self.ranks, out=error)
        return Reconstruction(
            losses={"mse_loss": mse},
            loss=mse,
            value_gradient=active.value_gradients(gradient, self.W_dec),
            output_gradient=gradient,
            decoded=active,
            decoded_gradient=gradient,
            error=kept,
        )

    def _reconstruct_in_one_pass(
        self, active: ActiveLatents, batch: StepInput, weights: Float32[Tensor, "batch 1"] | None
    ) -> Reconstruction:
        """The same, where one kernel decodes a row and sends the error's gradient back to its latents."""
        rest = batch.target if self.W_skip is None else torch.addmm(batch.target, batch.x, self.W_skip.T, alpha=-1)
        factors = batch.x.new_full((active.batch,), 2 / (active.batch * self.ranks.size))
        if weights is not None:
            factors.mul_(weights.squeeze(1))
        found = active.reconstruct(self.W_dec, self.b_dec, rest, factors)
        mse = found.squares @ factors / 2
        gradient = found.error * factors.unsqueeze(1)
        return Reconstruction(
            losses={"mse_loss": mse},
            loss=mse,
            value_gradient=found.value_gradients,
            output_gradient=gradient,
            decoded=active,
            decoded_gradient=gradient,
            error=found.error,
        )

    def _to_revive(self, batch: StepInput) -> Int64[Tensor, " n_dead"] | None:
        """The dead latents, where there are any and they are to be revived.

        How many there are is asked of the device; a trainer that knows that there are none passes None and waits for
        nothing.
        """
        if self._aux is None or batch.dead is None:
            return None
        dead = batch.dead.nonzero().squeeze(1)
        return dead if dead.numel() > 0 else None

    def _revive(
        self,
        aux: AuxK,
        dead: Int64[Tensor, " n_dead"],
        pre: Float[Tensor, "batch d_sae"],
        centred: Float32[Tensor, "batch d_in"],
        target: Float32[Tensor, "batch d_out"],
        error: Float32[Tensor, "batch d_out"],
    ) -> Float32[Tensor, ""]:
        """The auxiliary loss; its gradients are added to the weights'."""
        if pre.dtype == torch.float32:
            of_dead = pre.index_select(1, dead)
        else:
            of_dead = torch.addmm(self.b_enc[dead], centred, self.W_enc_T[dead].T)
        revival = auxiliary_gradients(
            aux,
            dead=dead,
            pre=of_dead,
            target=target,
            error=error,
            centred=centred,
            W_dec=self.W_dec,
            ranks=self.ranks,
        )
        for parameter, gradient in (
            (self.W_enc_T, revival.W_enc_T),
            (self.b_enc, revival.b_enc),
            (self.W_dec, revival.W_dec),
        ):
            assert parameter.grad is not None
            parameter.grad.index_add_(0, dead, gradient)
        return revival.loss
