"""On a GPU, Triton's sparse products run, give what PyTorch's give, and give the same bits each time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sae_job.saes.kernels.choice import forced_kernels, kernel_name, top_k_by, triton_trouble
from sae_job.saes.kernels.sparse import ActiveLatents, active_above, top_k
from tests.gpu.device import DEVICE
from tests.kernel_cases import FORMS, Form, active_latents, moved, random

# Tried with TRITON_INTERPRET=1 on a CPU, more would take minutes.
BATCH, D_SAE, K = (1536, 4096, 24) if DEVICE == "cuda" else (24, 100, 8)
# A multiple of a program's columns, and one that is not.
WIDTHS = [2304, 300]
TYPES = [torch.float32, torch.bfloat16]


def test_triton_runs() -> None:
    device = torch.device(DEVICE, torch.cuda.current_device()) if DEVICE == "cuda" else torch.device(DEVICE)
    assert triton_trouble(device) is None
    assert kernel_name(device) == "triton"


def large(form: str) -> ActiveLatents:
    """With one latent that is active on every row, as trained SAEs have: on a GPU its entries are summed in pieces."""
    pre = random(BATCH, D_SAE, seed=0).to(DEVICE)
    pre[:, 7] = 4.0
    if form == "regular":
        values, indices = pre.topk(K, dim=1)
        return ActiveLatents(indices, values, D_SAE)
    return active_above(pre, 2.0)


Product = Callable[[ActiveLatents, torch.Tensor, torch.Tensor], torch.Tensor]
# Each of: active latents; a table [d_sae, width]; rows [batch, width].
PRODUCTS: dict[str, Product] = {
    "decode": lambda active, table, rows: active.decode(table),
    "value_gradients": lambda active, table, rows: active.value_gradients(rows, table),
    "weight_gradient": lambda active, table, rows: active.weight_gradient(rows, active.values),
    "weight_gradients": lambda active, table, rows: torch.stack(
        active.weight_gradients((rows, active.values), (rows, active.values.square()))
    ),
    "sum_by_latent": lambda active, table, rows: active.sum_by_latent(active.values),
    "error": lambda active, table, rows: active.reconstruct(table, rows[0], rows, rows[:, 0]).error,
    "squares": lambda active, table, rows: active.reconstruct(table, rows[0], rows, rows[:, 0]).squares,
    "fused value_gradients": lambda active, table, rows: (
        active.reconstruct(table, rows[0], rows, rows[:, 0]).value_gradients
    ),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("form", ["regular", "ragged"])
@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_a_product_is_that_of_float64(name: str, form: str, width: int, dtype: torch.dtype) -> None:
    active = large(form)
    table, rows = (random(size, width, seed=size).to(DEVICE, dtype) for size in (D_SAE, BATCH))
    with forced_kernels("triton"):
        found = PRODUCTS[name](active, table, rows)
    exact = active.with_values(active.values.double())
    expected = PRODUCTS[name](exact, table.double(), rows.double())
    assert found.dtype == torch.float32 or (name == "value_gradients" and found.dtype == dtype)
    tolerance = 1e-5 if found.dtype == torch.float32 else 2**-7
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_rows_and_latents_without_entries(name: str, form: Form) -> None:
    active = moved(active_latents(form), DEVICE)
    table, rows = (random(size, 9, seed=size).to(DEVICE) for size in (active.d_sae, active.batch))
    with forced_kernels("triton"):
        found = PRODUCTS[name](active, table, rows)
    with forced_kernels("sparse"):
        expected = PRODUCTS[name](active, table, rows)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["regular", "ragged"])
@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_the_same_product_has_the_same_bits(name: str, form: str) -> None:
    """Without asking PyTorch for deterministic operators."""
    table, rows = (random(size, 2304, seed=size).to(DEVICE) for size in (D_SAE, BATCH))
    with forced_kernels("triton"):
        first = PRODUCTS[name](large(form), table, rows)
        for _ in range(5):
            assert torch.equal(PRODUCTS[name](large(form), table, rows), first)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("d_sae", "k"), [(16_384, 64), (65_536, 64), (5000, 128), (40, 1)])
def test_its_top_k_has_the_values_of_pytorchs(d_sae: int, k: int, dtype: torch.dtype) -> None:
    pre = random(64, d_sae, seed=1).to(DEVICE, dtype)
    pre[1] = pre[1].round()  # many ties
    with top_k_by("triton"):
        values, indices = top_k(pre, k)
    assert torch.equal(values.sort(dim=1, descending=True).values, pre.topk(k, dim=1).values)
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)
