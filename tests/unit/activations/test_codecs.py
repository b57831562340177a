"""What a number format stores of rows comes back within its bound; what is no number never comes back as one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_job.activations.codecs import CODECS, FLOAT8_MAX, MEAN, SCALE, SPREAD, VALUES, Codec
from sae_job.activations.statistics import sums_of_stored
from sae_job.errors import InvalidInput

PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALED = ["float8", "int8"]
SIZES = {"rows": st.integers(0, 40), "d_in": st.integers(1, 24), "seed": st.integers(0, 2**31)}
# The spread of a dimension, and of a row.
MAGNITUDES = st.sampled_from([1e-6, 1e-2, 1.0, 1e4])


def rows_of(rows: int, d_in: int, seed: int, magnitude: float = 1.0) -> torch.Tensor:
    """Rows off centre, in dimensions of different spread."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(d_in, generator=generator) * magnitude + magnitude / 100
    return (torch.randn(rows, d_in, generator=generator) + 3 * torch.randn(d_in, generator=generator)) * spread


def round_trip(codec: Codec, rows: torch.Tensor, calibration: torch.Tensor | None = None) -> torch.Tensor:
    constants = codec.calibrate(rows if calibration is None else calibration)
    return codec.decode(codec.encode(rows, constants), constants)


@given(**SIZES, name=st.sampled_from(sorted(CODECS)))
def test_tensors_are_those_that_the_format_tells(rows: int, d_in: int, seed: int, name: str) -> None:
    codec, values = CODECS[name], rows_of(rows, d_in, seed)
    constants = codec.calibrate(values)
    encoded = codec.encode(values, constants)
    assert [(suffix, t.dtype, tuple(t.shape)) for suffix, t in constants.items()] == codec.constants(d_in)
    assert [(suffix, t.dtype, (*t.shape[1:],)) for suffix, t in encoded.items()] == codec.row_tensors(d_in)
    assert all(len(tensor) == rows for tensor in encoded.values())
    assert codec.decode(encoded, constants).shape == (rows, d_in)


@given(**SIZES, name=st.sampled_from(sorted(PLAIN)))
def test_plain_formats_round(rows: int, d_in: int, seed: int, name: str) -> None:
    values = rows_of(rows, d_in, seed)
    assert torch.equal(round_trip(CODECS[name], values), values.to(PLAIN[name]))


@given(**SIZES, magnitude=MAGNITUDES)
def test_int8_is_off_by_half_a_step_at_most(rows: int, d_in: int, seed: int, magnitude: float) -> None:
    codec, values = CODECS["int8"], rows_of(rows, d_in, seed, magnitude)
    # Of other rows, as a shard's rows are not those of the calibration batch.
    constants = codec.calibrate(rows_of(30, d_in, seed + 1, magnitude))
    encoded = codec.encode(values, constants)
    step = encoded[SCALE][:, None].double() * constants[SPREAD].double()
    error = (codec.decode(encoded, constants).double() - values.double()).abs()
    rounding = 1e-6 * (values.abs() + constants[MEAN].abs() + 127 * step)
    assert bool((error <= step / 2 + rounding).all())
    assert not bool((encoded[VALUES] == -128).any())


@given(**SIZES, magnitude=MAGNITUDES)
def test_float8_is_off_by_a_sixteenth_at_most(rows: int, d_in: int, seed: int, magnitude: float) -> None:
    """Three bits of mantissa; below the smallest normal number of a row's scale by half of the smallest step."""
    codec, values = CODECS["float8"], rows_of(rows, d_in, seed, magnitude)
    encoded = codec.encode(values, {})
    error = (codec.decode(encoded, {}).double() - values.double()).abs()
    bound = values.abs().double() / 16 + encoded[SCALE][:, None].double() * 2.0**-10
    assert bool((error <= bound * (1 + 1e-6)).all())


