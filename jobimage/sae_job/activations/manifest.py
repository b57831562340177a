"""What a finished cache says of itself: `manifest.json`, and the sidecars it is merged from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from sae_job.activations.codecs import CODECS, Codec
from sae_job.activations.format import (
    HEADER,
    MANIFEST_KEY,
    POSITION,
    SEQUENCE,
    ShardLayout,
    layout_of_part,
    shard_key,
    sidecar_key,
)
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore
from sae_job.text.plan import HookGroup, row_bytes
from sae_operator.api.identity import CACHE_FORMAT_VERSION


class _Document(BaseModel):
    """JSON in the store; fields that a later version adds are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, frozen=True)

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal documents have equal bytes."""
        data = self.model_dump(mode="json", by_alias=True)
        return (json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


class HookSums(_Document):
    """Sums over a shard's rows of one hook, in float64, of the values as stored."""

    d_in: int
    rows: int
    """Rows that the sums are over: those that are kept."""
    sum: list[float]
    sum_norm: float
    sum_squared_norm: float
    calibration_median_norm: float | None = None
    """Median norm of the calibration batch; null when rows are not filtered by norm."""


class Sidecar(_Document):
    """What stands beside a part of a shard, and proves it."""

    shard: int
    group: int
    rows: int
    bytes: int
    sha256: str
    """Of the whole file."""
    crc32: dict[str, str]
    """Of each tensor, and of the header (`/header`): 8 hex digits."""
    hooks: dict[str, HookSums]
    dropped: int
    """Group 0: usable positions before the shard was full that the norm filter dropped. Later groups: rows that are
    not to be kept."""
    software: dict[str, str]
    device: str
    follows: str | None = None
    """Later groups: `row_order` of the part that told which rows there are."""

    @property
    def row_order(self) -> str:
        """Names the rows of a part of group 0 and their places."""
        return f"{self.crc32[SEQUENCE]}-{self.crc32[POSITION]}"

    def without_sums(self) -> Sidecar:
        """What is small of it."""
        return self.model_copy(update={"hooks": {}})

    def proves(self, layout: ShardLayout, base: Sidecar | None) -> bool:
        """Whether this is about a part with this layout, and with the rows of `base` (None for group 0)."""
        same_file = self.bytes == layout.size and self.crc32.get(HEADER) == layout.header_crc32
        return same_file and self.crc32.keys() >= layout.tensors.keys() and self.follows == (base and base.row_order)


class HookStatistics(_Document):
    """Statistics of one hook over all rows of the cache that are kept for it."""

    name: str
    """Key of the hook."""
    d_in: int
    rows: int
    mean: list[float]
    mean_norm: float
    mean_squared_norm: float
    calibration_median_norm: float | None = None
    group: int = 0


class PartEntry(_Document):
    """A group's part of a shard: where it lies, and what proves it."""

    key: str
    bytes: int
    sha256: str
    crc32: dict[str, str]
    """Of each tensor, and of the header (`/header`): 8 hex digits."""


class ShardEntry(_Document):
    """One shard: its rows, the contexts (global indices) that they come from, and the parts, one for each group."""

    rows: int
    start: int
    stop: int
    parts: list[PartEntry]


