"""Triton's top-k, run by its interpreter, is exact. It needs a process of its own: see `test_triton_products.py`."""

from __future__ import annotations

import os

import pytest
import torch

from sae_job.saes.kernels.choice import top_k_by
from sae_job.saes.kernels.sparse import top_k
from sae_job.saes.kernels.triton_top_k import BLOCK, LARGEST_K, LARGEST_ROW, takes
from tests.kernel_cases import random


def rows(kind: str, d_sae: int) -> torch.Tensor:
    pre = random(3, d_sae, seed=d_sae)
    if kind == "many ties":
        return pre.round()
    if kind == "all equal":
        return torch.full_like(pre, -1.0)
    if kind == "negative":
        return pre.abs().neg()
    if kind == "infinite":
        pre[:, 0], pre[:, -1] = float("-inf"), float("inf")
    return pre


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["random", "many ties", "all equal", "negative", "infinite"])
@pytest.mark.parametrize(("d_sae", "k"), [(1, 1), (40, 7), (64, 64), (BLOCK + 77, LARGEST_K)])
def test_it_has_the_same_values_as_a_sort(d_sae: int, k: int, kind: str, dtype: torch.dtype) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "start these with TRITON_INTERPRET=1"
    pre = rows(kind, d_sae).to(dtype)
    with top_k_by("triton"):
        values, indices = top_k(pre, k)
    assert torch.equal(values.sort(dim=1, descending=True).values, pre.sort(dim=1, descending=True).values[:, :k])
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)


def test_of_equal_entries_the_first_are_taken() -> None:
    pre = torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0]])
    with top_k_by("triton"):
        _, indices = top_k(pre, 3)
    assert indices.tolist() == [[1, 4, 0]]


def test_what_does_not_fit_is_pytorchs() -> None:
    assert takes(torch.zeros(1, 1000), LARGEST_K)
    assert not takes(torch.zeros(1, 1000), LARGEST_K + 1)
    assert not takes(torch.zeros(1, LARGEST_ROW + 1), 4)
    assert not takes(torch.zeros(1, 1000, dtype=torch.float64), 4)
    with top_k_by("triton"):
        values, _ = top_k(torch.arange(1000.0).unsqueeze(0), LARGEST_K + 1)
    assert float(values.min()) == 1000 - LARGEST_K - 1
