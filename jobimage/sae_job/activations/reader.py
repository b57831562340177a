"""Batches of mixed rows from a finished cache; what training reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from sae_job.activations.batches import HeldOut, MixedRows
from sae_job.activations.codecs import Codec
from sae_job.activations.first_rows import ShardRows, read_first_rows
from sae_job.activations.format import KEEP, ROW_FIELDS, SEQUENCE, ShardLayout, layout_of_part
from sae_job.activations.gathering import ShardTensors
from sae_job.activations.loading import PartRead, ShardId, ShardLoader, ShardRead, TensorRead
from sae_job.activations.manifest import CacheManifest, PartEntry, read_manifest
from sae_job.activations.parts import read_tensors
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import row_bytes

__all__ = [
    "CachedActivations",
    "HeldOut",
    "default_mix_shards",
    "default_read_ahead_bytes",
    "held_out_contexts_for",
    "read_bytes_of_shard",
    "reader_memory_bytes",
]

# Two shards of the default size; one where shards are larger.
READ_AHEAD_BYTES = 2**29
# Bytes of shards that are mixed by default: 8 shards of the default size, and all of a cache that is smaller.
MIX_BYTES = 2**31
# A batch of rows from more shards than this is gathered in pieces too small to be fast.
MOST_MIX_SHARDS, FEWEST_MIX_SHARDS = 128, 2


def default_mix_shards(shard_bytes: int) -> int:
    """Shards that rows of one batch come from by default, for full shards of this size."""
    return max(FEWEST_MIX_SHARDS, min(MOST_MIX_SHARDS, MIX_BYTES // shard_bytes))


def default_read_ahead_bytes(shard_bytes: int) -> int:
    """Bytes of shards that are held before they are needed by default: at least one shard."""
    return max(READ_AHEAD_BYTES, shard_bytes)


def reader_memory_bytes(cache_bytes: int, shard_bytes: int, *, read_bytes: int | None = None) -> int:
    """Memory for shards that a reader takes by default.

    Args:
        cache_bytes: size of the cache.
        shard_bytes: size of a full shard, of the hooks that the cache began with: it decides how many are mixed.
        read_bytes: what is read of a full shard (`read_bytes_of_shard`); as much when None.
    """
    read = shard_bytes if read_bytes is None else read_bytes
    return min(cache_bytes, default_mix_shards(shard_bytes) * read + default_read_ahead_bytes(read))


def read_bytes_of_shard(manifest: CacheManifest, hooks: Sequence[str]) -> int:
    """Bytes that are read of a full shard for these hooks: more than a shard began with, where many were added.

    Raises:
        InvalidInput: the cache does not hold a hook.
    """
    widths = {hook: manifest.hook(hook).d_in for hook in hooks}
    # Of what lies beside the activations only a later group's `keep` is read.
    return manifest.rows_per_shard * row_bytes(widths, manifest.dtype, group=1)


def held_out_contexts_for(store: ObjectStore, manifest: CacheManifest, rows: int) -> int:
    """Smallest number of first contexts of a cache that hold at least `rows` rows; 0 when no rows are asked for.

    It is the same for a cache and for a longer one that extends it: a partial shard's rows come from the first
    contexts of the full one. It is the same for all hooks, too: of hooks that were added later, some rows may be left
    out.

    Raises:
        InvalidInput: the cache has fewer rows, or a shard is damaged.
    """
    before = 0
    if rows <= 0:
        return 0
    for entry in manifest.shards:
        if before + entry.rows >= rows:
            sequence = read_tensors(store, entry.parts[0], manifest.layout(entry, 0), (SEQUENCE,))[SEQUENCE]
            return int(sequence.sort().values[rows - before - 1]) + 1
        before += entry.rows
    raise InvalidInput(
        "TooFewRows",
        f"the cache has {before} rows, fewer than the {rows} to hold out: lower heldOutTokens, or raise the cache's "
        "tokens",
        field="spec.evaluation.heldOutTokens",
    )


def check_fits(
    manifest: CacheManifest,
    hooks: Sequence[str],
    *,
    d_in: Mapping[str, int] | None = None,
    dtype: str | None = None,
) -> None:
    """Check what is expected of a cache against what it is.

    Args:
        manifest: what the cache says of itself.
        hooks: hooks that are to be read.
        d_in: widths that they must have; any when None.
        dtype: storage dtype that the cache must have; any when None.

    Raises:
        InvalidInput: it holds something else; the message tells what.
    """
    for hook in hooks:
        try:
            held = manifest.hook(hook).d_in
        except InvalidInput as error:
            raise InvalidInput(error.reason, f"{error.message}; {facts_of(manifest)}", field=error.field) from error
        wanted = held if d_in is None else d_in.get(hook, held)
        if held != wanted:
            raise InvalidInput(
                "WidthMismatch",
                f"activations of {hook!r} have dIn {held} in the cache, not {wanted}: {facts_of(manifest)}",
                field="spec.activations",
            )
    if dtype is not None and dtype != manifest.dtype:
        raise InvalidInput(
            "DtypeMismatch",
            f"the cache is stored as {manifest.dtype}, not {dtype}: {facts_of(manifest)}",
            field="spec.activations",
        )


def facts_of(manifest: CacheManifest) -> str:
    """What a cache holds, in a sentence."""
    hooks = ", ".join(f"{hook.name} (dIn {hook.d_in})" for hook in manifest.hooks)
    return (
        f"it holds {manifest.tokens} rows of {hooks} in {manifest.dtype}, of {manifest.model.get('name')} "
        f"on contexts of {manifest.context_size} tokens"
    )


class CachedShards:
    """Shards of a finished cache: of the hooks asked for, nothing else is read.

    Args:
        store: the cache's folder.
        manifest: what it says of itself.
        hooks: hooks to read.
        read_ahead_bytes: bytes that may be held before they are needed.

    Raises:
        InvalidInput: the cache does not hold a hook.
    """

    def __init__(
        self, store: ObjectStore, manifest: CacheManifest, hooks: Sequence[str], *, read_ahead_bytes: int
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._hooks = {name: manifest.hook(name).d_in for name in hooks}
        self._codec = manifest.codec
        self._groups: dict[int, list[str]] = {}
        for hook in hooks:
            self._groups.setdefault(manifest.group_of(hook), []).append(hook)
        self._layouts: dict[tuple[int, int], ShardLayout] = {}
        self._shards: dict[ShardId, ShardRows] = {}
        self._in_use: dict[ShardId, ShardTensors] = {}
        self._loader = ShardLoader(store, read_ahead_bytes=read_ahead_bytes)

    @property
    def hooks(self) -> Mapping[str, int]:
        return self._hooks

    @property
    def codec(self) -> Codec:
        return self._codec

    @property
    def rows(self) -> int:
        return self._manifest.tokens

    @property
    def context_size(self) -> int:
        return self._manifest.context_size

    def first_rows(self, total: int) -> list[ShardRows]:
        found = read_first_rows(self._store, self._manifest, total, {0, *self._groups})
        self._shards |= {shard.shard: shard for shard in found}
        return found

    def places_from(self, shard: ShardId, context: int) -> torch.Tensor:
        return torch.nonzero(self._fields(shard, (SEQUENCE,))[SEQUENCE] >= context).flatten()

    def row_fields(self, shard: ShardId) -> dict[str, torch.Tensor]:
        return self._fields(shard, ROW_FIELDS)

    def want(self, now: Iterable[ShardId], later: Iterable[ShardId]) -> None:
        self._in_use.clear()
        self._loader.want([self._read(shard) for shard in now], (self._read(shard) for shard in later))

    def get(self, shard: ShardId) -> ShardTensors:
        if shard not in self._in_use:
            self._in_use[shard] = self._tensors(shard)
        return self._in_use[shard]

    def close(self) -> None:
        self._in_use.clear()
        self._loader.close()

    def _fields(self, shard: ShardId, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return read_tensors(self._store, self._part(shard, 0), self._layout(shard, 0), names)

    def _tensors(self, shard: ShardId) -> ShardTensors:
        loaded = self._loader.get(shard).tensors
        stored: dict[str, dict[str, torch.Tensor]] = {}
        constants: dict[str, dict[str, torch.Tensor]] = {}
        kept: np.ndarray | None = None
        for group, hooks in self._groups.items():
            for hook in hooks:
                width = self._hooks[hook]
                stored[hook] = {suffix: loaded[group, hook + suffix] for suffix, *_ in self._codec.row_tensors(width)}
                # A batch is decoded when all its rows are there: shards that it took rows of may have gone by then, and
                # their memory may be other shards'.
                constants[hook] = {
                    suffix: loaded[group, hook + suffix].clone() for suffix, *_ in self._codec.constants(width)
                }
            if group > 0:
                keep = loaded[group, KEEP].bool().numpy()
                kept = keep if kept is None else kept & keep
        return ShardTensors(stored, constants, None if kept is None or bool(kept.all()) else kept)

    def _read(self, shard: ShardId) -> ShardRead:
        return ShardRead(shard, tuple(self._read_part(shard, group, hooks) for group, hooks in self._groups.items()))

    def _read_part(self, shard: ShardId, group: int, hooks: Sequence[str]) -> PartRead:
        names = [KEEP] if group > 0 else []
        for hook in hooks:
            width = self._hooks[hook]
            tensors = [*self._codec.constants(width), *self._codec.row_tensors(width)]
            names += [hook + suffix for suffix, *_ in tensors]
        part, layout = self._part(shard, group), self._layout(shard, group)
        return PartRead(
            group, part.key, tuple(TensorRead(name, layout.tensors[name], part.crc32[name]) for name in names)
        )

    def _part(self, shard: ShardId, group: int) -> PartEntry:
        part = self._shards[shard].parts[group]
        layout = self._layout(shard, group)
        if layout.size != part.bytes or layout.tensors.keys() - part.crc32.keys():
            raise InvalidInput(
                "CorruptManifest",
                f"{self._store.uri}: {part.key} has {part.bytes} bytes, but {shard.rows} rows of what the manifest "
                f"tells are {layout.size} ({facts_of(self._manifest)}): delete manifest.json, and raise the cache's "
                "spec.retry to write it again",
            )
        return part

    def _layout(self, shard: ShardId, group: int) -> ShardLayout:
        key = (shard.rows, group)
        if key not in self._layouts:
            widths = self._manifest.group_widths(group)
            self._layouts[key] = layout_of_part(shard.rows, widths, self._codec, group)
        return self._layouts[key]


class CachedActivations(MixedRows):
    """Endless batches of rows of a finished cache, mixed across shards, epoch after epoch.

    Memory: `mix_shards` shards in use, and `read_ahead_bytes` of shards before they are needed; of each only the hooks
    that are read. Files are mapped, so that this memory is the system's cache of files.
    """

    def __init__(self, manifest: CacheManifest, source: CachedShards, **arguments: object) -> None:
        super().__init__(source, **arguments)  # pyright: ignore[reportArgumentType] - as given to `open`
        self.manifest = manifest

    @classmethod
    def open(
        cls,
        store: ObjectStore,
        *,
        hooks: Sequence[str],
        batch_size: int,
        seed: int,
        held_out_contexts: int,
        total_rows: int | None = None,
        read_ahead_bytes: int | None = None,
        mix_shards: int | None = None,
        device: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
        d_in: Mapping[str, int] | None = None,
        dtype: str | None = None,
    ) -> CachedActivations:
        """Open the finished cache in a folder. Neither model, tokenizer nor data set is needed.

        Args:
            store: the cache's folder.
            hooks: hooks to read.
            batch_size: rows per batch, at least 1.
            seed: seed of the order of rows.
            held_out_contexts: rows of the first so many contexts are never in a batch.
            total_rows: read the first so many rows of the cache only; all when None.
            read_ahead_bytes: bytes of shards that may be held before they are needed; None for the default.
            mix_shards: shards that rows of one batch come from; None for the default, which depends on the size of
                full shards.
            device: where rows of 8-bit formats are decoded, when it is a GPU.
            rank: number of this process among those that share the rows.
            world_size: how many processes share the rows.
            d_in: widths that the hooks must have; any when None.
            dtype: storage dtype that the cache must have; any when None.

        Raises:
            InvalidInput: no finished cache, an unknown hook, another width or dtype, or no rows left to train on.
        """
        manifest = read_manifest(store)
        check_fits(manifest, hooks, d_in=d_in, dtype=dtype)
        if read_ahead_bytes is None:
            read_ahead_bytes = default_read_ahead_bytes(read_bytes_of_shard(manifest, hooks))
        return cls(
            manifest,
            CachedShards(store, manifest, hooks, read_ahead_bytes=read_ahead_bytes),
            batch_size=batch_size,
            seed=seed,
            held_out_contexts=held_out_contexts,
            total_rows=total_rows,
            mix_shards=default_mix_shards(manifest.shard_bytes) if mix_shards is None else mix_shards,
            device=device,
            rank=rank,
            world_size=world_size,
        )
