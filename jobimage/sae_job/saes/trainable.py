"""The interface between a trainer and an SAE architecture.

A trainable SAE holds its weights and knows the gradient of its loss; optimiser, schedule, counters and data are the
trainer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from sae_job.saes.base import SAE
from sae_job.saes.config import Provenance


@dataclass(frozen=True)
class StepStatistics:
    """What one step tells, as tensors on the SAE's device (asking for their values would hold a GPU up).

    Attributes:
        loss: the whole loss; mean over the batch of sums over d_in.
        losses: its named parts, e.g. `mse_loss`, `l1_loss`, `auxiliary_reconstruction_loss`.
        fired: latents that were active on at least one row.
        fire_counts: rows on which each latent was active.
        l0: mean number of active latents per row.
    """

    loss: Float32[Tensor, ""]
    fired: Bool[Tensor, " d_sae"]
    fire_counts: Int64[Tensor, " d_sae"]
    l0: Float32[Tensor, ""]
    losses: Mapping[str, Float32[Tensor, ""]] = field(default_factory=dict)


class TrainableSAE(Protocol):
    """One architecture in training.

    `parameters_by_name` holds contiguous float32 tensors whose `.grad` `step_gradients` fills: `W_enc_T` [d_sae,
    d_in] (the encoder's
    transpose: gradients arrive latent by latent), `b_enc` [d_sae], `W_dec` [d_sae, d_in], `b_dec` [d_in].
    """

    d_in: int
    d_sae: int

    @property
    def parameters_by_name(self) -> dict[str, Tensor]: ...

    def initialize(self, sample: Float32[Tensor, "rows d_in"], generator: torch.Generator) -> None:
        """Set the initial weights from activations as `step_gradients` gets them; all randomness comes from the (CPU)
        generator."""
        ...

    def step_gradients(
        self, x: Float32[Tensor, "batch d_in"], *, step: int, dead: Bool[Tensor, " d_sae"] | None
    ) -> StepStatistics:
        """Fill every parameter's `.grad` with the gradient of the loss on one batch, scaled or normalised.

        Args:
            step: 0-based number of the step, for coefficients that warm up.
            dead: latents that count as dead before this step.
        """
        ...

    def project_gradients(self) -> None:
        """Remove from the decoder's gradient its component along each row, where rows are kept at unit norm."""
        ...

    def after_optimizer_step(self) -> None:
        """Bring the decoder's rows back to unit norm, where they are kept there."""
        ...

    def to_inference(self, *, scale: float, normalization: str = "none", provenance: Provenance | None = None) -> SAE:
        """A copy for use on raw activations.

        Args:
            scale: the factor that activations were multiplied by, which is folded in.
            normalization: the job's; one that is of each activation on its own is done by the copy, without a scale.
            provenance: what cfg.json tells of the activations.
        """
        ...
