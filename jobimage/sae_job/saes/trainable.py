"""The interface between a trainer and an SAE architecture.

A trainable SAE holds its weights and knows the gradient of its loss; optimiser, schedule, counters and data are the
trainer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from sae_job.saes.base import SAE
from sae_job.saes.config import Provenance
from sae_job.saes.kernels.sparse import ActiveLatents
from sae_job.saes.step_memory import StepMemory

# `training.mseLossNormalization`.
MseNormalization = Literal["none", "dense_batch"]


class Ranks(Protocol):
    """The processes that train together, each on its own rows of every batch."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def index(self) -> int:
        """Which of them this process is, from 0: its place in what `gather` gives."""
        ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks; returns it."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors, of one shape, one after the other along the first axis."""
        ...


class OneProcess:
    """A training in one process."""

    size = 1
    index = 0

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor


ONE_PROCESS = OneProcess()


@dataclass(frozen=True)
class StepInput:
    """What one step trains on.

    Attributes:
        x: activations to encode, scaled or normalised: this rank's rows of the batch.
        target: what is reconstructed: `x` itself, or the other hook's activations of a transcoder.
        step: 0-based number of the step, for coefficients that warm up.
        dead: latents that count as dead before this step; None where nobody asks.
        generator: source of noise, on the device of `x`; None where there is none.
    """

    x: Float32[Tensor, "batch d_in"]
    target: Float32[Tensor, "batch d_out"]
    step: int
    dead: Bool[Tensor, " d_sae"] | None = None
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class StepStatistics:
    """What one step tells, as tensors on the SAE's device (asking for their values would hold a GPU up).

    Of several ranks each tells its part; the sums over ranks are of the whole batch.

    Attributes:
        loss: the whole loss; mean over the batch of sums over d_out.
        losses: its named parts, e.g. `mse_loss`, `l1_loss`, `auxiliary_reconstruction_loss`.
        fire_counts: rows on which each latent was active.
        coefficient: weight of the sparsity penalty in this step; None where there is none.
        kernel: name of the products' implementation in this step, e.g. `dense`, `sparse`, `triton`.
    """

    loss: Float32[Tensor, ""]
    fire_counts: Int64[Tensor, " d_sae"]
    coefficient: float | None = None
    kernel: str = "dense"
    losses: Mapping[str, Float32[Tensor, ""]] = field(default_factory=dict)


class TrainableSAE(Protocol):
    """One architecture in training.

    `parameters_by_name` holds contiguous float32 tensors whose `.grad` `step_gradients` fills. All architectures have
    `W_enc_T` [d_sae, d_in] (the encoder's transpose: gradients arrive latent by latent), `W_dec` [d_sae, d_out] and
    `b_dec` [d_out]; most have `b_enc` [d_sae]. `buffers_by_name` holds what is learned without a gradient, such as a
    running threshold. Both are stored in checkpoints.

    Of several ranks each computes its rows' part of sums over the whole batch: gradients, losses and counts of the
    ranks are added by the trainer. What is not a sum over rows (a selection over the batch, a ratio of means) is made
    with `ranks`.
    """

    d_in: int
    d_out: int
    d_sae: int
    mse_loss_normalization: MseNormalization
    memory: StepMemory

    @property
    def parameters_by_name(self) -> dict[str, Tensor]: ...

    @property
    def buffers_by_name(self) -> dict[str, Tensor]: ...

    def initialize(
        self,
        sample: Float32[Tensor, "rows d_in"],
        target: Float32[Tensor, "rows d_out"],
        generator: torch.Generator,
    ) -> None:
        """Set the initial weights from activations as `step_gradients` gets them; all randomness comes from the (CPU)
        generator."""
        ...

    def start_from(self, sae: SAE, *, scale: float, target_scale: float) -> None:
        """Take the weights of a saved SAE of the same architecture and sizes, for activations times these factors."""
        ...

    def step_gradients(self, batch: StepInput) -> StepStatistics:
        """Fill every parameter's `.grad` with this rank's part of the gradient of the loss on one batch."""
        ...

    def active_latents(self, x: Float32[Tensor, "batch d_in"]) -> ActiveLatents:
        """The latents that are active on rows as the SAE for use would encode them, without noise."""
        ...

    def project_gradients(self) -> None:
        """Remove from the decoder's gradient its component along each row, where rows are kept at unit norm."""
        ...

    def after_optimizer_step(self) -> None:
        """Bring the decoder's rows back to unit norm, where they are kept there."""
        ...

    def to_inference(
        self,
        *,
        scale: float,
        target_scale: float | None = None,
        normalization: str = "none",
        provenance: Provenance | None = None,
    ) -> SAE:
        """A copy for use on raw activations.

        Args:
            scale: the factor that activations were multiplied by, which is folded in.
            target_scale: the same of what is reconstructed; `scale` when None.
            normalization: the job's; one that is of each activation on its own is done by the copy, without a scale.
            provenance: what cfg.json tells of the activations.
        """
        ...
