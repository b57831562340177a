"""A finished cache from a data set of activations that SAELens cached: the same values, with statistics and provenance.

Rows of a shard are whole contexts in the data set's order, permuted inside the shard. Shards are written one after the
other, each proved by its sidecar, so that an import that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError

from sae_job.activations.codecs import CODECS, Codec
from sae_job.activations.format import (
    HEADER,
    POSITION,
    SEQUENCE,
    TOKEN_IDS,
    ShardLayout,
    layout_of_part,
    shard_key,
    sidecar_key,
)
from sae_job.activations.manifest import CacheManifest, Sidecar, read_manifest, stored_sidecar
from sae_job.activations.marker import mark, read_marker
from sae_job.activations.mixing import seeded_generator
from sae_job.activations.saelens_dataset import ContextStream
from sae_job.activations.saelens_reading import SavedActivations
from sae_job.activations.statistics import sums_of_stored
from sae_job.errors import InvalidInput
from sae_job.steps.finalize import hook_of, merge, write_manifest
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import (
    BlockEntry,
    CacheIndex,
    DatasetRecord,
    HookGroup,
    ModelRecord,
    ShardPlan,
    TokenizerRecord,
    block_key,
    contexts_per_block,
    row_bytes,
)
from sae_operator.api.activation_cache import (
    ActivationCacheSpec,
    CacheStorage,
    DatasetSource,
    Hook,
    ModelSource,
    Positions,
    Sampling,
)
from sae_operator.api.identity import cache_identity, canonical_hash

# What the format of a data set's values becomes when none is asked for. Nothing is wider than float32.
STORED_AS = {"float32": "float32", "float16": "float16", "float64": "float32"}
SOFTWARE = ("sae-operator", "torch")
# Rows that constants of a number format are taken from.
CALIBRATION_ROWS = 2**14
StorageFormat = Literal["float32", "bfloat16", "float16", "float8", "int8"]


@dataclass(frozen=True)
class Imported:
    """What an import left.

    Attributes:
        manifest: of the finished cache.
        adopted: it was there already.
    """

    manifest: CacheManifest
    adopted: bool


def import_activations(
    folder: Path,
    store: ObjectStore,
    *,
    model: str,
    dataset: str,
    hook: str | None = None,
    loader: Literal["HuggingFace", "TransformerLens"] = "TransformerLens",
    context_size: int | None = None,
    positions: Positions | None = None,
    prepend_bos: bool = True,
    dtype: StorageFormat | None = None,
    seed: int = 0,
    shard_bytes: int = 2**28,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    """Make a finished cache of a data set. Memory: one shard.

    Args:
        folder: the data set.
        store: the cache's folder.
        model: name of the model that the activations are of.
        dataset: name of the data set of the text.
        hook: column to import; None for the only one.
        loader: library that hooks are named by.
        context_size: tokens of a context; those of a row when None.
        positions: positions of a context that the rows have; None for all.
        prepend_bos: whether contexts were made to begin with BOS; recorded.
        dtype: number format of the cache; None for the data set's, at most float32.
        seed: seed of the order of rows inside a shard.
        shard_bytes: size of a shard, about.
        progress: told how many contexts of how many are stored.

    Raises:
        InvalidInput: no such data set; it does not fit the context size; the folder holds something else.
        StoreError: the store failed.
    """
    saved = SavedActivations(folder, hook)
    spec = _spec(
        saved,
        model=ModelSource(name=model, loader=loader, dtype="float32"),
        dataset=DatasetSource(path=dataset),
        context_size=context_size or saved.positions,
        sampling=Sampling(
            prepend_bos=prepend_bos,
            positions=positions or Positions(),
            exclude_special_tokens=False,
            max_norm_ratio=0,
        ),
        dtype=dtype or STORED_AS[saved.dtype],
        seed=seed,
        shard_bytes=shard_bytes,
    )
    return _Import(saved, spec, store, progress).run()


def _spec(
    saved: SavedActivations,
    *,
    model: ModelSource,
    dataset: DatasetSource,
    context_size: int,
    sampling: Sampling,
    dtype: str,
    seed: int,
    shard_bytes: int,
) -> ActivationCacheSpec:
    """The cache that the data set is."""
    contexts = saved.contexts()
    if contexts == 0:
        raise InvalidInput("DatasetInvalid", f"{saved.folder} has no rows")
    try:
        spec = ActivationCacheSpec(
            model=model,
            dataset=dataset,
            hooks=[Hook.model_validate(hook_of(saved.hook))],
            context_size=context_size,
            tokens=contexts * saved.positions,
            seed=seed,
            sampling=sampling,
            storage=CacheStorage.model_validate(
                {"uri": "file://imported", "dtype": dtype, "shardBytes": shard_bytes},
            ),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput("InvalidImport", f"{saved.folder}: {where or 'context size'}: {first['msg']}") from error
    chosen = len(spec.sampling.positions.of(context_size))
    if chosen != saved.positions:
        raise InvalidInput(
            "ContextSizeDiffers",
            f"{saved.folder} has rows of {saved.positions} positions; a context of {context_size} has {chosen} of the "
            "positions asked for: give --context-size and, where only some were cached, --positions START:STOP",
        )
    return spec


class _Import:
    def __init__(
        self,
        saved: SavedActivations,
        spec: ActivationCacheSpec,
        store: ObjectStore,
        progress: Callable[[int, int], None],
    ) -> None:
        self._saved = saved
        self._spec = spec
        self._store = store
        self._progress = progress
        self._contexts = spec.tokens // saved.positions
        self._codec: Codec = CODECS[spec.storage.dtype]
        width = {saved.hook: saved.d_in}
        per_shard = max(1, spec.storage.shard_bytes // (row_bytes(width, spec.storage.dtype) * saved.positions))
        self._rows_per_shard = min(per_shard, self._contexts) * saved.positions
        # Not the identity of a cache that is built from the same spec: its rows lie in another order.
        self._identity = canonical_hash({"cache": cache_identity(spec), "imported": saved.fingerprint})
        self._software = {name: version(name) for name in SOFTWARE}

    def run(self) -> Imported:
        marker = read_marker(self._store)
        if not mark(self._store, self._identity) and (marker is None or marker.identity != self._identity):
            raise InvalidInput(
                "CacheTaken", f"{self._store.uri} holds something else: choose another URI, or remove what is there"
            )
        there = finished(self._store)
        if there is not None:
            return Imported(there, adopted=True)
        index = self._index()
        sidecars = ([sidecar] for sidecar in self._sidecars(index))
        manifest = merge(self._spec, index, sidecars, identity=self._identity)
        told = manifest.spec | {"imported": {"format": "SAELens", "fingerprint": self._saved.fingerprint}}
        # Of the tokenizer nothing is known.
        manifest = manifest.model_copy(update={"spec": told, "tokenizer": {}})
        return Imported(write_manifest(self._store, manifest), adopted=False)

    def _index(self) -> CacheIndex:
        """The plan of the shards; stored, with the contexts, where the data set has all positions of them."""
        spec, per_shard = self._spec, self._rows_per_shard // self._saved.positions
        shards = [
            ShardPlan(start=start, stop=stop, rows=(stop - start) * self._saved.positions)
            for start in range(0, self._contexts, per_shard)
            for stop in [min(start + per_shard, self._contexts)]
        ]
        whole = self._saved.positions == spec.context_size
        index = CacheIndex(
            context_size=spec.context_size,
            contexts_per_block=contexts_per_block(spec.context_size),
            blocks=list(self._store_blocks()) if whole else [],
            tokenizer=TokenizerRecord(name=spec.model.name, sha256="", bos_token_id=None, special_token_ids=[]),
            model=ModelRecord(name=spec.model.name, revision=None, d_in={self._saved.hook: self._saved.d_in}),
            dataset=DatasetRecord(path=spec.dataset.path),
            exhausted=True,
            rows_per_shard=self._rows_per_shard,
            slack=0,
            shards=shards,
            tokens=spec.tokens,
            groups=[HookGroup(hooks=[self._saved.hook])],
        )
        if whole:
            index.save(self._store)
        return index

    def _store_blocks(self) -> Iterator[BlockEntry]:
        """Store the contexts, which the CE-loss score runs the model on."""
        from safetensors.numpy import save

        size, held, number = contexts_per_block(self._spec.context_size), np.zeros((0, 0), dtype=np.int32), 0
        for batch in self._saved.token_ids():
            held = np.concatenate([held, batch]) if len(held) else batch
            while len(held) >= size:
                yield self._store_block(number, save({"contexts": np.ascontiguousarray(held[:size])}), size)
                held, number = held[size:], number + 1
        if len(held):
            yield self._store_block(number, save({"contexts": np.ascontiguousarray(held)}), len(held))

    def _store_block(self, number: int, data: bytes, contexts: int) -> BlockEntry:
        self._store.put(block_key(number), data)
        return BlockEntry(contexts=contexts, sha256=hashlib.sha256(data).hexdigest())

    def _constants(self) -> dict[str, torch.Tensor]:
        """The codec's constants, from the first rows."""
        activations, _ = next(self._saved.batches())
        return self._codec.calibrate(_as_rows(activations)[:CALIBRATION_ROWS])

    def _sidecars(self, index: CacheIndex) -> Iterator[Sidecar]:
        """The sidecars of all shards, which are written where they are not stored yet."""
        constants = self._constants()
        contexts, at = ContextStream(iter(())), -1
        for number, plan in enumerate(index.shards):
            sidecar = stored_sidecar(self._store, number, plan.rows, self._rows_per_shard)
            if sidecar is None:
                if at != plan.start:
                    contexts = ContextStream(self._saved.batches(plan.start))
                sidecar = self._store_shard(number, plan, contexts, constants)
                at = plan.stop
            yield sidecar
            self._progress(plan.stop, self._contexts)

    def _store_shard(
        self, number: int, plan: ShardPlan, contexts: ContextStream, constants: Mapping[str, torch.Tensor]
    ) -> Sidecar:
        hook, positions = self._saved.hook, list(self._spec.sampling.positions.of(self._spec.context_size))
        layout = layout_of_part(plan.rows, {hook: self._saved.d_in}, self._codec)
        data = bytearray(layout.size)
        view = memoryview(data)
        view[: len(layout.header)] = layout.header
        tensors = {name: layout.tensor(view, name) for name in layout.tensors}
        for suffix, values in constants.items():
            tensors[hook + suffix].copy_(values)
        places = torch.randperm(plan.rows, generator=seeded_generator("shard", self._spec.seed, number))
        done = 0
        while done < plan.rows:
            activations, token_ids = contexts.take((plan.rows - done) // len(positions))
            first = plan.start + done // len(positions)
            there = places[done : done + token_ids.size]
            rows = self._codec.encode(_as_rows(activations), constants)
            for suffix, values in rows.items():
                _as_bytes(tensors[hook + suffix])[there] = _as_bytes(values)
            tensors[TOKEN_IDS][there] = torch.from_numpy(token_ids.reshape(-1).copy())
            sequence = torch.arange(first, first + len(token_ids), dtype=torch.int32)
            tensors[SEQUENCE][there] = sequence.repeat_interleave(len(positions))
            tensors[POSITION][there] = torch.tensor(positions, dtype=torch.int32).repeat(len(token_ids))
            done += token_ids.size
        sidecar = self._describe(number, plan, layout, view)
        key = shard_key(number, plan.rows, self._rows_per_shard)
        self._store.put(key, data)
        self._store.put(sidecar_key(key), sidecar.to_bytes())
        return sidecar

    def _describe(self, number: int, plan: ShardPlan, layout: ShardLayout, view: memoryview) -> Sidecar:
        hook = self._saved.hook
        tensors = {name: layout.tensor(view, name) for name in layout.tensors}
        sums = sums_of_stored(
            {suffix: tensors[hook + suffix] for suffix, _, _ in self._codec.row_tensors(self._saved.d_in)},
            {suffix: tensors[hook + suffix] for suffix, _, _ in self._codec.constants(self._saved.d_in)},
            self._codec,
            hook,
        )
        crc32 = {
            name: f"{zlib.crc32(view[place.offset : place.offset + place.bytes]):08x}"
            for name, place in layout.tensors.items()
        }
        return Sidecar(
            shard=number,
            group=0,
            rows=plan.rows,
            bytes=len(view),
            sha256=hashlib.sha256(view).hexdigest(),
            crc32=crc32 | {HEADER: layout.header_crc32},
            hooks={hook: sums},
            dropped=0,
            software=self._software,
            device="cpu",
        )


def finished(store: ObjectStore) -> CacheManifest | None:
    """The manifest of a finished cache; None where there is none."""
    try:
        return read_manifest(store)
    except InvalidInput as error:
        if error.reason != "CacheNotFound":
            raise
        return None


def _as_rows(activations: np.ndarray) -> torch.Tensor:
    """Contexts [contexts, positions, d_in] as rows [rows, d_in] of at most 32 bits, in memory of their own."""
    dtype = np.float32 if activations.dtype == np.float64 else activations.dtype
    return torch.from_numpy(np.array(activations.reshape(-1, activations.shape[-1]), dtype=dtype))


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """The same memory in a dtype that rows can be put into their places in: torch cannot for 8-bit floats."""
    return rows.view(torch.uint8) if rows.dtype.itemsize == 1 else rows
