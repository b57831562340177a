"""Whole tensors of one part of a cache, read and verified: for tools that go through a cache once, in order."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch

from sae_job.activations.format import ShardLayout
from sae_job.activations.manifest import PartEntry
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore


def read_tensors(
    store: ObjectStore, part: PartEntry, layout: ShardLayout, names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Tensors of a part, by name.

    Raises:
        InvalidInput: the part is missing, or one of the tensors differs from its CRC-32.
        StoreError: the store cannot be read.
    """
    found: dict[str, torch.Tensor] = {}
    for name in names:
        place = layout.tensors[name]
        data = bytearray(place.bytes)
        try:
            count = store.read_into(part.key, place.offset, memoryview(data))
        except ObjectNotFound as error:
            raise _corrupt(store, part, "is missing") from error
        if count < len(data):
            raise _corrupt(store, part, f"ends inside the tensor {name}")
        if f"{zlib.crc32(data):08x}" != part.crc32[name]:
            raise _corrupt(store, part, f"differs from its checksum in the tensor {name}")
        flat = torch.frombuffer(data, dtype=place.dtype) if data else torch.empty(0, dtype=place.dtype)
        found[name] = flat.view(place.shape)
    return found


def _corrupt(store: ObjectStore, part: PartEntry, why: str) -> InvalidInput:
    return InvalidInput(
        "CorruptShard",
        f"{store.uri}/{part.key} {why}: `sae-job cache verify {store.uri}` tells what else is damaged, and how to "
        "mend it",
    )
