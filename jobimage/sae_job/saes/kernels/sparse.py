"""Products between few active latents and a weight matrix, without ever writing anything of size batch x k x d_in.

A bag of an embedding is a row's active latents: the table is a weight matrix with one row per latent, the per-sample
weights are activations. PyTorch's own backward operator of that gives the activations' gradients. Seen from the other
side, a bag is the rows on which a latent is active: that gives the gradients of both weight matrices, three times as
fast as the operator that PyTorch has for them, with the same sums in the same order.
"""

from __future__ import annotations

import copy
import importlib
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from sae_job.saes.kernels.choice import operand, takes_triton, top_k_kernel

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
    if top_k_kernel(pre.device) == "triton":
        kernel = importlib.import_module("sae_job.saes.kernels.triton_top_k")
        if kernel.takes(pre, k):
            return kernel.row_top_k(pre, k)
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


class _Places:
    """Where active latents are: n entries, row after row.

    Attributes:
        latents: each entry's latent.
        rows: each entry's row, ascending.
        starts: where each row's entries begin, and where the last one's end.
    """

    def __init__(
        self, latents: Int64[Tensor, " n"], rows: Int64[Tensor, " n"], starts: Int64[Tensor, " batch+1"], d_sae: int
    ) -> None:
        self.latents = latents
        self.rows = rows
        self.starts = starts
        self._d_sae = d_sae

    @cached_property
    def by_latent(self) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"], Int64[Tensor, " d_sae+1"]]:
        """The entries by latent, then by row: their places and rows, and where each latent's begin and the last
        one's end."""
        latents, order = self.latents.to(torch.int32).sort(stable=True)  # half the digits to sort by
        starts = torch.searchsorted(latents, torch.arange(self._d_sae + 1, device=latents.device, dtype=torch.int32))
        return order, self.rows[order], starts

    @cached_property
    def segments(self) -> Any:
        """The same for Triton, `triton_products.Segments`: the entries of latents that have many are in pieces."""
        return _triton().segments(*self.by_latent)


class Reconstruction(NamedTuple):
    """What a row's active latents make of it.

    Attributes:
        error: reconstruction minus target.
        squares: each row's sum of squared errors.
        value_gradients: gradient of the activations.
    """

    error: Float[Tensor, "batch d_out"]
    squares: Float[Tensor, " batch"]
    value_gradients: Float[Tensor, "*entries"]


