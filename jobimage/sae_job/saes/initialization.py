"""How an SAE's weights begin."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sae_operator.api.sae import DecoderStart, SaeSpec

Activation = Callable[[Float32[Tensor, "rows d_sae"]], Float32[Tensor, "rows d_sae"]]

# Norm of the rows of the `heuristic` decoder.
_HEURISTIC_NORM = 0.1
# Rows of the sample on which the encoder's scale is fitted: one number needs no more.
_SCALE_ROWS = 4096
# So many of them at a time: there are some arrays of [rows, d_sae], which must not take more than a step's.
_ROWS_AT_A_TIME = 512
# Weiszfeld's iteration: distances below this count as this, and so many steps at most.
_SMALLEST_DISTANCE = 1e-6
_MEDIAN_STEPS = 100
_MEDIAN_TOLERANCE = 1e-10


@dataclass(frozen=True)
class InitialWeights:
    W_enc: Float32[Tensor, "d_in d_sae"]
    W_dec: Float32[Tensor, "d_sae d_out"]
    b_dec: Float32[Tensor, " d_out"]
    encoder_bias: Float32[Tensor, " d_sae"]


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


def starting_rows(
    kind: DecoderStart,
    sample: Float32[Tensor, "rows d"],
    centre: Float32[Tensor, " d"],
    chosen: Int64[Tensor, " d_sae"] | None,
    generator: torch.Generator,
    *,
    d_sae: int,
) -> Float32[Tensor, "d_sae d"]:
    """Start of `W_dec`, or of a transcoder's encoder transposed, on the CPU.

    `mixed` is a random activation's direction from the centre plus a random direction: a row then points at data
    without being a copy of one activation.

    Args:
        sample: activations.
        centre: what their directions are from.
        chosen: rows of the sample that `mixed` takes, the same for both sides of a transcoder, so
            that a latent's encoder and decoder are of one token. None for other kinds.
    """
    width = sample.shape[1]
    if kind == "kaiming_uniform":
        return kaiming_uniform(d_sae, width, generator)
    if kind == "orthogonal":
        # W_dec^T W_dec = I where d_sae >= width; more latents than dimensions cannot be orthogonal to each other.
        wide = torch.randn(max(d_sae, width), min(d_sae, width), generator=generator)
        rows, triangle = torch.linalg.qr(wide)
        rows = rows * torch.sgn(torch.diagonal(triangle))  # without this, signs are not uniform
        return (rows if d_sae >= width else rows.T).contiguous()
    random = unit_rows(torch.randn(d_sae, width, generator=generator))
    if chosen is None:
        return random * _HEURISTIC_NORM
    directions = unit_rows((sample.index_select(0, chosen.to(sample.device)) - centre).cpu())
    return unit_rows(directions + random)


def encoder_scale(
    inputs: Float32[Tensor, "rows d_in"],
    target: Float32[Tensor, "rows d_out"],
    encoder_rows: Float32[Tensor, "d_sae d_in"],
    W_dec: Float32[Tensor, "d_sae d_out"],
    activation: Activation,
) -> float:
    """The factor s for which `W_enc = s encoder_rows^T` reconstructs the target best: least squares in one unknown.

    Args:
        inputs: what the encoder multiplies, centred.
        target: what is to be reconstructed, without `b_dec`.
        activation: applied to some rows at a time.
    """
    squared = product = 0.0
    for rows, wanted in zip(inputs.split(_ROWS_AT_A_TIME), target.split(_ROWS_AT_A_TIME), strict=True):
        reconstruction = activation(rows @ encoder_rows.T) @ W_dec
        squared += float((reconstruction * reconstruction).sum(dtype=torch.float64))
        product += float((wanted * reconstruction).sum(dtype=torch.float64))
    scale = product / squared if squared > 0 else 1.0
    # A reconstruction that has nothing to do with its target would turn the encoder round, or off.
    return scale if scale > 0 else 1.0


def initial_weights(
    spec: SaeSpec,
    sample: Float32[Tensor, "rows d_in"],
    target: Float32[Tensor, "rows d_out"] | None = None,
    *,
    d_sae: int,
    activation: Activation,
    generator: torch.Generator,
) -> InitialWeights:
    """Weights to begin with.

    Encoder biases are zero, but for a transcoder: its inputs are not centred by `b_dec`, which is of its outputs, so
    its biases take the centre of its inputs off.

    Args:
        spec: the SAE, which says how its weights begin.
        sample: activations as the encoder will see them (scaled).
        target: the same rows of what a transcoder reconstructs; None for an SAE, whose target is `sample`.
        activation: the architecture's activation function, for the encoder's scale.
        generator: source of all randomness, on the CPU.
    """
    reconstructed = sample if target is None else target
    bias = decoder_bias(spec.initialization.decoder_bias, reconstructed)
    chosen = None
    if spec.decoder_start == "mixed":
        chosen = torch.randint(sample.shape[0], (d_sae,), generator=generator)
    W_dec = starting_rows(spec.decoder_start, reconstructed, bias, chosen, generator, d_sae=d_sae).to(sample.device)
    centre = torch.zeros_like(sample[0]) if target is None else decoder_bias(spec.initialization.decoder_bias, sample)
    if spec.encoder_start == "kaiming_uniform":
        encoder_rows = kaiming_uniform(sample.shape[1], d_sae, generator).to(sample.device).T
    elif target is not None:
        encoder_rows = starting_rows(spec.decoder_start, sample, centre, chosen, generator, d_sae=d_sae)
        encoder_rows = encoder_rows.to(sample.device)
    else:
        # Copied before the decoder is normalised, so at the decoder's own scale.
        encoder_rows = W_dec.clone()
    if spec.normalizes_decoder:
        W_dec = unit_rows(W_dec)
    if spec.encoder_start == "scaled_transpose":
        encoder_rows = W_dec if target is None else unit_rows(encoder_rows)
        inputs = sample[:_SCALE_ROWS] - (bias if spec.subtracts_b_dec else centre)
        wanted = reconstructed[:_SCALE_ROWS] - bias
        encoder_rows = encoder_rows * encoder_scale(inputs, wanted, encoder_rows, W_dec, activation)
    encoder_bias = torch.mv(encoder_rows, centre).neg_() if target is not None else sample.new_zeros(d_sae)
    return InitialWeights(W_enc=encoder_rows.T, W_dec=W_dec, b_dec=bias, encoder_bias=encoder_bias)
