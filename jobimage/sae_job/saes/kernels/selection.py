"""Which latents are active, found by a product in bfloat16 and settled in float32.

The encoder's product is the largest part of a step. Its result is needed exactly only where a latent may be among
the k largest: bfloat16 is enough to say which those are, with a margin, and their pre-activations are then computed
again in float32 from the float32 weights.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sae_job.saes.kernels.choice import rounded_operands
from sae_job.saes.kernels.sparse import ActiveLatents, top_k
from sae_job.saes.step_memory import StepMemory

# Among Gaussian pre-activations the k-th largest of n lies t deviations out, with t^2 about 2 ln(n / k): 10 for 32 of
# 4608. There, moving a value by a part e of itself moves its rank by k t^2 e, and bfloat16, with 8 bits in operands
# and result, moves it by e = 2^-8: by k / 25. Half of k is twelve times that.
_MARGIN = 0.5
# Of few latents the rank's error is no longer an average over many neighbours.
_SMALLEST_MARGIN = 8


def candidates_of(k: int, d_sae: int) -> int:
    """How many latents of a row are computed again in float32 so that the k largest are among them."""
    return min(d_sae, k + max(_SMALLEST_MARGIN, int(k * _MARGIN)))


@lru_cache
def is_faster_in_bfloat16(device_type: str) -> bool:
    """Whether the device multiplies bfloat16 by instructions of its own; elsewhere the conversion costs more."""
    if device_type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def pre_activations(
    centred: Float32[Tensor, "batch d_in"],
    W_enc_T: Float32[Tensor, "d_sae d_in"],
    b_enc: Float32[Tensor, " d_sae"],
    memory: StepMemory,
    *,
    rounded: bool,
) -> Float[Tensor, "batch d_sae"]:
    """The pre-activations, in bfloat16 if `rounded`, in memory that the next call overwrites."""
    device, dtype = centred.device, torch.bfloat16 if rounded else torch.float32
    out = memory.take("pre", centred.shape[0], W_enc_T.shape[0], device=device, dtype=dtype)
    if not rounded:
        return torch.addmm(b_enc, centred, W_enc_T.T, out=out)
    x, weight, bias = (
        memory.take(name, *tensor.shape, device=device, dtype=dtype).copy_(tensor)
        for name, tensor in {"input": centred, "weights": W_enc_T, "bias": b_enc}.items()
    )
    return torch.addmm(bias, x, weight.T, out=out)


def settled(
    candidates: ActiveLatents,
    centred: Float32[Tensor, "batch d_in"],
    W_enc_T: Float32[Tensor, "d_sae d_in"],
    b_enc: Float32[Tensor, " d_sae"],
) -> Float32[Tensor, "*entries"]:
    """The candidates' pre-activations from float32 weights, and nothing else's."""
    with rounded_operands(False):
        return candidates.value_gradients(centred, W_enc_T) + b_enc[candidates.indices]


@torch.no_grad()
def select_top_k(
    pre: Float[Tensor, "batch d_sae"],
    centred: Float32[Tensor, "batch d_in"],
    W_enc_T: Float32[Tensor, "d_sae d_in"],
    b_enc: Float32[Tensor, " d_sae"],
    k: int,
) -> tuple[Float32[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """The k largest pre-activations of each row and their latents, in no particular order.

    The values are float32 sums. Exact for float32 pre-activations; of those in bfloat16 a latent is missed only where
    they rank it below all candidates, which a row in ten thousand or fewer shows.

    Args:
        pre: as `pre_activations` gives them.
        centred: the encoder's input.
        W_enc_T: the encoder's transpose.
        b_enc: its bias.
        k: how many.
    """
    if pre.dtype == torch.float32:
        return top_k(pre, k)
    d_sae = W_enc_T.shape[0]
    rounded, indices = top_k(pre, candidates_of(k, d_sae))
    exact = settled(ActiveLatents(indices, rounded, d_sae), centred, W_enc_T, b_enc)
    values, places = exact.topk(k, dim=1, sorted=False)
    return values, indices.gather(1, places)