class ActiveLatents:
    """The active latents of a batch: which they are on each row, and their activations.

    There are two forms. In the regular one every row has k; `indices` and `values` are [batch, k]. In the ragged one
    (`ragged`, `active_above`) a row has any number, none included; `indices` and `values` are flat, row after row.
    What is said below of "entries" holds for both: [batch, k] here, [n] there.

    Products are summed in float32 where their operands are 16-bit, and given in the wider type of the two.

    Args:
        indices: places of the active latents.
        values: their activations; zeros are allowed.
        d_sae: number of latents.

    Attributes:
        indices: places of the active latents, [entries].
        values: their activations, [entries].
        shape: of `indices` and `values`.
        batch: number of rows.
        d_sae: number of latents.
    """

    def __init__(self, indices: Int64[Tensor, "batch k"], values: Float[Tensor, "batch k"], d_sae: int) -> None:
        batch, k = indices.shape
        rows = torch.arange(batch, device=indices.device).repeat_interleave(k)
        starts = torch.arange(batch + 1, device=indices.device) * k
        self.indices = indices
        self.values = values
        self.shape = indices.shape
        self.batch = batch
        self.d_sae = d_sae
        self._places = _Places(indices.reshape(-1), rows, starts, d_sae)

    @classmethod
    def ragged(
        cls,
        rows: Int64[Tensor, " n"],
        latents: Int64[Tensor, " n"],
        values: Float[Tensor, " n"],
        batch: int,
        d_sae: int,
    ) -> ActiveLatents:
        """n entries in all, any number of them on a row.

        Args:
            rows: each entry's row, ascending.
            latents: each entry's latent.
            values: each entry's activation; zeros are allowed.
            batch: number of rows.
            d_sae: number of latents.
        """
        self = cls.__new__(cls)
        self.indices = latents
        self.values = values
        self.shape = latents.shape
        self.batch = batch
        self.d_sae = d_sae
        starts = torch.searchsorted(rows, torch.arange(batch + 1, device=rows.device))
        self._places = _Places(latents, rows, starts, d_sae)
        return self

    def with_values(self, values: Float[Tensor, "*entries"]) -> ActiveLatents:
        """The same places with other activations; what is known of the places is shared."""
        assert values.shape == self.shape
        other = copy.copy(self)
        other.values = values
        return other

    def split_rows(self, parts: Int64[Tensor, " n"], count: int) -> ActiveLatents:
        """The same entries on `count` rows for each row, one after the other; what is known of the latents is shared.

        Args:
            parts: which of its row's parts each entry goes to, ascending on a row, and the same for all entries of a
                latent.
            count: parts of a row.
        """
        other = copy.copy(self)
        rows = self.rows * count + parts
        other.indices, other.values = self.latents, self.values.reshape(-1)
        other.shape = self.latents.shape
        other.batch = self.batch * count
        order, _, of_latents = self._places.by_latent
        starts = torch.searchsorted(rows, torch.arange(other.batch + 1, device=rows.device))
        other._places = _Places(self.latents, rows, starts, self.d_sae)
        other._places.by_latent = order, rows[order], of_latents
        return other

    @property
    def rows(self) -> Int64[Tensor, " n"]:
        """Each entry's row, ascending; flat in both forms."""
        return self._places.rows

    @property
    def latents(self) -> Int64[Tensor, " n"]:
        """Each entry's latent; flat in both forms."""
        return self._places.latents

    def decode(self, weight: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
        """Sum of each row's activations times their latents' rows of `weight`; zero where a row has none."""
        if takes_triton(weight, self.values):
            return _triton().decode(operand(weight), self.latents, self.values.reshape(-1), self._places.starts)
        weight, values = _same_type(weight, self.values)
        return _bags(weight, self.latents, self._places.starts, values.reshape(-1))

    def value_gradients(
        self, gradient: Float[Tensor, "batch d_in"], weight: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "*entries"]:
        """Gradient of the activations, given the gradient of `decode`'s output: each entry's row of `gradient` times
        its latent's row of `weight`."""
        if takes_triton(gradient, weight):
            return (
                _triton().value_gradients(gradient, operand(weight), self.latents, self._places.starts).view(self.shape)
            )
        gradient, weight = _same_type(gradient, weight)
        flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            gradient, weight, self.latents, self._places.starts[:-1], self.rows, _SUM
        )
        return flat.view(self.shape)

    def reconstruct(
        self,
        weight: Float[Tensor, "d_sae d_out"],
        bias: Float[Tensor, " d_out"],
        target: Float[Tensor, "batch d_out"],
        factors: Float[Tensor, " batch"],
    ) -> Reconstruction:
        """`decode` plus bias, its error, and the gradient of the activations of a loss that weighs squared errors.

        In Triton this is one pass over the rows; in PyTorch it is the products one after the other.

        Args:
            weight: the decoder.
            bias: its bias.
            target: what is reconstructed.
            factors: by which a row's error is multiplied to give the gradient of the reconstruction, e.g. 2 / batch.
        """
        if takes_triton(weight, self.values, target):
            error, squares, gradients = _triton().reconstruct(
                operand(weight), bias, target, factors, self.latents, self.values.reshape(-1), self._places.starts
            )
            return Reconstruction(error, squares, gradients.view(self.shape))
        error = self.decode(weight).add_(bias).sub_(target)
        gradients = self.value_gradients(error * factors.unsqueeze(1), weight)
        return Reconstruction(error, error.square().sum(dim=1), gradients)

    def weight_gradient(
        self, rows: Float[Tensor, "batch d_in"], values: Float[Tensor, "*entries"]
    ) -> Float[Tensor, "d_sae d_in"]:
        """Sum over the batch of `values` times `rows`, gathered by latent.

        With the output's gradient and the activations this is the decoder's gradient; with the input and the
        activations' gradient it is that of the encoder's transpose.
        """
        if takes_triton(rows, values):
            return _triton().weight_gradient(operand(rows), values.reshape(-1), self._places.segments)
        order, row_of, starts = self._places.by_latent
        rows, values = _same_type(rows, values)
        return _bags(rows, row_of, starts, values.reshape(-1)[order])

    def weight_gradients(
        self,
        first: tuple[Float[Tensor, "batch first_width"], Float[Tensor, "*entries"]],
        second: tuple[Float[Tensor, "batch second_width"], Float[Tensor, "*entries"]],
    ) -> tuple[Float[Tensor, "d_sae first_width"], Float[Tensor, "d_sae second_width"]]:
        """`weight_gradient` of two pairs of rows and values: in Triton one pass over each latent's entries.

        Decoder and encoder: `weight_gradients((output_gradient, values), (centred, value_gradient))`.
        """
        if takes_triton(*first, *second):
            pairs = [(operand(rows), values.reshape(-1)) for rows, values in (first, second)]
            return _triton().weight_gradients(*pairs, self._places.segments)
        return self.weight_gradient(*first), self.weight_gradient(*second)

    def sum_by_latent(self, values: Float[Tensor, "*entries"]) -> Float[Tensor, " d_sae"]:
        """Sum of `values` over the batch for each latent."""
        if takes_triton(values):
            order, _, starts = self._places.by_latent
            return _triton().sum_by_latent(values.reshape(-1), order, starts)
        total = torch.zeros(self.d_sae, dtype=values.dtype, device=values.device)
        return total.scatter_add_(0, self.latents, values.reshape(-1))

    def sum_by_row(self, values: Float[Tensor, "*entries"]) -> Float[Tensor, " batch"]:
        """Sum of `values` over each row's entries."""
        if values.dim() == 2:
            return values.sum(dim=1)
        total = torch.zeros(self.batch, dtype=values.dtype, device=values.device)
        return total.scatter_add_(0, self.rows, values)

    def fire_counts(self) -> Int64[Tensor, " d_sae"]:
        """Rows on which each latent is active (above zero)."""
        total = torch.zeros(self.d_sae, dtype=torch.int64, device=self.values.device)
        return total.scatter_add_(0, self.latents, (self.values > 0).reshape(-1).to(torch.int64))

    def dense(self) -> Float[Tensor, "batch d_sae"]:
        """The activations of all latents. A latent stands at most once on a row."""
        features = torch.zeros(self.batch, self.d_sae, dtype=self.values.dtype, device=self.values.device)
        features[self.rows, self.latents] = self.values.reshape(-1)
        return features


