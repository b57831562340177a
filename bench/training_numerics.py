"""Whether the sides of the training benchmark compute the same: loss and gradients of the first batch."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.worker import Worker

# Relative difference of gradients in float32, whatever the order of summation.
TOLERANCE = 1e-3
# How far from the wanted level a gap is searched for: it moves the number of active latents by little.
_NEAR = 2e-3
# What a side defines otherwise, and is not compared: (architecture, side) -> why, and names.
DIFFERENT = {
    ("gated", "saelens"): (
        "its auxiliary loss also moves the decoder, which the paper holds fixed",
        ("W_dec", "b_dec"),
    ),
    ("jumprelu", "dictionary_learning"): (
        "its penalty is the squared distance of L0 from a target, and b_dec is not subtracted from the input",
        ("loss", "threshold", "b_dec"),
    ),
}
# What a side's loss is divided by where it takes a mean of what others sum: of the means of prefixes, weighted.
DIVISORS = {("matryoshka_batchtopk", "dictionary_learning"): 25.0}


def start_weights(architecture: str, d_in: int, d_sae: int, batch: int, batches: int) -> dict[str, Tensor]:
    """Weights as training begins with, and batches of random activations."""
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    start = {
        "W_enc": (0.5 * W_dec.T).contiguous(),
        "W_dec": W_dec,
        # One library does not subtract it from the input of a JumpReLU SAE; without it, that is the same.
        "b_dec": (0.0 if architecture == "jumprelu" else 0.1) * torch.randn(d_in, generator=generator),
        "batches": torch.randn(batches, batch, d_in, generator=generator),
    }
    names = ("b_gate", "r_mag", "b_mag") if architecture == "gated" else ("b_enc",)
    start |= {name: torch.zeros(d_sae) for name in names}
    if architecture == "jumprelu":
        start["threshold"] = torch.full((d_sae,), 0.01)
    return start


def make_sparse(start: dict[str, Tensor], active: int) -> None:
    """Lower the encoder's biases until about so many latents are active on a row.

    The bias lies where the pre-activations of the first batch leave the widest gap: one that came to zero but for
    rounding would be active for one side and not for another.
    """
    pre = ((start["batches"][0] - start["b_dec"]) @ start["W_enc"]).flatten()
    few = pre[: 256 * start["W_dec"].shape[0]].sort().values
    level = float(few[-active * 256])
    near = pre[(pre - level).abs() < _NEAR].sort().values
    widest = int(near.diff().argmax())
    level = float(near[widest] + near[widest + 1]) / 2
    for name in ("b_enc", "b_gate", "b_mag"):
        if name in start:
            start[name] -= level


def check_numerics(workers: list[Worker], folder: Path, architecture: str, W_dec: Tensor) -> None:
    """Raises `RuntimeError` where a side's loss or gradients are not ours.

    Of the decoder's gradient without its part along the rows `W_dec`, which have unit norm: some sides penalize
    activations times that norm, some keep rows there, and neither moves a row otherwise.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for worker in workers:
        path = folder / f"{worker.name}.safetensors"
        worker.ask(f"gradients {path}")
        gradients = load_file(path)
        gradients["W_dec"] -= torch.linalg.vecdot(gradients["W_dec"], W_dec).unsqueeze(1) * W_dec
        found[worker.name] = gradients
    ours = found.pop("ours")
    for side, theirs in found.items():
        why, different = DIFFERENT.get((architecture, side), ("", ()))
        factor = DIVISORS.get((architecture, side), 1.0)
        for name, tensor in ours.items():
            if name in different:
                continue
            error = float(torch.linalg.vector_norm(factor * theirs[name] - tensor) / torch.linalg.vector_norm(tensor))
            print(f"  {side:<20} {name:<10} relative difference {error:.1e}")
            if not error <= TOLERANCE:
                raise RuntimeError(f"{side} computes another {name}: the steps cannot be compared")
        if different:
            print(f"  {side:<20} not compared: {', '.join(different)}: {why}")