def test_int8_closed_form() -> None:
    codec = CODECS["int8"]
    constants = codec.calibrate(torch.tensor([[1.0, -8.0], [3.0, 8.0]]))
    assert constants[MEAN].tolist() == [2.0, 0.0]
    assert constants[SPREAD].tolist() == [1.0, 8.0]
    encoded = codec.encode(torch.tensor([[2.0 + 127, 0.0], [2.0 - 254, 16.0]]), constants)
    assert encoded[VALUES].tolist() == [[127, 0], [-127, 1]]
    assert encoded[SCALE].tolist() == [1.0, 2.0]
    assert codec.decode(encoded, constants).tolist() == [[129.0, 0.0], [-252.0, 16.0]]


def test_float8_closed_form() -> None:
    encoded = CODECS["float8"].encode(torch.tensor([[2 * FLOAT8_MAX, -2.0, 0.0]]), {})
    assert encoded[SCALE].tolist() == [2.0]
    assert encoded[VALUES].float().tolist() == [[FLOAT8_MAX, -1.0, 0.0]]
    assert CODECS["float8"].decode(encoded, {}).tolist() == [[2 * FLOAT8_MAX, -2.0, 0.0]]


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-45])
def test_rows_of_nothing_are_zeros(value: float) -> None:
    encoded = CODECS["float8"].encode(torch.full((2, 3), value), {})
    assert encoded[SCALE].tolist() == [1.0, 1.0]
    assert CODECS["float8"].decode(encoded, {}).tolist() == [[0.0] * 3] * 2
    constants = CODECS["int8"].calibrate(torch.zeros(2, 3))
    assert round_trip(CODECS["int8"], torch.full((2, 3), value), torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
    assert constants[SPREAD].tolist() == [1.0] * 3


def test_a_constant_dimension_comes_back_exactly_and_costs_the_others_nothing() -> None:
    values = rows_of(64, 8, 0)
    values[:, 3] = 5.25
    with_constant, without = round_trip(CODECS["int8"], values), values[:, [0, 1, 2, 4, 5, 6, 7]]
    assert torch.equal(with_constant[:, 3], values[:, 3])
    assert torch.allclose(with_constant[:, [0, 1, 2, 4, 5, 6, 7]], without, atol=0.05)


def test_no_calibration_rows_are_no_trouble() -> None:
    constants = CODECS["int8"].calibrate(torch.empty(0, 4))
    assert (constants[MEAN].tolist(), constants[SPREAD].tolist()) == ([0.0] * 4, [1.0] * 4)


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_refused_by_the_sums(name: str, value: float) -> None:
    codec, values = CODECS[name], rows_of(6, 4, 0)
    constants = codec.calibrate(values)
    values[4, 2] = value
    encoded = codec.encode(values, constants)
    assert codec.decode(encoded, constants).isfinite().all(dim=1).tolist() == [True, True, True, True, False, True]
    with pytest.raises(InvalidInput, match=r"activations of layer\.1 are"):
        sums_of_stored(encoded, constants, codec, "layer.1")


@pytest.mark.parametrize("name", SCALED)
def test_sums_are_of_the_values_as_they_are_read_back(name: str) -> None:
    codec, values = CODECS[name], rows_of(700, 4, 1)
    constants = codec.calibrate(values)
    encoded = codec.encode(values, constants)
    read = codec.decode(encoded, constants).double()
    sums = sums_of_stored(encoded, constants, codec, "h")
    assert sums.sum == pytest.approx(read.sum(dim=0).tolist(), rel=1e-12)
    assert sums.sum_norm == pytest.approx(float(read.norm(dim=1).sum()), rel=1e-12)


def test_int8_is_more_exact_than_float8_for_rows_off_centre() -> None:
    values = rows_of(500, 64, 2)
    errors = {name: float((round_trip(CODECS[name], values) - values).square().mean()) for name in SCALED}
    assert errors["int8"] < errors["float8"] / 20


def test_every_finite_float8_value_is_read_as_pytorch_reads_it() -> None:
    """The only other value, NaN, is stored in rows whose scale is not finite."""
    numbers = torch.arange(256, dtype=torch.uint8)
    stored = numbers[(numbers & 0x7F) != 0x7F].view(torch.float8_e4m3fn).reshape(2, 127)
    read = CODECS["float8"].decode({VALUES: stored, SCALE: torch.tensor([1.0, 2.0])}, {})
    assert torch.equal(read, stored.float() * torch.tensor([[1.0], [2.0]]))
