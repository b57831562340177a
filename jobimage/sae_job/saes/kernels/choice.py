"""Which implementation of the sparse products runs: Triton's on a CUDA device where it works, else PyTorch's."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Kernels = Literal["triton", "sparse"]
TopKKernel = Literal["triton", "torch"]

_log = logging.getLogger(__name__)
_forced: ContextVar[Kernels | None] = ContextVar("forced_kernels", default=None)
_rounded: ContextVar[bool] = ContextVar("rounded_operands", default=False)
# Triton's top-k has not run on a GPU yet: PyTorch's stays in use until somebody asks for the other, in a job by
# `run.env`.
TOP_K_VARIABLE = "SAE_JOB_TOP_K"
_top_k: ContextVar[TopKKernel | None] = ContextVar("top_k_kernel", default=None)
# What Triton's kernels load, and sum in float32. Others, such as the float64 of a check, are PyTorch's.
_TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def kernel_name(device: torch.device) -> Kernels:
    """The implementation that a device gets: `triton`, or `sparse`, which is public PyTorch operators."""
    forced = _forced.get()
    if forced is not None:
        return forced
    return "triton" if device.type == "cuda" and triton_trouble(device) is None else "sparse"


def takes_triton(*tensors: Tensor) -> bool:
    """Whether a product of these tensors is Triton's."""
    return kernel_name(tensors[0].device) == "triton" and all(tensor.dtype in _TYPES for tensor in tensors)


@contextmanager
def forced_kernels(name: Kernels) -> Iterator[None]:
    """Inside, one implementation serves whatever the device: for checks that compare the two."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def rounded_operands(rounded: bool) -> Iterator[None]:
    """Inside, Triton's products read their large operands in bfloat16, or, if not `rounded`, as they are.

    What these products cost is the reading of rows of weights, inputs and gradients: half the bytes are half the
    time. Sums stay float32. PyTorch's operators, which take one type only, would round their sums as well: they are
    left alone.
    """
    token = _rounded.set(rounded)
    try:
        yield
    finally:
        _rounded.reset(token)


def operand(tensor: Tensor) -> Tensor:
    """A large operand of a Triton product, in the format that it is to be read in."""
    return tensor.to(torch.bfloat16) if _rounded.get() and tensor.dtype == torch.float32 else tensor


def top_k_kernel(device: torch.device) -> TopKKernel:
    """Whose top-k of rows a device gets: PyTorch's, unless Triton's is asked for and Triton runs."""
    chosen = _top_k.get()
    if chosen is None:
        asked = os.environ.get(TOP_K_VARIABLE) == "triton"
        return "triton" if asked and kernel_name(device) == "triton" else "torch"
    return chosen


@contextmanager
def top_k_by(kernel: TopKKernel) -> Iterator[None]:
    """Inside, this one finds the k largest entries of rows, where it can: for checks and measurements."""
    token = _top_k.set(kernel)
    try:
        yield
    finally:
        _top_k.reset(token)


@lru_cache
def triton_trouble(device: torch.device) -> str | None:
    """What keeps Triton from running on a CUDA device, found by running a small product; None where it works.

    It compiles a C module for the driver when it first runs. Without a compiler, and without the module that the image
    brings (`triton_driver`), PyTorch's operators serve, and the log says so.
    """
    # Whatever fails in here (import, compiler, driver, a device that is too old), there is another implementation.
    try:
        importlib.import_module("sae_job.saes.kernels.triton_driver").use_built_module()
        products = importlib.import_module("sae_job.saes.kernels.triton_products")
        weight = torch.arange(6.0, device=device).view(3, 2)
        latents, starts = torch.tensor([2, 0], device=device), torch.tensor([0, 2], device=device)
        found = products.decode(weight, latents, torch.tensor([1.0, 0.5], device=device), starts)
    except Exception as error:  # noqa: BLE001
        trouble = f"{type(error).__name__}: {error}"
    else:
        trouble = None if found.tolist() == [[4.0, 5.5]] else f"a product came out as {found.tolist()}"
    if trouble is not None:
        _log.warning("Triton does not run on %s, so that steps are slower: %s", device, trouble)
    return trouble
