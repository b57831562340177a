"""Checks on a CUDA device: they fail, not skip, where there is none. `make gpu-check` runs them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.gpu.device import DEVICE

# cuBLAS looks at it when it starts: only then may its products be asked to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """TF32 would round the products' inputs to 10 bits."""
    assert DEVICE == "cpu" or torch.cuda.is_available(), "this check needs a CUDA device"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Only operators that give the same bits each time; others raise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