class CacheManifest(_Document):
    """`manifest.json`: its presence means that the cache is complete."""

    format_version: int
    identity: str
    spec: dict[str, Any]
    """The cache's spec, camelCase, without what does not determine its rows."""
    model: dict[str, Any]
    dataset: dict[str, Any]
    tokenizer: dict[str, Any]
    seed: int
    dtype: str
    context_size: int
    tokens: int
    """Rows of all shards."""
    bytes: int
    """Bytes of all parts."""
    rows_per_shard: int
    groups: list[HookGroup]
    """All hooks, in the order in which they came to the cache."""
    hooks: list[HookStatistics]
    shards: list[ShardEntry]
    software: list[dict[str, str]]
    """The different versions that wrote shards."""
    device: list[str]
    """The different devices that ran the model."""

    def hook(self, name: str) -> HookStatistics:
        """Statistics of a hook.

        Raises:
            InvalidInput: the cache does not hold it; the message tells what it holds.
        """
        for hook in self.hooks:
            if hook.name == name:
                return hook
        import difflib

        held = [hook.name for hook in self.hooks]
        nearest = difflib.get_close_matches(name, held, n=3, cutoff=0.0)
        raise InvalidInput(
            "HookNotFound",
            f"the cache holds no activations of {name!r}; nearest: {', '.join(nearest)}",
            field="spec.saes",
        )

    @property
    def codec(self) -> Codec:
        """How rows are stored."""
        return CODECS[self.dtype]

    def group_of(self, hook: str) -> int:
        """Number of the group that a hook is in.

        Raises:
            InvalidInput: as `hook`.
        """
        return self.hook(hook).group

    def group_widths(self, group: int) -> dict[str, int]:
        """Width of each hook of a group, in its order."""
        return {hook: self.hook(hook).d_in for hook in self.groups[group].hooks}

    def layout(self, entry: ShardEntry, group: int) -> ShardLayout:
        """Where the tensors of a group's part of a shard lie."""
        return layout_of_part(entry.rows, self.group_widths(group), self.codec, group)

    @property
    def shard_bytes(self) -> int:
        """Bytes of the rows of a full shard, of the hooks that the cache began with, whether or not it is long enough
        to have one. Extending the cache does not change it."""
        return self.rows_per_shard * row_bytes(self.group_widths(0), self.dtype)

    @property
    def sha256(self) -> str:
        """Checksum of the manifest's bytes: names this state of the cache."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def read_manifest(store: ObjectStore) -> CacheManifest:
    """The manifest of the cache in this folder.

    Raises:
        InvalidInput: there is no finished cache, or one of another format.
    """
    try:
        data = store.get(MANIFEST_KEY)
    except ObjectNotFound as error:
        raise InvalidInput("CacheNotFound", f"{store.uri} holds no finished cache: it has no {MANIFEST_KEY}") from error
    return parse_manifest(data, store.uri)


def parse_manifest(data: bytes, uri: str) -> CacheManifest:
    """The manifest in these bytes; `uri` is told in messages.

    Raises:
        InvalidInput: not a manifest, or one of another format version.
    """
    damaged = f"{uri}/{MANIFEST_KEY} is damaged: delete it, and raise the cache's spec.retry to write it again"
    try:
        version = json.loads(data)["formatVersion"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput("CorruptManifest", damaged) from error
    if version != CACHE_FORMAT_VERSION:
        raise InvalidInput(
            "UnknownFormat",
            f"{uri} has cache format {version}; this version reads {CACHE_FORMAT_VERSION}: use a newer image",
        )
    try:
        return CacheManifest.model_validate_json(data)
    except ValidationError as error:
        raise InvalidInput("CorruptManifest", damaged) from error


def part_entry(sidecar: Sidecar, rows_per_shard: int) -> PartEntry:
    """What a manifest says of the part that a sidecar proves."""
    return PartEntry(
        key=shard_key(sidecar.shard, sidecar.rows, rows_per_shard, sidecar.group),
        bytes=sidecar.bytes,
        sha256=sidecar.sha256,
        crc32=sidecar.crc32,
    )


def read_sidecar(store: ObjectStore, shard: int, rows: int, rows_per_shard: int, group: int = 0) -> Sidecar | None:
    """The sidecar beside a group's part of a shard: null when there is none, or when it is not about these rows."""
    try:
        data = store.get(sidecar_key(shard_key(shard, rows, rows_per_shard, group)))
    except ObjectNotFound:
        return None
    try:
        sidecar = Sidecar.model_validate_json(data)
    except ValidationError:
        return None
    return sidecar if (sidecar.shard, sidecar.rows, sidecar.group) == (shard, rows, group) else None


def stored_sidecar(store: ObjectStore, shard: int, rows: int, rows_per_shard: int, group: int = 0) -> Sidecar | None:
    """The sidecar of a part that is stored whole: it is there, and the part has the size that it tells."""
    sidecar = read_sidecar(store, shard, rows, rows_per_shard, group)
    if sidecar is None:
        return None
    info = store.head(shard_key(shard, rows, rows_per_shard, group))
    return sidecar if info is not None and info.size == sidecar.bytes else None
