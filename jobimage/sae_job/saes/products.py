"""The dense products of a step in the number format that `training.precision` asks for.

Autocast would give results in bfloat16, which sums and losses would go on with, and it leaves products with `out=`
alone. Here a product's operands are rounded, and its result is float32: nothing else of a step changes its format,
and no loss scaling is needed, since bfloat16 has the exponents of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sae_job.saes.kernels.choice import rounded_operands

Precision = Literal["float32", "tf32", "bfloat16"]


def bfloat16_product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`a @ b` of operands rounded to bfloat16, summed and given in float32 where the device can, else rounded once."""
    left, right = a.to(torch.bfloat16), b.to(torch.bfloat16)
    if a.is_cuda and a.ndim == b.ndim == 2 and not torch.is_grad_enabled():
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    product = torch.matmul(left, right)
    return product.to(a.dtype) if out is None else out.copy_(product)


def _is_dense(*operands: Any) -> bool:
    """Whether these are matrices of float32: vectors' products take no time, and bfloat16 stays what it is."""
    return all(isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and tensor.ndim >= 2 for tensor in operands)


def _matmul(plain: Callable[..., Tensor], a: Any, b: Any, *, out: Tensor | None = None) -> Tensor:
    if not _is_dense(a, b):
        return plain(a, b) if out is None else plain(a, b, out=out)
    return bfloat16_product(a, b, out=out)


def _addmm(
    plain: Callable[..., Tensor], bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1, out: Any = None
) -> Tensor:
    if not _is_dense(a, b):
        return plain(bias, a, b, beta=beta, alpha=alpha, **({} if out is None else {"out": out}))
    product = bfloat16_product(a, b, out=out)
    if alpha != 1:
        product = product.mul_(alpha) if out is not None else product * alpha
    if beta == 0:
        return product
    return torch.add(product, bias, alpha=beta, out=out) if out is not None else torch.add(product, bias, alpha=beta)


def _addmm_(plain: Callable[..., Tensor], bias: Tensor, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not _is_dense(a, b):
        return plain(bias, a, b, beta=beta, alpha=alpha)
    return (bias if beta == 1 else bias.mul_(beta)).add_(bfloat16_product(a, b), alpha=alpha)


def _linear(plain: Callable[..., Tensor], x: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
    if not _is_dense(x, weight):
        return plain(x, weight, bias)
    product = bfloat16_product(x, weight.mT)
    return product if bias is None else product + bias


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.mm: _matmul,
    torch.bmm: _matmul,
    torch.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.bmm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.Tensor.addmm_: _addmm_,
    torch.nn.functional.linear: _linear,
}


class _Bfloat16Products(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacement = _PRODUCTS.get(func)
        if replacement is None:
            return func(*args, **(kwargs or {}))
        return replacement(func, *args, **(kwargs or {}))


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def products_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Within it, products of float32 matrices are computed in this format, wherever torch is called for them.

    - `float32`: as they are.
    - `tf32`: operands with 10 bits of mantissa on a GPU that has it; on a CPU as they are.
    - `bfloat16`: operands with 7 bits, of Triton's sparse products too.

    Products with a vector, sums and everything else stay float32.

    Args:
        device: where the tensors lie; only its type counts.
    """
    if precision == "bfloat16":
        with _Bfloat16Products(), rounded_operands(True):
            yield
    elif precision == "tf32" and device.type == "cuda":
        with _tf32():
            yield
    else:
        yield
