"""What a finished cache says of itself: `manifest.json`, and the sidecars it is merged from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from sae_job.activations.format import MANIFEST_KEY, shard_key, sidecar_key
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore
from sae_job.text.plan import row_bytes
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
    sum: list[float]
    sum_norm: float
    sum_squared_norm: float
    calibration_median_norm: float | None = None
    """Median norm of the calibration batch; null when rows are not filtered by norm."""


class Sidecar(_Document):
    """What stands beside a shard, and proves it."""

    shard: int
    rows: int
    bytes: int
    sha256: str
    crc32: str
    hooks: dict[str, HookSums]
    dropped: int
    """Usable positions before the shard was full that the norm filter dropped."""
    software: dict[str, str]
    device: str


class HookStatistics(_Document):
    """Statistics of one hook over all rows of the cache."""

    name: str
    d_in: int
    mean: list[float]
    mean_norm: float
    mean_squared_norm: float
    calibration_median_norm: float | None = None


class ShardEntry(_Document):
    """One shard: where it lies, what proves it, and which contexts (global indices) its rows come from."""

    key: str
    rows: int
    bytes: int
    sha256: str
    crc32: str
    start: int
    stop: int


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
    """Bytes of all shards."""
    rows_per_shard: int
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
    def shard_bytes(self) -> int:
        """Bytes of the rows of a full shard, whether or not the cache is long enough to have one."""
        return self.rows_per_shard * row_bytes({hook.name: hook.d_in for hook in self.hooks}, self.dtype)

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


def read_sidecar(store: ObjectStore, shard: int, rows: int, rows_per_shard: int) -> Sidecar | None:
    """The sidecar that proves a shard: null when there is none, or when it is not about these rows."""
    try:
        data = store.get(sidecar_key(shard_key(shard, rows, rows_per_shard)))
    except ObjectNotFound:
        return None
    try:
        sidecar = Sidecar.model_validate_json(data)
    except ValidationError:
        return None
    return sidecar if (sidecar.shard, sidecar.rows) == (shard, rows) else None


def stored_sidecar(store: ObjectStore, shard: int, rows: int, rows_per_shard: int) -> Sidecar | None:
    """The sidecar of a shard that is stored whole: it is there, and the shard has the size that it tells."""
    sidecar = read_sidecar(store, shard, rows, rows_per_shard)
    if sidecar is None:
        return None
    info = store.head(shard_key(shard, rows, rows_per_shard))
    return sidecar if info is not None and info.size == sidecar.bytes else None
