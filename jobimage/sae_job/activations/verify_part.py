"""The check of one part of a cache: every byte, every tensor, every row."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from pydantic import ValidationError

from sae_job.activations.codecs import Codec
from sae_job.activations.format import (
    HEADER,
    KEEP,
    POSITION,
    ROW_FIELDS,
    SEQUENCE,
    TOKEN_IDS,
    FormatError,
    ShardLayout,
    TensorPlace,
    parse_layout,
    sidecar_key,
)
from sae_job.activations.manifest import HookSums, PartEntry, ShardEntry, Sidecar
from sae_job.activations.statistics import sums_of_stored
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore

READ_BYTES = 2**23
# Sums of float64 in another order differ by far less; a changed value of one row by far more.
RELATIVE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class PartToCheck:
    """One part, and what the manifest (or the sidecar of an unfinished cache) says of it.

    Attributes:
        shard: number of its shard.
        group: group of hooks that it holds.
        entry: its shard.
        part: its key, size and checksums.
        layout: where its tensors lie.
        hooks: width of each of its hooks.
        codec: how they are stored.
        context_size: tokens of a context.
        follows: of later groups, what names the rows of group 0's part and their places; None where it is not known.
        sidecar_alone: the sidecar is all there is: the cache is unfinished.
    """

    shard: int
    group: int
    entry: ShardEntry
    part: PartEntry
    layout: ShardLayout
    hooks: Mapping[str, int]
    codec: Codec
    context_size: int
    follows: str | None = None
    sidecar_alone: bool = False


@dataclass
class PartFindings:
    """What is wrong with a part, and what was computed on the way.

    Attributes:
        problems: key of an object and what is wrong with it.
        sums: sums over the rows of each hook, as computed anew; empty where they were not.
        sidecar: the part's sidecar, where there is a sound one.
    """

    problems: list[tuple[str, str]] = field(default_factory=list)
    sums: dict[str, HookSums] = field(default_factory=dict)
    sidecar: Sidecar | None = None


def check_part(
    store: ObjectStore,
    check: PartToCheck,
    size: int | None,
    *,
    statistics: bool,
    read_contexts: Callable[[int, int], torch.Tensor] | None,
    progress: Callable[[int], None],
) -> PartFindings:
    """Check one part; memory: its bytes, and some of its rows in float64.

    Args:
        store: the cache's folder.
        check: what it should be.
        size: bytes of the object in the store; None when it is not there.
        statistics: compute the sums over its rows anew, too.
        read_contexts: contexts from, up to: int32 [contexts, context_size]; None where they cannot be read.
        progress: told how many bytes were read.

    Raises:
        StoreError: the store cannot be read.
    """
    found = PartFindings()
    _check_sidecar(store, check, found)
    for what in _check_bytes(store, check, size, found, statistics, read_contexts, progress):
        found.problems.append((check.part.key, what))
    return found


def _check_sidecar(store: ObjectStore, check: PartToCheck, found: PartFindings) -> None:
    key = sidecar_key(check.part.key)
    try:
        sidecar = Sidecar.model_validate_json(store.get(key))
    except ObjectNotFound:
        found.problems.append((key, "is missing"))
        return
    except ValidationError:
        found.problems.append((key, "is damaged: it is no sidecar"))
        return
    found.sidecar = sidecar
    if check.follows is not None and sidecar.follows != check.follows:
        found.problems.append((key, "is about other rows than the shard's first hooks have"))
    if check.sidecar_alone:
        return
    told = {
        "shard": (sidecar.shard, check.shard),
        "group": (sidecar.group, check.group),
        "rows": (sidecar.rows, check.entry.rows),
        "bytes": (sidecar.bytes, check.part.bytes),
        "sha256": (sidecar.sha256, check.part.sha256),
        "crc32": (sidecar.crc32, check.part.crc32),
        "hooks": (set(sidecar.hooks), set(check.hooks)),
    }
    different = [name for name, (here, there) in told.items() if here != there]
    if different:
        found.problems.append((key, f"disagrees with the manifest in {', '.join(different)}"))
        found.sidecar = None


def _check_bytes(
    store: ObjectStore,
    check: PartToCheck,
    size: int | None,
    found: PartFindings,
    statistics: bool,
    read_contexts: Callable[[int, int], torch.Tensor] | None,
    progress: Callable[[int], None],
) -> Iterator[str]:
    """What is wrong with a part's file."""
    if size is None:
        yield "is missing"
        return
    if size != check.part.bytes:
        yield f"has {size} bytes instead of {check.part.bytes}"
        return
    data = bytearray(size)
    view = memoryview(data)
    sha256 = hashlib.sha256()
    for start in range(0, size, READ_BYTES):
        piece = view[start : start + READ_BYTES]
        try:
            count = store.read_into(check.part.key, start, piece)
        except ObjectNotFound:
            yield "was removed while it was read"
            return
        if count < len(piece):
            yield f"ends after {start + count} bytes"
            return
        sha256.update(piece)
        progress(count)
    wrong = list(_check_tensors(check, view))
    yield from wrong
    if not wrong and sha256.hexdigest() != check.part.sha256:
        yield "differs from its SHA-256"
    if wrong:
        return
    tensors = {name: check.layout.tensor(view, name) for name in check.layout.tensors}
    if check.group == 0:
        yield from _check_rows(check, tensors, read_contexts)
    yield from _check_hooks(check, tensors, found, statistics)


