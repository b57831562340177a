"""The parts of a TopK step on a device, each timed alone, beside the time that no implementation can be below."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from sae_job.saes.kernels.choice import kernel_name, rounded_operands, top_k_by
from sae_job.saes.kernels.selection import pre_activations
from sae_job.saes.kernels.sparse import ActiveLatents, top_k
from sae_job.saes.step_memory import StepMemory


@dataclass(frozen=True)
class Shape:
    """Of a step: activations of width `d_in`, `d_sae` latents of which `k` are active, `batch` rows."""

    d_in: int
    d_sae: int
    k: int
    batch: int


@dataclass(frozen=True)
class Device:
    """What a device was measured to do.

    Attributes:
        bytes_per_second: of a copy, read and written.
        operations_per_second: of a product of square bfloat16 matrices.
    """

    device: torch.device
    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True)
class Part:
    """Milliseconds that a part takes, and its floor; None of what is not part of our step, but might be."""

    name: str
    milliseconds: float
    floor: float | None


def seconds_of(work: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Median of three turns of `repeats` calls, after one that warms up."""

    def turn() -> float:
        before = time.perf_counter()
        for _ in range(repeats):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - before) / repeats

    turn()
    return median(turn() for _ in range(3))


def measured_device(device: torch.device, *, repeats: int) -> Device:
    size, side = (2**30, 8192) if device.type == "cuda" else (2**25, 512)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, device=device).bfloat16()
    product = torch.empty_like(matrix)
    copying = seconds_of(lambda: target.copy_(source), device, repeats=repeats)
    multiplying = seconds_of(lambda: torch.mm(matrix, matrix, out=product), device, repeats=repeats)
    return Device(device, 2 * size / copying, 2 * side**3 / multiplying)


@torch.no_grad()
def parts_of_a_step(shape: Shape, on: Device, *, repeats: int) -> list[Part]:
    """Of ours, on random weights and activations, with bfloat16 operands.

    The floors: the product at the measured rate; top-k reads pre-activations once, after they were written once;
    every active latent's weights are read once for decoding and its gradient, and each of its rows once for each
    weight gradient, which are written once, all from memory, so that a cache large enough can beat it; Adam reads
    weight, gradient and two moments, and writes all but the gradient.
    """
    device, generator = on.device, torch.Generator(on.device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    x, W_enc_T, W_dec = (
        random(shape.batch, shape.d_in),
        random(shape.d_sae, shape.d_in),
        random(shape.d_sae, shape.d_in),
    )
    b_enc, b_dec = torch.zeros(shape.d_sae, device=device), torch.zeros(shape.d_in, device=device)
    memory = StepMemory()
    pre = pre_activations(x, W_enc_T, b_enc, memory, rounded=True)
    values, indices = top_k(pre, shape.k)
    values = values.float()
    factors = torch.full((shape.batch,), 2 / shape.batch, device=device)
    found = ActiveLatents(indices, values, shape.d_sae).reconstruct(W_dec, b_dec, x, factors)

    def both_weight_gradients() -> object:
        # Made anew each time: sorting the entries by latent is part of it.
        active = ActiveLatents(indices, values, shape.d_sae)
        return active.weight_gradients((found.error, values), (x, found.value_gradients))

    weights = [W_enc_T.requires_grad_(), W_dec.requires_grad_()]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    adam = torch.optim.Adam(weights, lr=1e-4, fused=True)

    entries, pre_size, weight_size = shape.batch * shape.k, pre.numel(), W_enc_T.numel()
    moved = {
        "top-k": 2 * 2 * pre_size,
        "decode and value gradients": 2 * entries * shape.d_in,
        "weight gradients": 2 * 2 * entries * shape.d_in + 2 * 4 * weight_size,
        "Adam": 7 * 4 * 2 * weight_size,
    }
    floors = {name: size / on.bytes_per_second for name, size in moved.items()}
    floors["encoder product"] = 2 * pre_size * shape.d_in / on.operations_per_second
    work: dict[str, Callable[[], object]] = {
        "encoder product": lambda: pre_activations(x, W_enc_T, b_enc, memory, rounded=True),
        "top-k": lambda: top_k(pre, shape.k),
        "decode and value gradients": lambda: ActiveLatents(indices, values, shape.d_sae).reconstruct(
            W_dec, b_dec, x, factors
        ),
        "weight gradients": both_weight_gradients,
        "Adam": adam.step,
    }
    with rounded_operands(True):
        parts = [
            Part(name, 1e3 * seconds_of(part, device, repeats=repeats), 1e3 * floors[name])
            for name, part in work.items()
        ]
        if kernel_name(device) == "triton":
            with top_k_by("triton"):
                seconds = seconds_of(work["top-k"], device, repeats=repeats)
            parts.append(Part("top-k in Triton, which is off", 1e3 * seconds, None))
    return parts


def print_parts(parts: list[Part], device: torch.device) -> None:
    print(f"  parts of our step ({kernel_name(device)} products){'ms':>12} {'floor':>9} {'ratio':>7}")
    for part in parts:
        beside = "" if part.floor is None else f" {part.floor:9.3f} {part.milliseconds / part.floor:7.2f}"
        print(f"    {part.name:<36} {part.milliseconds:10.3f}{beside}")
