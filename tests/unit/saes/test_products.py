"""Products in bfloat16: the operands are rounded, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sae_job.saes.products import products_in

CPU = torch.device("cpu")


def rounded(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16).to(torch.float64)


@pytest.fixture
def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 33, generator=generator), torch.randn(33, 5, generator=generator)
    return a, b, torch.randn(5, generator=generator)


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "@": lambda a, b, bias: a @ b + bias,
    "mm": lambda a, b, bias: torch.mm(a, b).add_(bias),
    "mm, out": lambda a, b, bias: torch.mm(a, b, out=torch.empty(7, 5)).add_(bias),
    "matmul": lambda a, b, bias: torch.matmul(a, b) + bias,
    "addmm": lambda a, b, bias: torch.addmm(bias, a, b),
    "addmm, out": lambda a, b, bias: torch.addmm(bias, a, b, out=torch.empty(7, 5)),
    "addmm_": lambda a, b, bias: bias.expand(7, 5).clone().addmm_(a, b),
    "addmm_ with factors": lambda a, b, bias: (2 * bias).expand(7, 5).clone().addmm_(a, b / 4, beta=0.5, alpha=4),
    "addmm with factors": lambda a, b, bias: torch.addmm(2 * bias, a, b / 4, beta=0.5, alpha=4),
    "linear": lambda a, b, bias: torch.nn.functional.linear(a, b.T.contiguous(), bias),
    "bmm": lambda a, b, bias: torch.bmm(a.unsqueeze(0), b.unsqueeze(0)).squeeze(0) + bias,
}


@pytest.mark.parametrize("form", list(FORMS))
def test_operands_are_rounded_and_results_are_float32(operands: tuple[Tensor, Tensor, Tensor], form: str) -> None:
    a, b, bias = operands
    expected = rounded(a) @ rounded(b) + bias.double()
    with products_in("bfloat16", CPU):
        found = FORMS[form](a, b, bias)
    assert found.dtype == torch.float32
    # A product is rounded once to 8 bits, where the device gives no float32 sums; the bias is added after that.
    tolerance = 2.0**-8 * (rounded(a) @ rounded(b)).abs() + 1e-6
    assert ((found.double() - expected).abs() <= tolerance).all()
    assert not torch.allclose(found, FORMS[form](a, b, bias), rtol=1e-6, atol=1e-6)


def test_out_is_what_is_written_to(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, bias = operands
    out = torch.empty(7, 5)
    with products_in("bfloat16", CPU):
        assert torch.addmm(bias, a, b, out=out) is out


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_others_leave_products_on_a_cpu_alone(operands: tuple[Tensor, Tensor, Tensor], precision: str) -> None:
    a, b, bias = operands
    plain = torch.addmm(bias, a, b)
    with products_in(precision, CPU):  # type: ignore[arg-type]
        assert torch.equal(torch.addmm(bias, a, b), plain)


def test_vectors_and_doubles_stay_exact(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, bias = operands
    plain, double = b @ bias, a.double() @ b.double()
    with products_in("bfloat16", CPU):
        assert torch.equal(b @ bias, plain)
        assert torch.equal(a.double() @ b.double(), double)


def test_traced_gradients_go_through_rounded_products_too(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, bias = operands
    b.requires_grad_()
    with products_in("bfloat16", CPU):
        torch.addmm(bias, a, b).sum().backward()
    assert b.grad is not None
    assert b.grad.dtype == torch.float32
    torch.testing.assert_close(b.grad, rounded(a).sum(dim=0).float().unsqueeze(1).expand(33, 5), rtol=2e-2, atol=2e-2)


def test_the_format_ends_with_the_block(operands: tuple[Tensor, Tensor, Tensor]) -> None:
    a, b, _ = operands
    plain = a @ b
    with pytest.raises(ZeroDivisionError), products_in("bfloat16", CPU):
        raise ZeroDivisionError
    assert torch.equal(a @ b, plain)
