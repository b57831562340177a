"""The k largest entries of each row in one pass over memory, in Triton.

A program holds a row in registers. The k-th largest entry is found bit by bit: of numbers that are ordered as the
entries are, the largest that at least k entries reach. Then the entries above it, and the first of those equal to it,
are written in the order in which they stand.

It has not run on a GPU: `torch.topk`, which reads a row several times, stays in use unless this one is asked for
(`choice.top_k_kernel`; `bench/gpu.py` times both).
"""
# pyright: reportInvalidTypeForm=false, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# What stands in a kernel is Triton's language, whose values have no Python types.

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

# Counts of larger entries are packed into 8 bits beside those of equal ones: at most 2^8 - 1, k itself included.
LARGEST_K = 128
# A row lies in the registers of one program: at most 32 warps of 32 threads with 64 numbers each.
LARGEST_ROW = 65_536
# Entries that are placed at once: 8 to a thread of 8 warps.
BLOCK = 2048


@triton.jit
def _ordered(entry, IS_FLOAT32: tl.constexpr, BITS: tl.constexpr):
    """Unsigned numbers in the order of floats: negative ones turned over, positive ones put above them."""
    if IS_FLOAT32:
        bits = entry.to(tl.uint32, bitcast=True)
    else:
        bits = entry.to(tl.uint16, bitcast=True).to(tl.uint32)
    sign = tl.full([], 1 << (BITS - 1), tl.uint32)
    return tl.where((bits & sign) != 0, bits ^ ((sign - 1) | sign), bits | sign)


@triton.jit
def row_top_k_kernel(
    values,
    indices,
    pre,
    d_sae,
    k,
    IS_FLOAT32: tl.constexpr,
    BITS: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's k largest entries and their places."""
    row = tl.program_id(0).to(tl.int64)
    pre += row * d_sae
    all_columns = tl.arange(0, ROW)
    whole = tl.load(pre + all_columns, mask=all_columns < d_sae, other=0.0)
    whole = tl.where(all_columns < d_sae, _ordered(whole, IS_FLOAT32, BITS), 0)
    one = tl.full([], 1, tl.uint32)
    smallest = tl.full([], 0, tl.uint32)
    for number in range(BITS):
        bar = smallest | (one << (BITS - 1 - number))
        reached = tl.sum((whole >= bar).to(tl.int32), axis=0)
        smallest = tl.where(reached >= k, bar, smallest)
    n_above = tl.sum((whole > smallest).to(tl.int32), axis=0)

    # Block by block, read again from the cache: places, kept beside the whole row, would not fit into registers.
    above_before = 0
    equal_before = n_above
    for first in range(0, d_sae, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < d_sae
        entry = tl.load(pre + columns, mask=inside, other=0.0)
        ordered = _ordered(entry, IS_FLOAT32, BITS)
        above = inside & (ordered > smallest)
        equal = inside & (ordered == smallest)
        # Both counts in one sum: at most k - 1 are above, at most BLOCK are equal.
        counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 8), axis=0)
        place = tl.where(above, above_before + (counts & 255), equal_before + (counts >> 8)) - 1
        chosen = above | (equal & (place < k))
        tl.store(values + row * k + place, entry, mask=chosen)
        tl.store(indices + row * k + place, columns.to(tl.int64), mask=chosen)
        above_before += tl.sum(above.to(tl.int32), axis=0)
        equal_before += tl.sum(equal.to(tl.int32), axis=0)


def takes(pre: Tensor, k: int) -> bool:
    """Whether the kernel can do it: 16-bit or float32 entries, of which a row fits into registers."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    return pre.dtype in kinds and k <= LARGEST_K and k <= pre.shape[1] <= LARGEST_ROW


def row_top_k(pre: Float[Tensor, "batch d_sae"], k: int) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """The k largest entries of each row and their places, in the order of their places but for those equal to the
    smallest, which come last; of these the first are taken. NaN counts as largest."""
    batch, d_sae = pre.shape
    values = torch.empty(batch, k, dtype=pre.dtype, device=pre.device)
    indices = torch.empty(batch, k, dtype=torch.int64, device=pre.device)
    length = triton.next_power_of_2(d_sae)
    # 32 entries to a thread, and 64 where there are no more threads.
    warps = min(32, max(4, length // (32 * 32)))
    is_float32 = pre.dtype == torch.float32
    device: AbstractContextManager[object] = torch.cuda.device(pre.device) if pre.is_cuda else nullcontext()
    with device:
        row_top_k_kernel[(batch,)](
            values,
            indices,
            pre.contiguous(),
            d_sae,
            k,
            is_float32,
            32 if is_float32 else 16,
            length,
            min(length, BLOCK),
            num_warps=warps,
        )
    return values, indices
