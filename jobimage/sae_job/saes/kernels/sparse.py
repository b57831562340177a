"""Products between few active latents and a weight matrix, without ever writing anything of size batch x k x d_in.

A bag of an embedding is a row's active latents: the table is a weight matrix with one row per latent, the per-sample
weights are activations. PyTorch's own backward operator of that gives the activations' gradients. Seen from the other
side, a bag is the rows on which a latent is active: that gives the gradients of both weight matrices, three times as
fast as the operator that PyTorch has for them, with the same sums in the same order.
"""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

_SUM = 0  # PyTorch's number for mode="sum"
# The maxima of groups of this size are searched instead of all entries. 8 is the measured optimum on a CPU: half as
# many candidates again cost more than the smaller first stage saves.
TOP_K_GROUP = 8


def top_k(pre: Float32[Tensor, "batch d_sae"], k: int) -> tuple[Float32[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """The k largest entries of each row and their places, exactly, in no particular order.

    Entries that are among the k largest lie in the k groups with the largest maxima; only those groups are looked at
    again.
    """
    batch, d_sae = pre.shape
    groups = d_sae // TOP_K_GROUP
    # On a GPU, one call is faster than four that write in between.
    if pre.is_cuda or d_sae % TOP_K_GROUP or groups < 4 * k:
        values, indices = pre.topk(k, dim=1, sorted=False)
        return values, indices
    # Group j holds j, j + groups, j + 2 groups, ...: the maximum then runs over whole rows, which vectorises.
    best = pre.view(batch, TOP_K_GROUP, groups).amax(dim=1).topk(k, dim=1, sorted=False).indices
    offsets = torch.arange(0, d_sae, groups, device=pre.device)
    candidates = (best.unsqueeze(1) + offsets.view(1, TOP_K_GROUP, 1)).view(batch, TOP_K_GROUP * k)
    values, places = pre.gather(1, candidates).topk(k, dim=1, sorted=False)
    return values, candidates.gather(1, places)


class ActiveLatents:
    """The active latents of a batch: for each row k places and their activations.

    Args:
        indices: places of the active latents.
        values: their activations; zeros are allowed.
        d_sae: number of latents.
    """

    def __init__(self, indices: Int64[Tensor, "batch k"], values: Float32[Tensor, "batch k"], d_sae: int) -> None:
        batch, k = indices.shape
        self.d_sae = d_sae
        self.values = values
        self.shape = (batch, k)
        self.indices = indices
        self._flat = indices.reshape(-1)
        self._offsets = torch.arange(0, batch * k, k, device=indices.device)
        self._bag_of = torch.arange(batch, device=indices.device).repeat_interleave(k)
        self._by_latent: tuple[Tensor, Tensor, Tensor] | None = None

    def decode(self, weight: Float32[Tensor, "d_sae d_in"]) -> Float32[Tensor, "batch d_in"]:
        """Sum of each row's activations times their latents' rows of `weight`."""
        return torch.ops.aten._embedding_bag(
            weight, self._flat, self._offsets, False, _SUM, False, self.values.reshape(-1)
        )[0]

    def value_gradients(
        self, gradient: Float32[Tensor, "batch d_in"], weight: Float32[Tensor, "d_sae d_in"]
    ) -> Float32[Tensor, "batch k"]:
        """Gradient of the activations, given the gradient of `decode`'s output."""
        flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            gradient, weight, self._flat, self._offsets, self._bag_of, _SUM
        )
        return flat.view(self.shape)

    def weight_gradient(
        self, rows: Float32[Tensor, "batch d_in"], values: Float32[Tensor, "batch k"]
    ) -> Float32[Tensor, "d_sae d_in"]:
        """Sum over the batch of `values` times `rows`, gathered by latent.

        With the output's gradient and the activations this is the decoder's gradient; with the input and the
        activations' gradient it is that of the encoder's transpose.
        """
        order, bags, starts = self._rows_of_latents()
        return torch.ops.aten._embedding_bag(rows, bags, starts, False, _SUM, False, values.reshape(-1)[order])[0]

    def _rows_of_latents(self) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"], Int64[Tensor, " d_sae"]]:
        """The n = batch x k entries by latent, then by row: their places and rows, and where each latent's begin."""
        if self._by_latent is None:
            latents, order = self._flat.sort(stable=True)
            starts = torch.searchsorted(latents, torch.arange(self.d_sae, device=latents.device))
            self._by_latent = order, self._bag_of[order], starts
        return self._by_latent

    def sum_by_latent(self, values: Float32[Tensor, "batch k"]) -> Float32[Tensor, " d_sae"]:
        """Sum of `values` over the batch for each latent."""
        total = torch.zeros(self.d_sae, dtype=values.dtype, device=values.device)
        return total.scatter_add_(0, self._flat, values.reshape(-1))

    def fire_counts(self) -> Int64[Tensor, " d_sae"]:
        """Rows on which each latent is active (above zero)."""
        total = torch.zeros(self.d_sae, dtype=torch.int64, device=self.values.device)
        return total.scatter_add_(0, self._flat, (self.values > 0).reshape(-1).to(torch.int64))
