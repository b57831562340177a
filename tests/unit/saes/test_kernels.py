"""The sparse products equal their dense twins in both forms, and the two-stage top-k is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_job.saes.kernels.sparse import ActiveLatents, active_above, top_k
from tests.kernel_cases import BATCH, D_SAE, FORMS, active_latents, random

D_IN = 7


@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, 16),
    groups=st.integers(1, 80),
    rest=st.integers(0, 7),
    discrete=st.booleans(),
)
def test_top_k_has_the_same_values_as_a_sort(seed: int, k: int, groups: int, rest: int, discrete: bool) -> None:
    d_sae = max(8 * groups + rest, k)
    pre = torch.randn(3, d_sae, generator=torch.Generator().manual_seed(seed))
    if discrete:  # many ties
        pre = pre.round()
    values, indices = top_k(pre, k)
    expected = pre.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(values.sort(dim=1, descending=True).values, expected)
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)


@pytest.fixture(params=FORMS)
def active(request: pytest.FixtureRequest) -> ActiveLatents:
    return active_latents(request.param)


def test_dense_puts_each_value_in_its_place(active: ActiveLatents) -> None:
    expected = torch.zeros(BATCH, D_SAE)
    for row, latent, value in zip(active.rows, active.latents, active.values.reshape(-1), strict=True):
        expected[row, latent] = value
    assert torch.equal(active.dense(), expected)


def test_decode(active: ActiveLatents) -> None:
    weight = random(D_SAE, D_IN, seed=2)
    assert torch.allclose(active.decode(weight), active.dense() @ weight, atol=1e-6)


def test_weight_gradient(active: ActiveLatents) -> None:
    rows = random(BATCH, D_IN, seed=3)
    assert torch.allclose(active.weight_gradient(rows, active.values), active.dense().T @ rows, atol=1e-6)


def test_value_gradients(active: ActiveLatents) -> None:
    weight, gradient = random(D_SAE, D_IN, seed=4), random(BATCH, D_IN, seed=5)
    expected = (gradient @ weight.T)[active.rows, active.latents].view(active.shape)
    assert torch.allclose(active.value_gradients(gradient, weight), expected, atol=1e-6)


def test_sums_and_counts(active: ActiveLatents) -> None:
    dense = active.dense()
    assert torch.allclose(active.sum_by_latent(active.values), dense.sum(dim=0), atol=1e-6)
    assert torch.allclose(active.sum_by_row(active.values), dense.sum(dim=1), atol=1e-6)
    assert torch.equal(active.fire_counts(), (dense > 0).sum(dim=0))


def test_a_regular_form_written_as_a_ragged_one_has_the_same_bits() -> None:
    regular = active_latents("regular")
    ragged = ActiveLatents.ragged(regular.rows, regular.latents, regular.values.reshape(-1), BATCH, D_SAE)
    weight, rows = random(D_SAE, D_IN, seed=6), random(BATCH, D_IN, seed=7)
    assert torch.equal(regular.decode(weight), ragged.decode(weight))
    assert torch.equal(regular.value_gradients(rows, weight).reshape(-1), ragged.value_gradients(rows, weight))
    assert torch.equal(
        regular.weight_gradient(rows, regular.values), ragged.weight_gradient(rows, regular.values.reshape(-1))
    )


def test_other_values_in_the_same_places(active: ActiveLatents) -> None:
    doubled = active.with_values(active.values * 2)
    weight, rows = random(D_SAE, D_IN, seed=8), random(BATCH, D_IN, seed=9)
    assert torch.allclose(doubled.decode(weight), 2 * active.decode(weight), atol=1e-6)
    assert torch.equal(doubled.weight_gradient(rows, active.values), active.weight_gradient(rows, active.values))
    assert torch.equal(doubled.indices, active.indices)


@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_type", [torch.float32, torch.bfloat16])
def test_products_are_given_in_the_wider_type(weight_type: torch.dtype, value_type: torch.dtype) -> None:
    """And summed in float32: the error is that of rounding operands and the result, not of rounding partial sums."""
    active = active_latents("ragged")
    active = active.with_values(active.values.to(value_type))
    weight, rows = random(D_SAE, D_IN, seed=10).to(weight_type), random(BATCH, D_IN, seed=11).to(weight_type)
    wider = torch.promote_types(weight_type, value_type)
    tolerance = 1e-6 if wider == torch.float32 else 2**-8  # half a unit in the last of bfloat16's 8 bits
    dense = active.dense().double()
    decoded = active.decode(weight)
    assert decoded.dtype == wider
    assert torch.allclose(decoded.double(), dense @ weight.double(), rtol=tolerance, atol=1e-6)
    gradient = active.weight_gradient(rows, active.values)
    assert gradient.dtype == wider
    assert torch.allclose(gradient.double(), dense.T @ rows.double(), rtol=tolerance, atol=1e-6)
    of_values = active.value_gradients(rows, weight)
    expected = (rows.double() @ weight.double().T)[active.rows, active.latents]
    assert torch.allclose(of_values.double(), expected, rtol=1e-6 if weight_type == torch.float32 else 2**-8, atol=1e-6)


@pytest.mark.parametrize("per_latent", [False, True], ids=["one bar", "a bar per latent"])
def test_active_above_finds_what_a_comparison_finds(per_latent: bool) -> None:
    pre = random(BATCH, D_SAE, seed=12)
    pre[2] = -5.0  # a row without active latents
    pre[3, 1] = float("nan")
    bar = random(D_SAE, seed=13) if per_latent else 0.5
    active = active_above(pre, bar)
    assert torch.equal(active.dense(), torch.where(pre > bar, pre, 0.0))
    assert torch.equal(active.rows, active.rows.sort().values)
    assert int((active.rows == 2).sum()) == 0


def test_active_above_with_a_bar_that_nothing_reaches() -> None:
    active = active_above(random(BATCH, D_SAE, seed=14), torch.tensor(float("inf")))
    assert active.values.numel() == 0
    assert torch.equal(active.decode(random(D_SAE, D_IN, seed=15)), torch.zeros(BATCH, D_IN))
    assert torch.equal(active.fire_counts(), torch.zeros(D_SAE, dtype=torch.int64))
