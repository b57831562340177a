"""How an SAE's weights begin."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sae_operator.api.sae import Initialization

Activation = Callable[[Float32[Tensor, "rows d_sae"]], Float32[Tensor, "rows d_sae"]]

# Norm of the rows of the `heuristic` decoder.
_HEURISTIC_NORM = 0.1
# Rows of the sample on which the encoder's scale is fitted: one number needs no more.
_SCALE_ROWS = 4096
# Weiszfeld's iteration: distances below this count as this, and so many steps at most.
_SMALLEST_DISTANCE = 1e-6
_MEDIAN_STEPS = 100
_MEDIAN_TOLERANCE = 1e-10


@dataclass(frozen=True)
class InitialWeights:
    W_enc: Float32[Tensor, "d_in d_sae"]
    W_dec: Float32[Tensor, "d_sae d_in"]
    b_dec: Float32[Tensor, " d_in"]


def unit_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)


def geometric_median(points: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The point with the smallest sum of distances, by Weiszfeld's iteration in float64, begun at the mean."""
    points = points.to(torch.float64)
    median = points.mean(dim=0)
    before = math.inf
    for _ in range(_MEDIAN_STEPS):
        distances = torch.linalg.vector_norm(points - median, dim=1)
        total = float(distances.sum())
        if abs(before - total) <= _MEDIAN_TOLERANCE * total:
            break
        before = total
        weights = 1.0 / distances.clamp_min(_SMALLEST_DISTANCE)
        median = (points * weights.unsqueeze(1)).sum(dim=0) / weights.sum()
    return median


def decoder_bias(kind: str, sample: Float32[Tensor, "rows d_in"]) -> Float32[Tensor, " d_in"]:
    """Start of `b_dec` from activations as the encoder will see them."""
    if kind == "zeros":
        return torch.zeros_like(sample[0])
    if kind == "mean":
        return sample.mean(dim=0, dtype=torch.float64).to(torch.float32)
    return geometric_median(sample).to(torch.float32)


def kaiming_uniform(rows: int, columns: int, generator: torch.Generator) -> Float32[Tensor, "rows columns"]:
    """Uniform within sqrt(6 / fan_in), with fan_in the number of columns (He et al. 2015, eq. 10 with a = 0)."""
    bound = math.sqrt(6 / columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def decoder_rows(
    kind: str,
    sample: Float32[Tensor, "rows d_in"],
    bias: Float32[Tensor, " d_in"],
    d_sae: int,
    generator: torch.Generator,
) -> Float32[Tensor, "d_sae d_in"]:
    """Start of `W_dec`, on the CPU.

    `mixed` is a random activation's direction from the bias plus a random direction: a row then points at data
    without being a copy of one activation.
    """
    d_in = sample.shape[1]
    if kind == "kaiming_uniform":
        return kaiming_uniform(d_sae, d_in, generator)
    if kind == "orthogonal":
        # W_dec^T W_dec = I where d_sae >= d_in; more latents than dimensions cannot be orthogonal to each other.
        wide = torch.randn(max(d_sae, d_in), min(d_sae, d_in), generator=generator)
        rows, triangle = torch.linalg.qr(wide)
        rows = rows * torch.sgn(torch.diagonal(triangle))  # without this, signs are not uniform
        return (rows if d_sae >= d_in else rows.T).contiguous()
    random = unit_rows(torch.randn(d_sae, d_in, generator=generator))
    if kind == "heuristic":
        return random * _HEURISTIC_NORM
    chosen = torch.randint(sample.shape[0], (d_sae,), generator=generator)
    directions = unit_rows((sample.index_select(0, chosen.to(sample.device)) - bias).cpu())
    return unit_rows(directions + random)


def encoder_scale(
    sample: Float32[Tensor, "rows d_in"],
    bias: Float32[Tensor, " d_in"],
    W_dec: Float32[Tensor, "d_sae d_in"],
    *,
    apply_b_dec_to_input: bool,
    activation: Activation,
) -> float:
    """The factor s for which `W_enc = s W_dec^T` reconstructs the sample best: least squares in one unknown."""
    rows = sample[:_SCALE_ROWS]
    target = rows - bias
    features = activation((target if apply_b_dec_to_input else rows) @ W_dec.T)
    reconstruction = features @ W_dec
    squared = float((reconstruction * reconstruction).sum(dtype=torch.float64))
    return float((target * reconstruction).sum(dtype=torch.float64)) / squared if squared > 0 else 1.0


def initial_weights(
    settings: Initialization,
    sample: Float32[Tensor, "rows d_in"],
    *,
    d_sae: int,
    normalize_decoder: bool,
    apply_b_dec_to_input: bool,
    activation: Activation,
    generator: torch.Generator,
) -> InitialWeights:
    """Weights to begin with; encoder biases are zero.

    Args:
        settings: the SAE's `initialization`.
        sample: activations as the encoder will see them (scaled).
        normalize_decoder: bring the decoder's rows to unit norm.
        activation: the architecture's activation function, for the encoder's scale.
        generator: source of all randomness, on the CPU.
    """
    bias = decoder_bias(settings.decoder_bias, sample)
    W_dec = decoder_rows(settings.decoder, sample, bias, d_sae, generator).to(sample.device)
    if settings.encoder == "kaiming_uniform":
        W_enc = kaiming_uniform(sample.shape[1], d_sae, generator).to(sample.device)
    else:
        # Copied before the decoder is normalised, so at the decoder's own scale.
        W_enc = W_dec.T.clone()
    if normalize_decoder:
        W_dec = unit_rows(W_dec)
    if settings.encoder == "scaled_transpose":
        scale = encoder_scale(sample, bias, W_dec, apply_b_dec_to_input=apply_b_dec_to_input, activation=activation)
        W_enc = W_dec.T * scale
    return InitialWeights(W_enc=W_enc, W_dec=W_dec, b_dec=bias)
