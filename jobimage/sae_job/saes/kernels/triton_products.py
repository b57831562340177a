"""The sparse products in Triton, for CUDA devices: `sparse.py` calls them there, and its plain path is their oracle.

Operands are 16-bit or float32; sums are float32, in an order that depends on nothing but the places of the entries,
and no two programs write one number: the same input gives the same bits. Any width is covered, by masks.

Importing this module needs Triton, which PyTorch for CUDA brings.
"""
# pyright: reportInvalidTypeForm=false, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# What stands in a kernel is Triton's language, whose values have no Python types.

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

# A program works on tiles of so many entries times so many columns: 256 columns of bfloat16 are 512 bytes, four whole
# lines of the cache, and divide the widths of common models (2304, 3584, 4096) without rest; 16 entries at once
# keep 8 KiB on their way from memory per program.
ENTRIES = 16
COLUMNS = 256
# A latent with more entries than this is summed by several programs. Each takes 32 tiles then: some ten microseconds,
# little beside a whole batch's.
PIECE = 512


@triton.jit
def decode_kernel(out, weight, latents, values, starts, width, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """One row's sum of its activations times their latents' weights, in one block of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(begin, end, ENTRIES):
        places = first + tl.arange(0, ENTRIES)
        there = places < end
        latent = tl.load(latents + places, mask=there, other=0)
        value = tl.load(values + places, mask=there, other=0.0).to(tl.float32)
        tile = tl.load(
            weight + latent[:, None] * width + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(value[:, None] * tile.to(tl.float32), axis=0)
    tl.store(out + row * width + columns, total, mask=inside)


@triton.jit
def value_gradients_kernel(out, gradient, weight, latents, starts, width, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """One row's entries: each latent's weights times the row's gradient."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    for first in range(begin, end, ENTRIES):
        places = first + tl.arange(0, ENTRIES)
        there = places < end
        latent = tl.load(latents + places, mask=there, other=0)
        total = tl.zeros([ENTRIES, COLUMNS], dtype=tl.float32)
        for left in range(0, width, COLUMNS):
            columns = left + tl.arange(0, COLUMNS)
            inside = columns < width
            of_row = tl.load(gradient + row * width + columns, mask=inside, other=0.0).to(tl.float32)
            tile = tl.load(
                weight + latent[:, None] * width + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0
            )
            total += tile.to(tl.float32) * of_row[None, :]
        tl.store(out + places, tl.sum(total, axis=1), mask=there)


@triton.jit
def reconstruct_kernel(
    error,
    squares,
    value_gradient,
    weight,
    bias,
    target,
    factors,
    latents,
    values,
    starts,
    width,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row: its reconstruction's error, the sum of its squares, and the activations' gradients.

    The row's weights are read twice, but the second time from the cache, where the first has just put them.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    square = tl.zeros([COLUMNS], dtype=tl.float32)
    for left in range(0, width, COLUMNS):
        columns = left + tl.arange(0, COLUMNS)
        inside = columns < width
        total = tl.zeros([COLUMNS], dtype=tl.float32)
        for first in range(begin, end, ENTRIES):
            places = first + tl.arange(0, ENTRIES)
            there = places < end
            latent = tl.load(latents + places, mask=there, other=0)
            value = tl.load(values + places, mask=there, other=0.0).to(tl.float32)
            tile = tl.load(
                weight + latent[:, None] * width + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0
            )
            total += tl.sum(value[:, None] * tile.to(tl.float32), axis=0)
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        total -= tl.load(target + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        square += total * total
        tl.store(error + row * width + columns, total, mask=inside)
    tl.store(squares + row, tl.sum(square, axis=0))
    tl.debug_barrier()  # the error was written by other threads of this program than those that read it now
    factor = tl.load(factors + row).to(tl.float32)
    for first in range(begin, end, ENTRIES):
        places = first + tl.arange(0, ENTRIES)
        there = places < end
        latent = tl.load(latents + places, mask=there, other=0)
        total = tl.zeros([ENTRIES, COLUMNS], dtype=tl.float32)
        for left in range(0, width, COLUMNS):
            columns = left + tl.arange(0, COLUMNS)
            inside = columns < width
            of_row = tl.load(error + row * width + columns, mask=inside, other=0.0)
            tile = tl.load(
                weight + latent[:, None] * width + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0
            )
            total += tile.to(tl.float32) * of_row[None, :]
        tl.store(value_gradient + places, tl.sum(total, axis=1) * factor, mask=there)


@triton.jit
def weight_gradients_kernel(
    first_out,
    second_out,
    first_rows,
    second_rows,
    first_values,
    second_values,
    order,
    row_of,
    begins,
    ends,
    first_width,
    second_width,
    TWO: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One latent's (or piece's) gradient in one block of columns: the sum of values times rows over its entries; of
    two pairs of rows and values where TWO."""
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(begins + latent)
    end = tl.load(ends + latent)
    in_first = columns < first_width
    in_second = columns < second_width
    first_total = tl.zeros([COLUMNS], dtype=tl.float32)
    second_total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(begin, end, ENTRIES):
        sorted_places = first + tl.arange(0, ENTRIES)
        there = sorted_places < end
        place = tl.load(order + sorted_places, mask=there, other=0)
        row = tl.load(row_of + sorted_places, mask=there, other=0)
        value = tl.load(first_values + place, mask=there, other=0.0).to(tl.float32)
        tile = tl.load(
            first_rows + row[:, None] * first_width + columns[None, :],
            mask=there[:, None] & in_first[None, :],
            other=0.0,
        )
        first_total += tl.sum(value[:, None] * tile.to(tl.float32), axis=0)
        if TWO:
            value = tl.load(second_values + place, mask=there, other=0.0).to(tl.float32)
            tile = tl.load(
                second_rows + row[:, None] * second_width + columns[None, :],
                mask=there[:, None] & in_second[None, :],
                other=0.0,
            )
            second_total += tl.sum(value[:, None] * tile.to(tl.float32), axis=0)
    tl.store(first_out + latent * first_width + columns, first_total, mask=in_first)
    if TWO:
        tl.store(second_out + latent * second_width + columns, second_total, mask=in_second)


@triton.jit
def join_pieces_kernel(out, partial, latents, numbers, width, COLUMNS: tl.constexpr):
    """A latent's gradient in one block of columns from those of its pieces, which follow on the first."""
    piece = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    number = tl.load(numbers + piece)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for other in range(piece, piece + number):
        total += tl.load(partial + other * width + columns, mask=inside, other=0.0)
    tl.store(out + tl.load(latents + piece) * width + columns, total, mask=inside & (number > 0))


@triton.jit
def sum_by_latent_kernel(out, values, order, starts, ENTRIES: tl.constexpr):
    """One latent's sum of its entries' values."""
    latent = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + latent)
    end = tl.load(starts + latent + 1)
    total = tl.zeros([ENTRIES], dtype=tl.float32)
    for first in range(begin, end, ENTRIES):
        sorted_places = first + tl.arange(0, ENTRIES)
        there = sorted_places < end
        place = tl.load(order + sorted_places, mask=there, other=0)
        total += tl.load(values + place, mask=there, other=0.0).to(tl.float32)
    tl.store(out + latent, tl.sum(total, axis=0))


def decode(
    weight: Float[Tensor, "d_sae width"],
    latents: Int64[Tensor, " n"],
    values: Float[Tensor, " n"],
    starts: Int64[Tensor, " batch+1"],
) -> Float[Tensor, "batch width"]:
    """Each row's sum of activations times weights; see `ActiveLatents.decode`.

    Args:
        weight: one row per latent.
        latents: each entry's latent, row after row.
        values: each entry's activation.
        starts: where each row's entries begin, and where the last one's end.
    """
    batch, width = len(starts) - 1, weight.shape[1]
    out = _empty((batch, width), weight, values)
    with _device_of(out):
        decode_kernel[batch, triton.cdiv(width, COLUMNS)](
            out, weight.contiguous(), latents, values.contiguous(), starts, width, ENTRIES, COLUMNS
        )
    return out


def value_gradients(
    gradient: Float[Tensor, "batch width"],
    weight: Float[Tensor, "d_sae width"],
    latents: Int64[Tensor, " n"],
    starts: Int64[Tensor, " batch+1"],
) -> Float[Tensor, " n"]:
    """Each entry's row of `gradient` times its latent's row of `weight`; see `ActiveLatents.value_gradients`."""
    batch, width = gradient.shape
    out = _empty((len(latents),), gradient, weight)
    with _device_of(out):
        value_gradients_kernel[(batch,)](
            out, gradient.contiguous(), weight.contiguous(), latents, starts, width, ENTRIES, COLUMNS
        )
    return out


def reconstruct(
    weight: Float[Tensor, "d_sae width"],
    bias: Float[Tensor, " width"],
    target: Float[Tensor, "batch width"],
    factors: Float[Tensor, " batch"],
    latents: Int64[Tensor, " n"],
    values: Float[Tensor, " n"],
    starts: Int64[Tensor, " batch+1"],
) -> tuple[Float[Tensor, "batch width"], Float[Tensor, " batch"], Float[Tensor, " n"]]:
    """Error, its squares' sum per row, and the activations' gradients, all float32; see `ActiveLatents.reconstruct`."""
    batch, width = target.shape
    error = torch.empty(batch, width, dtype=torch.float32, device=target.device)
    squares = torch.empty(batch, dtype=torch.float32, device=target.device)
    value_gradient = torch.empty(len(latents), dtype=torch.float32, device=target.device)
    with _device_of(error):
        reconstruct_kernel[(batch,)](
            error,
            squares,
            value_gradient,
            weight.contiguous(),
            bias.contiguous(),
            target.contiguous(),
            factors.contiguous(),
            latents,
            values.contiguous(),
            starts,
            width,
            ENTRIES,
            COLUMNS,
        )
    return error, squares, value_gradient


class Segments(NamedTuple):
    """The entries of latents, sorted by latent, with those of latents that have many cut into pieces.

    A latent that is active on most rows, as a few are in a trained SAE, would keep one program busy when all others
    have long ended.

    Attributes:
        order: the entries' places by latent, then by row.
        row_of: their rows in this order.
        begins: where each latent's entries begin in this order.
        ends: where they end; where they begin for a latent in pieces.
        piece_begins: where each piece begins; there are as many as there can be.
        piece_ends: where it ends; of those that are not there, where it begins.
        piece_latents: its latent.
        piece_numbers: the number of pieces of its latent if it is the first, else 0.
    """

    order: Int64[Tensor, " n"]
    row_of: Int64[Tensor, " n"]
    begins: Int64[Tensor, " d_sae"]
    ends: Int64[Tensor, " d_sae"]
    piece_begins: Int64[Tensor, " pieces"]
    piece_ends: Int64[Tensor, " pieces"]
    piece_latents: Int64[Tensor, " pieces"]
    piece_numbers: Int64[Tensor, " pieces"]


def segments(order: Int64[Tensor, " n"], row_of: Int64[Tensor, " n"], starts: Int64[Tensor, " d_sae+1"]) -> Segments:
    """Cut what is longer than a piece, without asking the device how much that is.

    Args:
        order: the entries' places by latent, then by row.
        row_of: their rows in this order.
        starts: where each latent's entries begin in this order, and where the last one's end.
    """
    begins, ends = starts[:-1].contiguous(), starts[1:]
    counts = ends - begins
    is_long = counts > PIECE
    numbers = torch.where(is_long, (counts + PIECE - 1) // PIECE, 0)
    after = numbers.cumsum(0)
    # A latent in pieces has more than one piece's entries, so that no piece but its last is not full.
    most = 2 * len(order) // PIECE
    pieces = torch.arange(most, device=starts.device)
    latents = torch.searchsorted(after, pieces, right=True)
    is_there = latents < len(counts)
    latents = latents.clamp_(max=len(counts) - 1)
    within = pieces - (after - numbers)[latents]
    piece_begins = begins[latents] + within * PIECE
    piece_ends = torch.where(is_there, torch.minimum(piece_begins + PIECE, ends[latents]), piece_begins)
    return Segments(
        order,
        row_of,
        begins,
        torch.where(is_long, begins, ends),
        piece_begins,
        piece_ends,
        latents,
        torch.where(is_there & (within == 0), numbers[latents], 0),
    )


Pair = tuple[Float[Tensor, "batch width"], Float[Tensor, " n"]]


def weight_gradient(
    rows: Float[Tensor, "batch width"], values: Float[Tensor, " n"], by_latent: Segments
) -> Float[Tensor, "d_sae width"]:
    """Each latent's sum of values times rows over its entries; see `ActiveLatents.weight_gradient`.

    Args:
        rows: what is summed.
        values: each entry's factor, row after row.
        by_latent: the entries by latent.
    """
    (out,) = _weight_gradients([(rows, values)], by_latent)
    return out


def weight_gradients(
    first: Pair, second: Pair, by_latent: Segments
) -> tuple[Float[Tensor, "d_sae first_width"], Float[Tensor, "d_sae second_width"]]:
    """`weight_gradient` of two pairs of rows and values in one pass over each latent's entries."""
    first_out, second_out = _weight_gradients([first, second], by_latent)
    return first_out, second_out


def _weight_gradients(pairs: Sequence[Pair], by_latent: Segments) -> list[Tensor]:
    pairs = [(rows.contiguous(), values.contiguous()) for rows, values in pairs]
    d_sae, n_pieces = len(by_latent.begins), len(by_latent.piece_begins)
    widths = [rows.shape[1] for rows, _ in pairs]
    outs = [_empty((d_sae, rows.shape[1]), rows, values) for rows, values in pairs]
    _sum_segments(outs, pairs, by_latent, by_latent.begins, by_latent.ends)
    if n_pieces > 0:
        partial = [torch.empty(n_pieces, width, dtype=torch.float32, device=outs[0].device) for width in widths]
        _sum_segments(partial, pairs, by_latent, by_latent.piece_begins, by_latent.piece_ends)
        for out, parts, width in zip(outs, partial, widths, strict=True):
            with _device_of(out):
                join_pieces_kernel[n_pieces, triton.cdiv(width, COLUMNS)](
                    out, parts, by_latent.piece_latents, by_latent.piece_numbers, width, COLUMNS
                )
    return outs


def _sum_segments(outs: list[Tensor], pairs: Sequence[Pair], by_latent: Segments, begins: Tensor, ends: Tensor) -> None:
    """Fill each row of `outs` with the sum over the entries from its begin to its end."""
    (first_rows, first_values), (second_rows, second_values) = pairs[0], pairs[-1]
    widths = first_rows.shape[1], second_rows.shape[1]
    with _device_of(outs[0]):
        weight_gradients_kernel[len(begins), triton.cdiv(max(widths), COLUMNS)](
            outs[0],
            outs[-1],
            first_rows,
            second_rows,
            first_values,
            second_values,
            by_latent.order,
            by_latent.row_of,
            begins,
            ends,
            *widths,
            len(pairs) == 2,
            ENTRIES,
            COLUMNS,
        )


def sum_by_latent(
    values: Float[Tensor, " n"], order: Int64[Tensor, " n"], starts: Int64[Tensor, " d_sae+1"]
) -> Float[Tensor, " d_sae"]:
    """Each latent's sum of its entries' values, without atomic additions; see `ActiveLatents.sum_by_latent`."""
    out = torch.empty(len(starts) - 1, dtype=values.dtype, device=values.device)
    with _device_of(out):
        sum_by_latent_kernel[(len(out),)](out, values.contiguous(), order, starts, 128)
    return out


def _empty(shape: tuple[int, ...], first: Tensor, second: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.promote_types(first.dtype, second.dtype), device=first.device)


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
