"""Cache format v1: keys below the cache's folder, and the bytes of a shard (safetensors, little-endian).

A shard lies in one file, its *part*, for each group of hooks. Group 0 are the hooks that the cache began with: its part
tells which rows there are. Each later extension by hooks adds a group, whose part has the same rows in the same places,
and tells which of them to keep.

A part is laid out in one buffer from the start, so that rows are written to where they lie in the file: nothing is
copied again between the device and the store. The layout is a function of the rows, the hooks and the number format:
who knows these reads a tensor without looking at the file's header.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from sae_job.activations.codecs import Codec

MANIFEST_KEY = "manifest.json"
SHARDS_PREFIX = "shards/"

TOKEN_IDS = "token_ids"
SEQUENCE = "sequence"
POSITION = "position"
ROW_FIELDS = (TOKEN_IDS, SEQUENCE, POSITION)
# Of later groups: 1 for rows to keep, 0 for those that are above the norm ratio at one of the group's hooks.
KEEP = "keep"
# No hook can be called like a tensor that tells of rows.
TAKEN_NAMES = (*ROW_FIELDS, KEEP)
# What a checksum of the header is called among those of the tensors.
HEADER = "/header"

# Names of dtypes in a safetensors header.
SAFETENSORS_NAMES: dict[torch.dtype, str] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
SAFETENSORS_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}

LENGTH_BYTES = 8
# Tensors begin at a multiple of this in a buffer that does: what vector loads like best.
ALIGNMENT = 64
# A header of a few tensors is some hundred bytes; this bounds what a corrupt length can make us read.
MAX_HEADER_BYTES = 2**20

if sys.byteorder != "little":
    raise ImportError("cache shards are little-endian, and so must this machine be")


class FormatError(Exception):
    """Bytes are not a shard."""


def shard_key(shard: int, rows: int, rows_per_shard: int, group: int = 0) -> str:
    """Key of a group's part of a shard; the last shard of a cache, when it is partial, carries its rows in its name, so
    that the full one of a longer cache does not replace it."""
    partial = "" if rows == rows_per_shard else f"-{rows}"
    later = "" if group == 0 else f".g{group}"
    return f"{SHARDS_PREFIX}{shard:06d}{partial}{later}.safetensors"


def sidecar_key(key: str) -> str:
    """Key of the JSON beside a part, written after it: its presence proves the part."""
    return key.removesuffix(".safetensors") + ".json"


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a buffer that holds a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ShardLayout:
    """The bytes of a part: its header, and the place of each tensor after it, in the order in which they lie."""

    header: bytes
    tensors: Mapping[str, TensorPlace]
    size: int

    @cached_property
    def header_crc32(self) -> str:
        """CRC-32 of the header: it tells apart parts of other rows, hooks or formats. 8 hex digits."""
        return f"{zlib.crc32(self.header):08x}"

    def tensor(self, buffer: memoryview, name: str) -> torch.Tensor:
        """A view of one tensor in a buffer laid out like this."""
        place = self.tensors[name]
        if place.bytes == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        flat = torch.frombuffer(buffer, dtype=place.dtype, count=math.prod(place.shape), offset=place.offset)
        return flat.view(place.shape)


def layout_of_part(rows: int, hooks: Mapping[str, int], codec: Codec, group: int = 0) -> ShardLayout:
    """Layout of a group's part of a shard.

    It holds the row fields (group 0) or `keep` (later groups), and per hook the codec's constants and row tensors.
    Tensors of large items come before those of small ones, so that each lies at a multiple of its item.

    Args:
        rows: rows of the shard.
        hooks: width (d_in) of each of the group's hooks, in its order.
        codec: number format.
        group: number of the group.
    """
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    if group == 0:
        tensors += [(name, torch.int32, (rows,)) for name in ROW_FIELDS]
    else:
        tensors.append((KEEP, torch.uint8, (rows,)))
    for hook, width in hooks.items():
        tensors += [(hook + suffix, dtype, shape) for suffix, dtype, shape in codec.constants(width)]
        tensors += [(hook + suffix, dtype, (rows, *shape)) for suffix, dtype, shape in codec.row_tensors(width)]
    return layout_of(sorted(tensors, key=lambda tensor: -tensor[1].itemsize))


def layout_of(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> ShardLayout:
    """Layout of a safetensors file with these tensors (name, dtype, shape), without gaps between them."""
    offset = 0
    entries: dict[str, object] = {}
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # The format allows spaces after the JSON.
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return ShardLayout(header, _places(entries, len(header)), len(header) + offset)


def header_length(start: bytes | memoryview) -> int:
    """Bytes before the first tensor, from the first 8 bytes of a file.

    Raises:
        FormatError: not a safetensors file.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or not 2 <= length <= MAX_HEADER_BYTES:
        raise FormatError("it has no safetensors header")
    return LENGTH_BYTES + length


def parse_layout(start: bytes | memoryview) -> ShardLayout:
    """Layout of the file that begins with `start`, which must hold the whole header.

    Raises:
        FormatError: not a safetensors file of the dtypes that shards use.
    """
    length = header_length(start)
    header = bytes(start[:length])
    try:
        entries = json.loads(header[LENGTH_BYTES:])
        entries.pop("__metadata__", None)
        places = _places(entries, length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError("its safetensors header is damaged") from error
    expected = length
    for place in sorted(places.values(), key=lambda place: place.offset):
        if place.offset != expected or any(extent < 0 for extent in place.shape):
            raise FormatError("its safetensors header is inconsistent")
        expected += place.bytes
    return ShardLayout(header, places, expected)


def _places(entries: Mapping[str, object], length: int) -> dict[str, TensorPlace]:
    places = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise TypeError(name)
        begin, end = entry["data_offsets"]
        place = TensorPlace(SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), length + begin)
        if place.bytes != end - begin:
            raise ValueError(name)
        places[name] = place
    return places
