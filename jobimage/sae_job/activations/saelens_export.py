"""A cache as SAELens's data set of cached activations: the contexts that have all their rows, in order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_job.activations.format import KEEP, POSITION, SEQUENCE, TOKEN_IDS
from sae_job.activations.manifest import CacheManifest, ShardEntry
from sae_job.activations.parts import read_tensors
from sae_job.activations.saelens_dataset import NUMPY_DTYPES, ContextBatch, DatasetShape, write_dataset
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectStore
from sae_operator.api.activation_cache import Positions

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What an export left.

    Attributes:
        shape: what its rows look like.
        contexts: rows of the data set.
        left_out: contexts of the cache that lack some of their rows.
        positions: the positions that each context has.
        context_size: how many the model saw.
        files: names of the data files.
    """

    shape: DatasetShape
    contexts: int
    left_out: int
    positions: list[int]
    context_size: int
    files: list[str]


class CacheExport:
    """Contexts of one hook that have a row at each of the positions.

    Positions at which the cache has no row at all, such as BOS's where special tokens are left out, are no part of a
    context here. Memory: one hook of one shard.

    Args:
        store: the cache's folder.
        manifest: its manifest.
        hook: key of the hook.
        dtype: `float32` or `float16`; None for float16 where it is stored so, else float32.
        positions: positions wanted; None for all that the cache has.

    Raises:
        InvalidInput: no context is whole, or a shard is damaged.
    """

    def __init__(
        self,
        store: ObjectStore,
        manifest: CacheManifest,
        hook: str,
        *,
        dtype: str | None = None,
        positions: Positions | None = None,
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._hook = manifest.hook(hook)
        self._group = manifest.group_of(hook)
        wanted = torch.zeros(manifest.context_size, dtype=torch.bool)
        wanted[list((positions or Positions()).of(manifest.context_size))] = True
        self._wanted, counts = self._look_at_rows(wanted, drop_empty=positions is None)
        per_context = int(self._wanted.sum())
        self._whole = [count == per_context for count in counts]
        self.contexts = sum(int(whole.sum()) for whole in self._whole)
        self.left_out = sum(int((count > 0).sum()) for count in counts) - self.contexts
        if per_context == 0 or self.contexts == 0:
            raise InvalidInput(
                "NoWholeContexts",
                f"no context of {store.uri} has rows of {hook} at all of {per_context} positions: filters dropped "
                "some of each; choose --positions, or cache with sampling.excludeSpecialTokens false and "
                "sampling.maxNormRatio 0",
            )
        self.shape = DatasetShape(
            hook=hook,
            positions=per_context,
            d_in=self._hook.d_in,
            dtype=dtype or ("float16" if manifest.dtype == "float16" else "float32"),
        )
        self.positions: list[int] = torch.nonzero(self._wanted).flatten().tolist()

    def write(
        self,
        folder: Path,
        *,
        shuffle_seed: int | None = None,
        progress: Callable[[int], None] = lambda contexts: None,
    ) -> Exported:
        """Write the data set into an empty or missing folder.

        Args:
            shuffle_seed: write the contexts in an order shuffled by it; needs room for them twice. None keeps the
                cache's order.
            progress: told how many contexts are written.

        Raises:
            InvalidInput: the folder holds something, a shard is damaged, or values do not fit into float16.
        """
        batches = self.batches()
        if shuffle_seed is not None:
            batches = shuffled(batches, self.shape, self.contexts, seed=shuffle_seed, beside=folder)
        identity = f"{self._manifest.sha256}/{self.shape}/{self.positions}/{shuffle_seed}"
        files = write_dataset(folder, self.shape, batches, contexts=self.contexts, identity=identity, progress=progress)
        return Exported(self.shape, self.contexts, self.left_out, self.positions, self._manifest.context_size, files)

    def metadata(self) -> dict[str, Any]:
        """What the data set itself does not tell: where its rows came from."""
        manifest = self._manifest
        return {
            "hook": self._hook.name,
            "dIn": self._hook.d_in,
            "positions": self.positions,
            "contexts": self.contexts,
            "contextsLeftOut": self.left_out,
            "meanNorm": self._hook.mean_norm,
            "cache": {
                "identity": manifest.identity,
                "sha256": manifest.sha256,
                "dtype": manifest.dtype,
                "contextSize": manifest.context_size,
                "seed": manifest.seed,
                "spec": manifest.spec,
                "model": manifest.model,
                "dataset": manifest.dataset,
                "tokenizer": manifest.tokenizer,
                "software": manifest.software,
                "device": manifest.device,
            },
        }

    def batches(self) -> Iterator[ContextBatch]:
        """The contexts, in the cache's order."""
        for number, entry in enumerate(self._manifest.shards):
            if bool(self._whole[number].any()):
                yield from self._of_shard(entry, self._whole[number])

    def _of_shard(self, entry: ShardEntry, whole: torch.Tensor) -> Iterator[ContextBatch]:
        fields = self._row_fields(entry, TOKEN_IDS, SEQUENCE, POSITION)
        sequence, position = fields[SEQUENCE].long(), fields[POSITION].long()
        chosen = fields[KEEP] & whole[sequence - entry.start] & self._wanted[position]
        rows = torch.nonzero(chosen).flatten()
        rows = rows[torch.argsort(sequence[rows] * self._manifest.context_size + position[rows])]
        codec, name = self._manifest.codec, self._hook.name
        layout = self._manifest.layout(entry, self._group)
        suffixes = [suffix for suffix, _, _ in codec.row_tensors(self._hook.d_in)]
        constant = [suffix for suffix, _, _ in codec.constants(self._hook.d_in)]
        stored = read_tensors(
            self._store, entry.parts[self._group], layout, [name + suffix for suffix in (*suffixes, *constant)]
        )
        constants = {suffix: stored[name + suffix] for suffix in constant}
        shape = self.shape
        for part in rows.split(shape.contexts_per_batch * shape.positions):
            decoded = codec.decode({suffix: stored[name + suffix][part] for suffix in suffixes}, constants)
            values = decoded.to(TORCH_DTYPES[shape.dtype])
            if not bool(torch.isfinite(values).all()):
                raise InvalidInput(
                    "NotFinite", f"values of {name} do not fit into {shape.dtype}: export with --dtype float32"
                )
            yield (
                values.view(-1, shape.positions, shape.d_in).numpy(),
                fields[TOKEN_IDS][part].view(-1, shape.positions).numpy(),
            )

    def _row_fields(self, entry: ShardEntry, *names: str) -> dict[str, torch.Tensor]:
        """Fields of a shard's rows, and as `keep` which of them the hook's statistics count, bool [rows]."""
        fields = read_tensors(self._store, entry.parts[0], self._manifest.layout(entry, 0), names)
        if self._group == 0:
            return fields | {KEEP: torch.ones(entry.rows, dtype=torch.bool)}
        layout = self._manifest.layout(entry, self._group)
        return fields | {KEEP: read_tensors(self._store, entry.parts[self._group], layout, [KEEP])[KEEP].bool()}

    def _look_at_rows(self, wanted: torch.Tensor, *, drop_empty: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Which positions a context has, bool [context_size], and how many of them each context of each shard has."""
        seen = torch.zeros_like(wanted)
        counts: list[torch.Tensor] = []
        for entry in self._manifest.shards:
            fields = self._row_fields(entry, SEQUENCE, POSITION)
            rows = fields[KEEP] & wanted[fields[POSITION].long()]
            seen[fields[POSITION][rows].long()] = True
            places = fields[SEQUENCE][rows].long() - entry.start
            counts.append(torch.bincount(places, minlength=entry.stop - entry.start))
        return (wanted & seen if drop_empty else wanted), counts


def shuffled(
    batches: Iterator[ContextBatch], shape: DatasetShape, contexts: int, *, seed: int, beside: Path
) -> Iterator[ContextBatch]:
    """The same contexts in an order shuffled by a seed, by way of a file beside the output."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}-", dir=beside.parent) as scratch:
        values = np.memmap(
            Path(scratch) / "values",
            dtype=NUMPY_DTYPES[shape.dtype],
            mode="w+",
            shape=(contexts, shape.positions, shape.d_in),
        )
        token_ids = np.empty((contexts, shape.positions), dtype=np.int32)
        done = 0
        for activations, tokens in batches:
            values[done : done + len(tokens)] = activations
            token_ids[done : done + len(tokens)] = tokens
            done += len(tokens)
        order = np.random.default_rng(seed).permutation(contexts)
        for start in range(0, contexts, shape.contexts_per_batch):
            chosen = order[start : start + shape.contexts_per_batch]
            yield values[chosen], token_ids[chosen]
