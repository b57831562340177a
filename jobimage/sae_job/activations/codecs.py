"""Number formats of stored activations: how rows become tensors of a shard, and how they come back.

The plain formats store a row as it is, rounded. The two 8-bit ones store a scale beside each row: `float8` as the row's
largest value fits the format; `int8` after each dimension was centred and divided by its spread, both of which are
taken from the calibration batch and stored in every shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Suffixes of tensor names in a shard. No hook's name holds a slash.
VALUES, SCALE, MEAN, SPREAD = "", "/scale", "/mean", "/spread"

TensorSpec = tuple[str, torch.dtype, tuple[int, ...]]

# Largest finite value of float8_e4m3fn, and of int8 without its odd -128.
FLOAT8_MAX = 448.0
INT8_MAX = 127.0
# Rows whose values are all below this are stored as zeros: their scale would not be a normal number.
SMALLEST_ROW = 1e-30
# A dimension that hardly varies in the calibration batch is taken to vary by this part of what the others do: a value
# far outside would otherwise cost all other dimensions of its row their precision.
LEAST_SPREAD = 1e-3
# Rows encoded or decoded at a time on a CPU: what stays in the cache of a core.
CHUNK_ROWS = 256


class Codec(Protocol):
    """A number format. Tensors of a hook are named by suffixes to its name."""

    @property
    def name(self) -> str:
        """As in `storage.dtype`."""
        ...

    def row_tensors(self, d_in: int) -> list[TensorSpec]:
        """Suffix, dtype, and shape per row, of what is stored for each row."""
        ...

    def constants(self, d_in: int) -> list[TensorSpec]:
        """Suffix, dtype and shape of what is stored once in a shard for each hook."""
        ...

    def calibrate(self, rows: Tensor) -> dict[str, Tensor]:
        """The constants, by suffix, from rows [n, d_in] of the calibration batch; on their device."""
        ...

    def encode(self, rows: Tensor, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is stored of rows [n, d_in], by suffix, on their device. A plain format may give `rows` itself."""
        ...

    def decode(self, rows: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Tensor:
        """Rows [n, d_in] from what is stored of them: of the plain formats in storage dtype, of others float32."""
        ...


@dataclass(frozen=True)
class Plain:
    """Rows rounded to a dtype."""

    name: str
    dtype: torch.dtype

    def row_tensors(self, d_in: int) -> list[TensorSpec]:
        return [(VALUES, self.dtype, (d_in,))]

    def constants(self, d_in: int) -> list[TensorSpec]:
        return []

    def calibrate(self, rows: Tensor) -> dict[str, Tensor]:
        return {}

    def encode(self, rows: Tensor, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {VALUES: rows.to(self.dtype)}

    def decode(self, rows: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Tensor:
        return rows[VALUES]


@dataclass(frozen=True)
class Float8:
    """float8_e4m3fn times a float32 scale per row: the row's largest absolute value becomes the format's."""

    name: str = "float8"

    def row_tensors(self, d_in: int) -> list[TensorSpec]:
        return [(VALUES, torch.float8_e4m3fn, (d_in,)), (SCALE, torch.float32, ())]

    def constants(self, d_in: int) -> list[TensorSpec]:
        return []

    def calibrate(self, rows: Tensor) -> dict[str, Tensor]:
        return {}

    def encode(self, rows: Tensor, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
        scale = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        for start, stop in _chunks(rows):
            part = rows[start:stop].float()
            scale[start:stop] = _row_scale(part, FLOAT8_MAX)
            values[start:stop] = torch.div(part, scale[start:stop, None])
        return {VALUES: values, SCALE: scale}

    def decode(self, rows: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Tensor:
        values, scale = rows[VALUES], rows[SCALE]
        decoded = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        for start, stop in _chunks(values):
            _widen(values[start:stop], decoded[start:stop]).mul_(scale[start:stop, None])
        return decoded


@dataclass(frozen=True)
class Int8:
    """int8 of centred dimensions, each divided by its spread, times a float32 scale per row.

    A value differs from what is stored of it by at most scale · spread / 2, beside rounding in float32.
    """

    name: str = "int8"

    def row_tensors(self, d_in: int) -> list[TensorSpec]:
        return [(VALUES, torch.int8, (d_in,)), (SCALE, torch.float32, ())]

    def constants(self, d_in: int) -> list[TensorSpec]:
        return [(MEAN, torch.float32, (d_in,)), (SPREAD, torch.float32, (d_in,))]

    def calibrate(self, rows: Tensor) -> dict[str, Tensor]:
        width = rows.shape[1]
        if rows.shape[0] == 0:
            return {MEAN: torch.zeros(width, device=rows.device), SPREAD: torch.ones(width, device=rows.device)}
        spread, mean = torch.std_mean(rows.double(), dim=0, correction=0)
        typical = spread.square().mean().sqrt()
        spread = spread.clamp_min(LEAST_SPREAD * typical) if bool(typical > 0) else torch.ones_like(spread)
        return {MEAN: mean.float(), SPREAD: spread.float().clamp_min(SMALLEST_ROW)}

    def encode(self, rows: Tensor, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mean = constants[MEAN].to(rows.device)
        spread = constants[SPREAD].to(rows.device)
        values = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
        scale = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        for start, stop in _chunks(rows):
            part = torch.sub(rows[start:stop], mean).div_(spread)
            scale[start:stop] = _row_scale(part, INT8_MAX)
            values[start:stop] = part.div_(scale[start:stop, None]).round_()
        return {VALUES: values, SCALE: scale}

    def decode(self, rows: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Tensor:
        values, scale = rows[VALUES], rows[SCALE]
        mean, spread = constants[MEAN].to(values.device), constants[SPREAD].to(values.device)
        decoded = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        for start, stop in _chunks(values):
            part = decoded[start:stop].copy_(values[start:stop])
            part.mul_(spread).mul_(scale[start:stop, None]).add_(mean)
        return decoded


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Plain("float32", torch.float32),
        Plain("bfloat16", torch.bfloat16),
        Plain("float16", torch.float16),
        Float8(),
        Int8(),
    )
}


def _row_scale(rows: Tensor, largest: float) -> Tensor:
    """What divides each of float32 rows so that its largest absolute value becomes `largest`, [n]; 1 for rows of zeros.

    A row with an infinite value or NaN gets a scale that is not finite either: what is read back of it is not a number,
    and the sums over a shard refuse it.
    """
    # The norm of order infinity is the same, twenty times as slow on a CPU.
    absolute = rows.abs().amax(dim=1)
    return torch.where(absolute < SMALLEST_ROW, 1.0, absolute / largest)


def _widen(values: Tensor, out: Tensor) -> Tensor:
    """Fill `out`, float32, with finite float8_e4m3fn values."""
    if values.device.type != "cpu":
        return out.copy_(values)
    # torch converts them one by one on a CPU. Seven places to the left, the bits are those of a float16 whose exponent
    # counts from 15 in place of 7; sign extension has put the sign in front of the exponent once more.
    bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return out.copy_(bits.view(torch.float16)).mul_(256.0)


def _chunks(rows: Tensor) -> Iterator[tuple[int, int]]:
    """Bounds of the rows to encode or decode at a time: all of them on a GPU."""
    count = rows.shape[0]
    step = CHUNK_ROWS if rows.device.type == "cpu" else max(count, 1)
    for start in range(0, count, step):
        yield start, min(start + step, count)
