"""Which parts of a cache there are to check, and what tells of them: the manifest, or a part's own sidecar."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import ValidationError

from sae_job.activations.codecs import CODECS, Codec
from sae_job.activations.format import (
    LENGTH_BYTES,
    POSITION,
    SEQUENCE,
    FormatError,
    header_length,
    layout_of_part,
    shard_key,
    sidecar_key,
)
from sae_job.activations.manifest import CacheManifest, PartEntry, ShardEntry, Sidecar
from sae_job.activations.verify_part import PartToCheck
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import CacheIndex

_PARTIAL = re.compile(r"shards/(?P<shard>\d{6,})-(?P<rows>\d+)(\.g(?P<group>\d+))?\.safetensors")

Unreadable = tuple[str, int, str]
"""Key of an object, its shard, and what is wrong with it."""


def parts_of_manifest(manifest: CacheManifest) -> list[PartToCheck]:
    """All parts that a manifest lists, in order."""
    return [
        PartToCheck(
            shard=number,
            group=group,
            entry=entry,
            part=part,
            layout=manifest.layout(entry, group),
            hooks=manifest.group_widths(group),
            codec=manifest.codec,
            context_size=manifest.context_size,
            follows=None if group == 0 else _row_order(entry.parts[0]),
        )
        for number, entry in enumerate(manifest.shards)
        for group, part in enumerate(entry.parts)
    ]


def parts_of_shorter_caches(store: ObjectStore, sizes: Mapping[str, int], manifest: CacheManifest) -> list[PartToCheck]:
    """Partial shards of the cache before it was extended: jobs that asked for fewer rows still read them.

    Args:
        store: the cache's folder.
        sizes: bytes of the objects in it.
        manifest: its manifest.
    """
    found: list[PartToCheck] = []
    listed = {part.key for entry in manifest.shards for part in entry.parts}
    for key in sorted(sizes.keys() - listed):
        match = _PARTIAL.fullmatch(key)
        if match is None or sidecar_key(key) not in sizes:
            continue
        number, rows, group = int(match["shard"]), int(match["rows"]), int(match["group"] or 0)
        if number >= len(manifest.shards) or group >= len(manifest.groups):
            continue
        entry, sidecar = manifest.shards[number], _read_sidecar(store, key)
        if rows < entry.rows and sidecar is not None:
            found.append(
                _told_by_sidecar(
                    sidecar,
                    key=key,
                    shard=number,
                    group=group,
                    entry=ShardEntry(rows=rows, start=entry.start, stop=entry.stop, parts=[]),
                    hooks=manifest.group_widths(group),
                    codec=manifest.codec,
                    context_size=manifest.context_size,
                )
            )
    return found


def parts_of_plan(
    store: ObjectStore, sizes: Mapping[str, int], index: CacheIndex
) -> tuple[list[PartToCheck], list[Unreadable]]:
    """Parts of an unfinished cache that are stored with their sidecars, and those that cannot be read.

    Args:
        store: the cache's folder.
        sizes: bytes of the objects in it.
        index: its plan.
    """
    found: list[PartToCheck] = []
    unreadable: list[Unreadable] = []
    for number, plan in enumerate(index.shards):
        for group in range(len(index.groups)):
            key = shard_key(number, plan.rows, index.rows_per_shard, group)
            if key not in sizes or sidecar_key(key) not in sizes:
                continue
            widths = index.group_widths(group)
            codec, sidecar = _codec_of(store, key, plan.rows, widths, group), _read_sidecar(store, key)
            if codec is None:
                unreadable.append((key, number, "has another header than the plan asks for"))
            elif sidecar is None:
                unreadable.append((sidecar_key(key), number, "is damaged: it is no sidecar"))
            else:
                found.append(
                    _told_by_sidecar(
                        sidecar,
                        key=key,
                        shard=number,
                        group=group,
                        entry=ShardEntry(rows=plan.rows, start=plan.start, stop=plan.stop, parts=[]),
                        hooks=widths,
                        codec=codec,
                        context_size=index.context_size,
                    )
                )
    return found, unreadable


def _told_by_sidecar(
    sidecar: Sidecar,
    *,
    key: str,
    shard: int,
    group: int,
    entry: ShardEntry,
    hooks: Mapping[str, int],
    codec: Codec,
    context_size: int,
) -> PartToCheck:
    return PartToCheck(
        shard=shard,
        group=group,
        entry=entry,
        part=PartEntry(key=key, bytes=sidecar.bytes, sha256=sidecar.sha256, crc32=sidecar.crc32),
        layout=layout_of_part(entry.rows, hooks, codec, group),
        hooks=hooks,
        codec=codec,
        context_size=context_size,
        sidecar_alone=True,
    )


def _row_order(part: PartEntry) -> str | None:
    """What names the rows of a part of group 0 and their places, as `Sidecar.row_order` does."""
    if SEQUENCE not in part.crc32 or POSITION not in part.crc32:
        return None
    return f"{part.crc32[SEQUENCE]}-{part.crc32[POSITION]}"


def _codec_of(store: ObjectStore, key: str, rows: int, widths: Mapping[str, int], group: int) -> Codec | None:
    """The number format of a part, which the plan does not tell, by its header."""
    try:
        length = header_length(store.get_range(key, 0, LENGTH_BYTES))
    except FormatError:
        return None
    header = store.get_range(key, 0, length)
    layouts = ((codec, layout_of_part(rows, widths, codec, group)) for codec in CODECS.values())
    return next((codec for codec, layout in layouts if layout.header == header), None)


def _read_sidecar(store: ObjectStore, key: str) -> Sidecar | None:
    try:
        return Sidecar.model_validate_json(store.get(sidecar_key(key)))
    except ValidationError:
        return None
