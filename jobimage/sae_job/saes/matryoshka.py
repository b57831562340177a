"""Matryoshka BatchTopK SAEs (Bussmann et al. 2025): nested prefixes of the latents reconstruct on their own.

The loss is the sum over prefixes of the reconstruction's squared error by the prefix's active latents alone (their
section 3): early latents learn what is general, for later ones may not be there. A latent's part of the
reconstruction stands in every prefix that contains it, so its gradient is that of the sum of those prefixes' errors.
Each active latent is decoded once, whatever the number of prefixes.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from sae_job.saes.batchtopk import BatchTopKSAE
from sae_job.saes.kernels.sparse import ActiveLatents
from sae_job.saes.reconstruction import reconstruction_loss, row_weights
from sae_job.saes.sparse_step import Reconstruction
from sae_job.saes.trainable import Ranks, StepInput
from sae_operator.api.sae import Architecture, SaeSpec

# Parts of d_sae that the prefixes are by default, besides the whole.
_DEFAULT_PARTS = (16, 8, 4, 2)


def matryoshka_widths(architecture: Architecture, d_sae: int) -> tuple[int, ...]:
    """Sizes of the nested prefixes, ascending, d_sae last.

    Raises:
        ValueError: the spec's sizes do not ascend, or are beyond d_sae.
    """
    if architecture.widths is None:
        return tuple(sorted({d_sae // part for part in _DEFAULT_PARTS if d_sae >= part} | {d_sae}))
    widths = tuple(architecture.widths)
    if any(after <= before for before, after in pairwise(widths)):
        raise ValueError(f"widths {list(widths)} do not ascend")
    if widths[-1] > d_sae:
        raise ValueError(f"the last of widths, {widths[-1]}, is above dSae, {d_sae}")
    return widths if widths[-1] == d_sae else (*widths, d_sae)


class MatryoshkaBatchTopKSAE(BatchTopKSAE):
    """A Matryoshka BatchTopK SAE in training: see `TrainableSAE`.

    Attributes:
        widths: sizes of the nested prefixes, ascending, d_sae last.
    """

    def __init__(self, spec: SaeSpec, d_in: int, d_out: int, d_sae: int, *, device: torch.device, ranks: Ranks) -> None:
        super().__init__(spec, d_in, d_out, d_sae, device=device, ranks=ranks)
        self.widths = matryoshka_widths(spec.architecture, d_sae)
        sizes = torch.tensor(self.widths).diff(prepend=torch.zeros(1, dtype=torch.int64))
        self._group_of = torch.arange(len(self.widths)).repeat_interleave(sizes).to(device)

    def _reconstruct(self, active: ActiveLatents, batch: StepInput, *, keep_error: bool) -> Reconstruction:
        weights = row_weights(batch.target, normalization=self.mse_loss_normalization, ranks=self.ranks)
        groups = len(self.widths)
        # A row for each group of latents that one prefix has more than the one before; then, by adding them up, each
        # prefix's error; then its gradient; then, by adding these from behind, the gradient of what a group decodes to.
        decoded = active.split_rows(self._group_of[active.latents], groups)
        by_group = decoded.decode(self.W_dec)
        prefix = by_group.view(active.batch, groups, self.d_out)
        first = prefix[:, 0]
        self.add_bias_and_skip_(first, batch.x).sub_(batch.target)
        for group in range(1, groups):
            prefix[:, group] += prefix[:, group - 1]
        kept = prefix[:, -1].clone() if keep_error else None
        errors = [
            reconstruction_loss(prefix[:, group], weights, ranks=self.ranks, out=prefix[:, group])[0]
            for group in range(groups)
        ]
        for group in range(groups - 1, 0, -1):
            prefix[:, group - 1] += prefix[:, group]
        losses = {f"inner_mse_loss_{width}": error for width, error in zip(self.widths[:-1], errors[:-1], strict=True)}
        return Reconstruction(
            losses={"mse_loss": errors[-1], **losses},
            loss=torch.stack(errors).sum(),
            value_gradient=decoded.value_gradients(by_group, self.W_dec),
            output_gradient=first,
            decoded=decoded,
            decoded_gradient=by_group,
            error=kept,
        )
