"""The sparse products equal their dense twins, and the two-stage top-k is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_job.saes.kernels.sparse import ActiveLatents, top_k


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


@pytest.fixture
def dense() -> tuple[torch.Tensor, ActiveLatents, torch.Tensor]:
    """Features [6, 40] with 4 places per row, some of them zero; the same as active latents; and a weight matrix."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(40, generator=generator)[:4] for _ in range(6)])
    values = torch.randn(6, 4, generator=generator).relu()
    features = torch.zeros(6, 40).scatter(1, indices, values)
    return features, ActiveLatents(indices, values, 40), torch.randn(40, 7, generator=generator)


def test_decode(dense: tuple[torch.Tensor, ActiveLatents, torch.Tensor]) -> None:
    features, active, weight = dense
    assert torch.allclose(active.decode(weight), features @ weight, atol=1e-6)


def test_weight_gradient(dense: tuple[torch.Tensor, ActiveLatents, torch.Tensor]) -> None:
    features, active, _ = dense
    rows = torch.randn(6, 7, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(active.weight_gradient(rows, active.values), features.T @ rows, atol=1e-6)


def test_value_gradients(dense: tuple[torch.Tensor, ActiveLatents, torch.Tensor]) -> None:
    _, active, weight = dense
    gradient = torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    expected = (gradient @ weight.T).gather(1, active.indices)
    assert torch.allclose(active.value_gradients(gradient, weight), expected, atol=1e-6)


def test_sums_and_counts_by_latent(dense: tuple[torch.Tensor, ActiveLatents, torch.Tensor]) -> None:
    features, active, _ = dense
    assert torch.allclose(active.sum_by_latent(active.values), features.sum(dim=0), atol=1e-6)
    assert torch.equal(active.fire_counts(), (features > 0).sum(dim=0))
