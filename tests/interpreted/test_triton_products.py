"""Triton's sparse products, run by its interpreter, give what PyTorch's operators give in float64.

Triton decides when it is first imported whether it interprets, so that these tests need a process of their own, with
TRITON_INTERPRET=1: `tests/unit/saes/test_kernels_triton.py` starts it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from sae_job.saes.kernels import triton_products
from sae_job.saes.kernels.choice import forced_kernels, rounded_operands
from sae_job.saes.kernels.sparse import ActiveLatents, active_above
from tests.kernel_cases import BATCH, D_SAE, FORMS, active_latents, random

# Below one block of columns; above one, with a part of a block left. Each in one type: the interpreter is slow.
OPERANDS = {"width 7, bfloat16": (7, torch.bfloat16), "width 300, float32": (300, torch.float32)}
assert triton_products.COLUMNS < 300
# Sums of at most 37 products (300 for gradients of activations) rounded to 24 bits.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    assert os.environ.get("TRITON_INTERPRET") == "1", "start these with TRITON_INTERPRET=1"
    with forced_kernels("triton"):
        yield


@pytest.fixture(params=FORMS)
def active(request: pytest.FixtureRequest) -> ActiveLatents:
    return active_latents(request.param)


@pytest.fixture(params=sorted(OPERANDS))
def operands(request: pytest.FixtureRequest) -> tuple[int, torch.dtype]:
    """Width and type of weights, and of rows."""
    return OPERANDS[request.param]


def exact(active: ActiveLatents) -> ActiveLatents:
    """In float64, which PyTorch's operators take and Triton's products do not."""
    return active.with_values(active.values.double())


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    assert torch.allclose(found.double(), expected, rtol=0, atol=TOLERANCE * max(scale, 1.0))


def test_decode(active: ActiveLatents, operands: tuple[int, torch.dtype]) -> None:
    width, dtype = operands
    weight = random(D_SAE, width, seed=2).to(dtype)
    assert_close(active.decode(weight), exact(active).decode(weight.double()))


def test_value_gradients(active: ActiveLatents, operands: tuple[int, torch.dtype]) -> None:
    width, dtype = operands
    weight, gradient = random(D_SAE, width, seed=3).to(dtype), random(BATCH, width, seed=4)
    expected = exact(active).value_gradients(gradient.double(), weight.double())
    assert_close(active.value_gradients(gradient, weight), expected)


def test_weight_gradient(active: ActiveLatents, operands: tuple[int, torch.dtype]) -> None:
    width, dtype = operands
    rows = random(BATCH, width, seed=5).to(dtype)
    expected = exact(active).weight_gradient(rows.double(), active.values.double())
    assert_close(active.weight_gradient(rows, active.values), expected)


def test_both_weight_gradients_in_one_pass(active: ActiveLatents, operands: tuple[int, torch.dtype]) -> None:
    """The encoder's input and the decoder's output may differ in width, as a transcoder's do."""
    width, dtype = operands
    first, second = random(BATCH, width, seed=6).to(dtype), random(BATCH, width // 2, seed=7)
    other_values = random(len(active.rows), seed=8).view(active.shape)
    of_first, of_second = active.weight_gradients((first, active.values), (second, other_values))
    assert_close(of_first, exact(active).weight_gradient(first.double(), active.values.double()))
    assert_close(of_second, exact(active).weight_gradient(second.double(), other_values.double()))


def test_reconstruct(active: ActiveLatents, operands: tuple[int, torch.dtype]) -> None:
    width, dtype = operands
    weight, target = random(D_SAE, width, seed=9).to(dtype), random(BATCH, width, seed=10).to(dtype)
    bias, factors = random(width, seed=11), random(BATCH, seed=12).abs()
    found = active.reconstruct(weight, bias, target, factors)
    expected = exact(active).reconstruct(weight.double(), bias.double(), target.double(), factors.double())
    for name in ("error", "squares", "value_gradients"):
        assert_close(getattr(found, name), getattr(expected, name))


def test_sum_by_latent(active: ActiveLatents) -> None:
    assert_close(active.sum_by_latent(active.values), active.dense().double().sum(dim=0))


def test_sixteen_bit_operands_alone_give_sixteen_bits() -> None:
    active = active_latents("ragged")
    active = active.with_values(active.values.bfloat16())
    weight = random(D_SAE, 7, seed=13).bfloat16()
    found, expected = active.decode(weight), exact(active).decode(weight.double())
    assert found.dtype == torch.bfloat16
    # The interpreter cuts digits off where a GPU rounds: one unit in the last of 8 bits instead of half of one.
    assert torch.allclose(found.double(), expected, rtol=2**-7, atol=TOLERANCE)


def test_the_order_of_a_sum_follows_from_the_places_alone() -> None:
    active, rows = active_latents("ragged"), random(BATCH, 300, seed=14)
    assert torch.equal(active.weight_gradient(rows, active.values), active.weight_gradient(rows, active.values))
    pair = active.weight_gradients((rows, active.values), (rows, active.values))
    assert torch.equal(pair[0], active.weight_gradient(rows, active.values))
    assert torch.equal(pair[0], pair[1])


def test_rounded_operands_are_those_alone_that_are_read_row_by_row() -> None:
    """Weights, inputs and gradients; not activations, biases, targets, or sums."""
    active = active_latents("ragged")
    weight, rows, target = random(D_SAE, 9, seed=15), random(BATCH, 9, seed=16), random(BATCH, 9, seed=17)
    bias, factors = random(9, seed=18), random(BATCH, seed=19)
    rounded = weight.bfloat16()
    with rounded_operands(True):
        assert torch.equal(active.decode(weight), active.decode(rounded))
        assert torch.equal(active.value_gradients(rows, weight), active.value_gradients(rows, rounded))
        gradient = active.weight_gradient(rows, active.values)
        found = active.reconstruct(weight, bias, target, factors)
        with rounded_operands(False):
            expected = active.reconstruct(rounded, bias, target, factors)
            assert torch.equal(gradient, active.weight_gradient(rows.bfloat16(), active.values))
            assert not torch.equal(active.decode(weight), active.decode(rounded))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_latents_with_many_entries_are_summed_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent 3 is active on all rows, latent 5 on half of them, the others on few or none."""
    monkeypatch.setattr(triton_products, "PIECE", piece)
    pre = random(20, 16, seed=20) - 2
    pre[:, 3] = 1.0
    pre[::2, 5] = 2.0
    active = active_above(pre, 0.0)
    first, second = random(20, 300, seed=21), random(20, 9, seed=22)
    of_first, of_second = active.weight_gradients((first, active.values), (second, active.values))
    assert_close(of_first, exact(active).weight_gradient(first.double(), active.values.double()))
    assert_close(of_second, exact(active).weight_gradient(second.double(), active.values.double()))
    assert torch.equal(active.weight_gradient(first, active.values), of_first)
