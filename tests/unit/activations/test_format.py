"""The bytes of a shard are a safetensors file that the field's own library reads, laid out without gaps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from sae_job.activations.codecs import CODECS
from sae_job.activations.format import (
    ALIGNMENT,
    KEEP,
    ROW_FIELDS,
    FormatError,
    header_length,
    layout_of,
    layout_of_part,
    parse_layout,
    shard_key,
    sidecar_key,
)
from sae_job.text.plan import ITEM_BYTES, row_bytes

FORMATS = st.sampled_from(sorted(CODECS))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
HOOKS = st.dictionaries(st.text(alphabet="abc.0é", min_size=1, max_size=8), st.integers(1, 9), min_size=1, max_size=3)


@given(rows=st.integers(0, 20), hooks=HOOKS, dtype=FORMATS, group=st.integers(0, 2), seed=st.integers(0, 2**31))
def test_a_part_is_read_back_by_safetensors(
    rows: int, hooks: dict[str, int], dtype: str, group: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of_part(rows, hooks, CODECS[dtype], group)
    buffer = bytearray(layout.size)
    buffer[: len(layout.header)] = layout.header
    written = {}
    for name, place in layout.tensors.items():
        written[name] = (torch.randn(place.shape, generator=generator) * 100).to(place.dtype)
        layout.tensor(memoryview(buffer), name).copy_(written[name])
        assert place.offset % place.dtype.itemsize == 0, "every tensor lies at a multiple of its item"

    read = load(bytes(buffer))
    assert sorted(read) == sorted(written)
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].float(), tensor.float())

    again = parse_layout(bytes(buffer))
    assert (again.tensors, again.size) == (layout.tensors, layout.size)
    assert len(layout.header) % ALIGNMENT == 0


def test_only_the_first_group_tells_the_rows_and_only_later_ones_which_to_keep() -> None:
    first, later = (set(layout_of_part(3, {"h": 2}, CODECS["bfloat16"], group).tensors) for group in (0, 1))
    assert first == {*ROW_FIELDS, "h"}
    assert later == {KEEP, "h"}
    assert set(layout_of_part(3, {"h": 2}, CODECS["int8"], 1).tensors) == {KEEP, "h", "h/scale", "h/mean", "h/spread"}
    assert set(layout_of_part(3, {"h": 2}, CODECS["float8"], 1).tensors) == {KEEP, "h", "h/scale"}


@pytest.mark.parametrize("hooks", [1, 6])
@pytest.mark.parametrize("dtype", sorted(CODECS))
def test_a_part_takes_two_percent_more_than_its_values_at_most(dtype: str, hooks: int) -> None:
    widths = {f"model.layers.{layer}": 576 for layer in range(hooks)}
    rows = 2**28 // row_bytes(widths, dtype)
    size = layout_of_part(rows, widths, CODECS[dtype], 0).size
    assert size / rows == pytest.approx(hooks * 576 * ITEM_BYTES[dtype] + 12, rel=0.02)
    for group in (0, 1):
        size = layout_of_part(rows, widths, CODECS[dtype], group).size
        assert rows * row_bytes(widths, dtype, group) <= size
        assert size == pytest.approx(rows * row_bytes(widths, dtype, group), rel=1e-3), "what the plan tells"


@given(rows=st.integers(1, 20), hooks=HOOKS, dtype=DTYPES)
def test_what_safetensors_writes_is_understood(rows: int, hooks: dict[str, int], dtype: torch.dtype) -> None:
    tensors = {hook: torch.ones(rows, width, dtype=dtype) for hook, width in hooks.items()}
    data = bytearray(save(tensors, metadata={"any": "thing"}))
    layout = parse_layout(memoryview(data))
    for hook, tensor in tensors.items():
        assert torch.equal(layout.tensor(memoryview(data), hook), tensor)


def good() -> bytes:
    layout = layout_of([("a", torch.int32, (3,))])
    return layout.header + bytes(12)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"\xff" * 8 + good()[8:],
        good()[:20],
        good().replace(b"I32", b"I33"),
        good().replace(b'"a"', b'"a'),
        good().replace(b"[0,12]", b"[0,16]"),
        good().replace(b"[0,12]", b"[4,16]"),
        good().replace(b"[3]", b"[-]"),
    ],
)
def test_damaged_headers_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_layout(data)


def test_the_header_tells_its_length_from_its_first_bytes() -> None:
    assert header_length(good()[:8]) == len(good()) - 12


def test_a_partial_last_shard_carries_its_rows_in_its_name() -> None:
    assert shard_key(3, 100, 100) == "shards/000003.safetensors"
    assert shard_key(3, 42, 100) == "shards/000003-42.safetensors"
    assert shard_key(3, 100, 100, 1) == "shards/000003.g1.safetensors"
    assert shard_key(3, 42, 100, 2) == "shards/000003-42.g2.safetensors"
    assert sidecar_key("shards/000003.g1.safetensors") == "shards/000003.g1.json"
    assert sidecar_key("shards/000003-42.safetensors") == "shards/000003-42.json"