def active_above(
    pre: Float[Tensor, "batch d_sae"], bar: float | Float[Tensor, ""] | Float[Tensor, " d_sae"]
) -> ActiveLatents:
    """The entries that lie above one bar, or above one bar per latent, as ragged active latents (NaN does not)."""
    batch, d_sae = pre.shape
    flat = places_of((pre > bar).view(-1))
    rows = flat.div(d_sae, rounding_mode="floor")
    return ActiveLatents.ragged(rows, flat - rows * d_sae, pre.reshape(-1)[flat], batch, d_sae)


def places_of(mask: Bool[Tensor, " n"]) -> Int64[Tensor, " m"]:
    """Where a flat mask is true. On a CPU NumPy finds them in a fifth of the time: it skips empty stretches."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def _bags(
    table: Float[Tensor, "rows width"],
    places: Int64[Tensor, " n"],
    starts: Int64[Tensor, " bags+1"],
    factors: Float[Tensor, " n"],
) -> Float[Tensor, "bags width"]:
    """Each bag's sum of factors times rows of a table: PyTorch's EmbeddingBag."""
    return torch.ops.aten._embedding_bag(table, places, starts, False, _SUM, False, factors, True)[0]


def _triton() -> ModuleType:
    """The products in Triton, imported where they are used first: Triton is there with PyTorch for CUDA only."""
    return importlib.import_module("sae_job.saes.kernels.triton_products")


def _same_type(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider type of the two: PyTorch's operators take one type only."""
    if first.dtype == second.dtype:
        return first, second
    wider = torch.promote_types(first.dtype, second.dtype)
    return first.to(wider), second.to(wider)
