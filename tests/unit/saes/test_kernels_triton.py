"""Triton's products: right under its interpreter, and compiled for a GPU without one. How they run on a GPU,
`make gpu-check` tells."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.saes.kernels.choice import (
    TOP_K_VARIABLE,
    forced_kernels,
    kernel_name,
    takes_triton,
    top_k_kernel,
    triton_trouble,
)
from sae_job.saes.kernels.sparse import ActiveLatents
from tests.kernel_cases import active_latents, random
from tests.testbed.paths import CHECKOUT


def test_the_interpreter_gives_what_pytorch_gives() -> None:
    """In a process of its own: whether Triton interprets is decided when it is first imported."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# Each kernel's arguments: F are float32, W the weights' or rows' type, P the places' int64, N widths.
F, W, P, N = "*fp32", "weights", "*i64", "i32"
TILE = {"ENTRIES": 16, "COLUMNS": 256}
KERNELS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "decode_kernel": ({"out": F, "weight": W, "latents": P, "values": F, "starts": P, "width": N}, TILE),
    "value_gradients_kernel": ({"out": F, "gradient": F, "weight": W, "latents": P, "starts": P, "width": N}, TILE),
    "reconstruct_kernel": (
        {"error": F, "squares": F, "value_gradient": F, "weight": W, "bias": F, "target": W, "factors": F}
        | {"latents": P, "values": F, "starts": P, "width": N},
        TILE,
    ),
    "weight_gradients_kernel": (
        {"first_out": F, "second_out": F, "first_rows": W, "second_rows": W, "first_values": F, "second_values": F}
        | {"order": P, "row_of": P, "begins": P, "ends": P, "first_width": N, "second_width": N},
        {"TWO": True} | TILE,
    ),
    "join_pieces_kernel": ({"out": W, "partial": F, "latents": P, "numbers": P, "width": N}, {"COLUMNS": 256}),
    "row_top_k_kernel": (
        {"values": W, "indices": P, "pre": W, "d_sae": N, "k": N},
        {"ROW": 16_384, "BLOCK": 2048},
    ),
    "sum_by_latent_kernel": ({"out": F, "values": F, "order": P, "starts": P}, {"ENTRIES": 128}),
}


@pytest.mark.parametrize("weights", ["*fp32", "*bf16"])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_a_kernel_compiles_for_an_h100(
    name: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, by the assembler that comes with Triton; tiles are read 16 bytes at a time."""
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    modules = [pytest.importorskip(f"sae_job.saes.kernels.triton_{name}") for name in ("products", "top_k")]
    arguments, constants = KERNELS[name]
    (kernel,) = (getattr(module, name) for module in modules if hasattr(module, name))
    if name == "row_top_k_kernel":
        constants = constants | {"IS_FLOAT32": weights == "*fp32", "BITS": 32 if weights == "*fp32" else 16}
    signature = {argument: weights if kind == W else kind for argument, kind in arguments.items()}
    signature |= dict.fromkeys(constants, "constexpr")
    # PyTorch's memory begins at multiples of 256, and widths of models are multiples of 16.
    aligned = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in arguments}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=target)
    assert len(compiled.asm["cubin"]) > 0
    if {"ENTRIES", "COLUMNS"} <= constants.keys():
        assert re.search(r"ld\.global\.v4\.b32", compiled.asm["ptx"])


def test_a_cpu_has_pytorchs_operators() -> None:
    assert kernel_name(torch.device("cpu")) == "sparse"


def test_the_top_k_is_pytorchs_unless_tritons_is_asked_for_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    with forced_kernels("triton"):
        assert top_k_kernel(device) == "torch"
        monkeypatch.setenv(TOP_K_VARIABLE, "triton")
        assert top_k_kernel(device) == "triton"
    assert top_k_kernel(device) == "torch"


def test_float64_is_never_tritons() -> None:
    with forced_kernels("triton"):
        assert takes_triton(random(2, 2, seed=0))
        assert not takes_triton(random(2, 2, seed=0), random(2, 2, seed=0).double())


def test_where_triton_does_not_run_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "sae_job.saes.kernels.triton_products", None)
    triton_trouble.cache_clear()
    with caplog.at_level(logging.WARNING):
        trouble = triton_trouble(torch.device("cpu"))
    triton_trouble.cache_clear()
    assert trouble is not None
    assert "ModuleNotFoundError" in trouble
    assert trouble in caplog.text


@pytest.mark.parametrize("form", ["regular", "ragged"])
def test_pytorchs_path_has_the_fused_products_too(form: Any) -> None:
    active: ActiveLatents = active_latents(form)
    weight, bias, target = random(active.d_sae, 5, seed=1), random(5, seed=2), random(active.batch, 5, seed=3)
    factors = torch.full((active.batch,), 0.5)
    found = active.reconstruct(weight, bias, target, factors)
    error = active.dense() @ weight + bias - target
    assert torch.allclose(found.error, error, atol=1e-5)
    assert torch.allclose(found.squares, error.square().sum(dim=1), atol=1e-4)
    assert torch.allclose(found.value_gradients, active.value_gradients(error * 0.5, weight), atol=1e-4)
    first, second = active.weight_gradients((error, active.values), (target, found.value_gradients))
    assert torch.equal(first, active.weight_gradient(error, active.values))
    assert torch.equal(second, active.weight_gradient(target, found.value_gradients))
