"""The selection over a batch is that of a flat top-k of everything above zero, whatever is guessed and however the
rows are spread over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae_job.saes.batch_selection import among, batch_top_k
from tests.unit.saes.simulated_ranks import on_ranks


def flat_top_k(pre: Tensor, k: int) -> Tensor:
    """The definition, with the first of equal entries."""
    flat = pre.relu().flatten()
    places = flat.sort(descending=True, stable=True).indices[: k * pre.shape[0]]
    return torch.zeros_like(flat).scatter(0, places, flat[places]).view_as(pre)


def pre_activations(seed: int, rows: int, d_sae: int, *, discrete: bool, shift: float) -> Tensor:
    pre = torch.randn(rows, d_sae, generator=torch.Generator().manual_seed(seed)) + shift
    return pre.mul(2).round().div(2) if discrete else pre


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    d_sae=st.integers(1, 50),
    k=st.integers(1, 60),
    discrete=st.booleans(),
    shift=st.sampled_from([0.0, 2.0, -2.0, -9.0]),
    last=st.sampled_from([0.0, 1e-3, 1.0, 1.5, 100.0]),
)
def test_the_selection_is_that_of_a_flat_top_k(
    seed: int, rows: int, d_sae: int, k: int, discrete: bool, shift: float, last: float
) -> None:
    pre = pre_activations(seed, rows, d_sae, discrete=discrete, shift=shift)
    before = pre.clone()
    selection = batch_top_k(pre, k, last=last)
    expected = flat_top_k(pre, min(k, d_sae))
    assert torch.equal(selection.active.dense(), expected)
    assert torch.equal(pre, before)
    assert selection.active.values.numel() <= k * rows
    assert bool((selection.active.values > 0).all())
    smallest = expected[expected > 0].min() if bool((expected > 0).any()) else torch.tensor(torch.inf)
    assert torch.equal(selection.smallest, smallest)


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    d_sae=st.integers(1, 50),
    k=st.integers(1, 60),
    shift=st.sampled_from([0.0, -2.0, -9.0]),
)
def test_a_fixed_number_of_entries_as_on_a_gpu_is_the_same_selection(
    seed: int, rows: int, d_sae: int, k: int, shift: float
) -> None:
    pre = pre_activations(seed, rows, d_sae, discrete=False, shift=shift)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_job.saes.batch_selection._has_fixed_size", lambda values, ranks: True)
        selection = batch_top_k(pre, k)
        narrower = among(selection.active, max(1, min(k, d_sae) // 2))
    assert selection.active.values.numel() == min(k, d_sae) * rows
    assert torch.equal(selection.active.dense(), flat_top_k(pre, min(k, d_sae)))
    assert torch.equal(selection.smallest, batch_top_k(pre, k).smallest)
    assert torch.equal(narrower.active.dense(), flat_top_k(pre, max(1, min(k, d_sae) // 2)))


@given(
    seed=st.integers(0, 2**31),
    size=st.integers(2, 4),
    rows=st.integers(1, 9),
    k=st.integers(1, 20),
    discrete=st.booleans(),
    shift=st.sampled_from([0.0, -2.0, -9.0]),
    last=st.sampled_from([0.0, 1.0, 100.0]),
)
def test_ranks_select_together_what_one_process_selects(
    seed: int, size: int, rows: int, k: int, discrete: bool, shift: float, last: float
) -> None:
    pre = pre_activations(seed, size * rows, 16, discrete=discrete, shift=shift)
    whole = batch_top_k(pre, k)
    parts = on_ranks(size, lambda rank: batch_top_k(pre[rank.index * rows :][:rows], k, last=last, ranks=rank))
    assert torch.equal(torch.cat([part.active.dense() for part in parts]), whole.active.dense())
    assert all(torch.equal(part.smallest, whole.smallest) for part in parts)


def test_of_equal_entries_the_first_are_taken() -> None:
    pre = torch.tensor([[1.0, 3.0, 1.0], [1.0, 1.0, 0.0]])
    selected = batch_top_k(pre, 1).active.dense()
    assert torch.equal(selected, torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]]))


def test_a_row_may_take_more_than_k_and_another_none() -> None:
    pre = torch.tensor([[5.0, 4.0, 3.0], [1.0, 2.0, -1.0]])
    selection = batch_top_k(pre, 1)
    assert torch.equal(selection.active.dense(), torch.tensor([[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    assert float(selection.smallest) == 4.0


def test_what_is_not_above_zero_is_never_active() -> None:
    selection = batch_top_k(torch.tensor([[0.0, -1.0], [2.0, -3.0]]), 2)
    assert torch.equal(selection.active.dense(), torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    assert float(batch_top_k(torch.full((2, 2), -1.0), 1).smallest) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_selected_from_like_float32(dtype: torch.dtype) -> None:
    pre = pre_activations(3, 30, 40, discrete=False, shift=0.0).to(dtype)
    assert torch.equal(batch_top_k(pre, 4).active.dense(), flat_top_k(pre, 4))


def test_every_active_latent_stands_once_row_after_row() -> None:
    active = batch_top_k(pre_activations(5, 50, 30, discrete=False, shift=0.0), 3).active
    places = active.rows * 30 + active.latents
    assert torch.equal(places, places.unique())