def _check_tensors(check: PartToCheck, view: memoryview) -> Iterator[str]:
    """Header and checksums of the tensors."""
    layout = check.layout
    if bytes(view[: len(layout.header)]) != layout.header:
        try:
            there = parse_layout(view).tensors
        except FormatError as error:
            yield str(error)
            return
        yield next(
            (
                f"tensor {name} is {_describe(there, name)} in its header instead of {_describe(layout.tensors, name)}"
                for name in [*layout.tensors, *there]
                if _describe(there, name) != _describe(layout.tensors, name)
            ),
            "its header lays out its tensors in another way",
        )
        return
    if check.part.crc32.keys() != {HEADER, *layout.tensors}:
        yield "is listed without a checksum of each tensor"
        return
    for name, place in layout.tensors.items():
        if _crc32(view[place.offset : place.offset + place.bytes]) != check.part.crc32[name]:
            yield f"tensor {name} differs from its CRC-32"
    # The header is what it should be: then it is the checksum that is not.
    if layout.header_crc32 != check.part.crc32[HEADER]:
        yield "is listed with another CRC-32 than its header's"


def _describe(tensors: Mapping[str, TensorPlace], name: str) -> str:
    place = tensors.get(name)
    return "missing" if place is None else f"{str(place.dtype).removeprefix('torch.')} {list(place.shape)}"


def _crc32(data: memoryview) -> str:
    return f"{zlib.crc32(data):08x}"


def _check_rows(
    check: PartToCheck,
    tensors: Mapping[str, torch.Tensor],
    read_contexts: Callable[[int, int], torch.Tensor] | None,
) -> Iterator[str]:
    """Where the rows come from."""
    token_ids, sequence, position = (tensors[name].long() for name in ROW_FIELDS)
    entry, size = check.entry, check.context_size
    outside = (sequence < entry.start) | (sequence >= entry.stop)
    if bool(outside.any()):
        yield (
            f"{SEQUENCE} of {int(outside.sum())} rows is outside of the shard's contexts {entry.start} to "
            f"{entry.stop - 1}"
        )
    beyond = (position < 0) | (position >= size)
    if bool(beyond.any()):
        yield f"{POSITION} of {int(beyond.sum())} rows is outside of a context of {size}"
    if bool((outside | beyond).any()):
        return
    twice = len(sequence) - len(torch.unique(sequence * size + position))
    if twice:
        yield f"{twice} rows have the {SEQUENCE} and {POSITION} of another row"
    if read_contexts is not None:
        expected = read_contexts(entry.start, entry.stop)[sequence - entry.start, position]
        different = int((expected.long() != token_ids).sum())
        if different:
            yield f"{TOKEN_IDS} of {different} rows are not those of their contexts in tokens/"


def _check_hooks(
    check: PartToCheck, tensors: Mapping[str, torch.Tensor], found: PartFindings, statistics: bool
) -> Iterator[str]:
    """The rows' values: finite, as many as the sidecar counts, with the sums that it tells."""
    kept: torch.Tensor | None = None
    if check.group > 0:
        kept = tensors[KEEP]
        if bool((kept > 1).any()):
            yield f"{KEEP} of {int((kept > 1).sum())} rows is neither 0 nor 1"
            return
        kept = kept.bool()
    rows = check.entry.rows if kept is None else int(kept.sum())
    for hook, width in check.hooks.items():
        told = None if found.sidecar is None else found.sidecar.hooks.get(hook)
        if told is not None and told.rows != rows:
            yield f"the sidecar counts {told.rows} rows of {hook}, {rows} are there"
            continue
        if not statistics:
            continue
        try:
            sums = sums_of_stored(
                {suffix: tensors[hook + suffix] for suffix, _, _ in check.codec.row_tensors(width)},
                {suffix: tensors[hook + suffix] for suffix, _, _ in check.codec.constants(width)},
                check.codec,
                hook,
                keep=kept,
                calibration_median_norm=None if told is None else told.calibration_median_norm,
            )
        except InvalidInput:
            yield f"values of {hook} are not finite"
            continue
        found.sums[hook] = sums
        if told is not None and not sums_agree(told, sums):
            yield f"the rows of {hook} have other sums than the sidecar tells"


def sums_agree(left: HookSums, right: HookSums) -> bool:
    """Whether two sums are of the same rows, to what another order of summation changes."""
    scale = max(left.sum_norm, right.sum_norm)
    return (
        left.rows == right.rows
        and len(left.sum) == len(right.sum)
        and all(abs(a - b) <= RELATIVE_TOLERANCE * scale for a, b in zip(left.sum, right.sum, strict=True))
        and math.isclose(left.sum_norm, right.sum_norm, rel_tol=RELATIVE_TOLERANCE)
        and math.isclose(left.sum_squared_norm, right.sum_squared_norm, rel_tol=RELATIVE_TOLERANCE)
    )
