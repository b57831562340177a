"""What SAEs have in common whose sparsity comes from a penalty instead of a selection.

A step is done in blocks of rows, in memory that is used again: what is of size rows x d_sae stays in the processor's
cache between one pass over it and the next, and is never there for the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sae_job.saes.initialization import Activation
from sae_job.saes.kernels.sparse import ActiveLatents, active_above
from sae_job.saes.reconstruction import row_weights
from sae_job.saes.regime import Regime
from sae_job.saes.trainable import Ranks, StepInput
from sae_job.saes.weights import TrainableWeights
from sae_operator.api.sae import SaeSpec

# Entries (rows x d_sae) of a block. On a CPU 16 MiB of float32: measured at 576 x 4608, blocks of 512 to 4096 rows take
# the same time, and below 256 rows the products themselves are slower. On a GPU, which is kept busy by large products
# alone, 1 GiB.
_CPU_ENTRIES = 2**22
_GPU_ENTRIES = 2**28
_FEWEST_ROWS = 256


def warmed_up(coefficient: float, step: int, warm_up_steps: int | None) -> float:
    """A penalty's weight in a step: rises linearly from 0 over the warm-up."""
    return coefficient * min(step / warm_up_steps, 1.0) if warm_up_steps else coefficient


@dataclass(frozen=True)
class Step:
    """One step's input, with what all architectures ask of it.

    Attributes:
        batch: the input.
        rows: of the batch, over all ranks: what means divide by.
        weights: of the rows' squared errors; None where they are 1.
        dead: places of dead latents, for losses that revive them; None where there is nothing to revive.
    """

    batch: StepInput
    rows: int
    weights: Float32[Tensor, "batch 1"] | None
    dead: Int64[Tensor, " n_dead"] | None

    def weights_of(self, part: slice) -> Float32[Tensor, "block 1"] | None:
        return None if self.weights is None else self.weights[part]


class PenalizedSAE(TrainableWeights):
    """Blocks, buffers and the encoder of an SAE with a sparsity penalty.

    Args:
        spec, d_in, d_out, d_sae, device, ranks, activation: as `TrainableWeights` takes them.

    Attributes:
        regime: whether the next step is dense or touches only active latents.
    """

    def __init__(
        self,
        spec: SaeSpec,
        d_in: int,
        d_out: int,
        d_sae: int,
        *,
        device: torch.device,
        ranks: Ranks,
        activation: Activation,
    ) -> None:
        super().__init__(spec, d_in, d_out, d_sae, device=device, ranks=ranks, activation=activation)
        self.regime = Regime(d_sae, device=device, ranks=ranks)

    @property
    def buffers_by_name(self) -> dict[str, Tensor]:
        return {**super().buffers_by_name, "entries_per_row": self.regime.entries_per_row}

    def begin(self, batch: StepInput, *, revives: bool = False) -> Step:
        """What a step begins with.

        Args:
            revives: whether there is a loss that revives dead latents.
        """
        dead = batch.dead.nonzero().squeeze(1) if revives and batch.dead is not None else None
        return Step(
            batch=batch,
            rows=batch.x.shape[0] * self.ranks.size,
            weights=row_weights(batch.target, normalization=self.mse_loss_normalization, ranks=self.ranks),
            dead=dead if dead is not None and dead.numel() > 0 else None,
        )

    def blocks(self, rows: int) -> Iterator[slice]:
        """This rank's rows, block by block."""
        most = _CPU_ENTRIES if self.W_dec.device.type == "cpu" else _GPU_ENTRIES
        size = max(_FEWEST_ROWS, most // self.d_sae)
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))

    def scratch(self, name: str, rows: int, columns: int | None = None) -> Float32[Tensor, "rows columns"]:
        """Memory of a width, d_sae when None; see `StepMemory.take`."""
        columns = self.d_sae if columns is None else columns
        return self.memory.take(name, rows, columns, device=self.W_dec.device)

    def encoder_input(self, x: Float32[Tensor, "batch d_in"]) -> Float32[Tensor, "batch d_in"]:
        """`centred`, in memory that the next batch overwrites."""
        if not self.spec.subtracts_b_dec:
            return x
        return torch.sub(x, self.b_dec, out=self.scratch("centred", x.shape[0], self.d_in))

    def encode_block(
        self, centred: Float32[Tensor, "block d_in"], bias: Float32[Tensor, " d_sae"] | None, step: Step | None
    ) -> Float32[Tensor, "block d_sae"]:
        """Pre-activations, in memory that the next block overwrites; with noise in a step of training."""
        pre = self.scratch("pre", centred.shape[0])
        if bias is None:
            torch.mm(centred, self.W_enc_T.T, out=pre)
        else:
            torch.addmm(bias, centred, self.W_enc_T.T, out=pre)
        noise = None if step is None else self.source_of_noise(step.batch)
        if noise is not None:
            self.add_noise_(pre, noise)
        return pre

    def encode_sparsely(
        self,
        centred: Float32[Tensor, "batch d_in"],
        bias: Float32[Tensor, " d_sae"] | None,
        bar: float | Float32[Tensor, " d_sae"],
        step: Step | None = None,
    ) -> tuple[ActiveLatents, Float32[Tensor, "batch n_dead"] | None]:
        """The entries whose pre-activations are above a bar, and all pre-activations of the step's dead latents."""
        rows, latents, values, of_dead = [], [], [], []
        for part in self.blocks(centred.shape[0]):
            pre = self.encode_block(centred[part], bias, step)
            active = active_above(pre, bar)
            rows.append(active.rows + part.start)
            latents.append(active.latents)
            values.append(active.values)
            if step is not None and step.dead is not None:
                of_dead.append(pre.index_select(1, step.dead))
        entries = ActiveLatents.ragged(
            torch.cat(rows), torch.cat(latents), torch.cat(values), centred.shape[0], self.d_sae
        )
        return entries, torch.cat(of_dead) if of_dead else None

    def decoder_norms(self) -> Float32[Tensor, " d_sae"]:
        return torch.linalg.vector_norm(self.W_dec, dim=1)


def cleared_gradient(parameter: Tensor) -> Tensor:
    """A parameter's gradient, in the memory that it had, filled with zeros."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
        return parameter.grad
    return parameter.grad.zero_()
