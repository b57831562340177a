"""From planned contexts to the rows of a shard: which positions, in which forward passes, calibrated how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from sae_job.activations.base_rows import BaseRows
from sae_job.activations.codecs import CODECS
from sae_job.activations.contexts import ContextReader
from sae_job.activations.harvest import ActivationModel, ContextBatch, Encoding, HostBatch, HostCopy, harvest
from sae_job.activations.open_shard import OpenShard
from sae_job.activations.sink_filter import SinkFilter, row_norms
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import CacheIndex
from sae_job.text.usable import excluded_token_ids, usable_positions
from sae_operator.api.activation_cache import ActivationCacheSpec


class ShardFiller:
    """Runs a model over the contexts of shards.

    Args:
        store: the folder that the contexts lie in.
        index: the plan.
        spec: the cache.
        model: gives the hooks of `groups`.
        groups: groups whose rows are wanted.
        before_batch: called before each forward pass of a shard; ends the work by raising.

    Attributes:
        encoding: how rows are stored, and which of them are dropped.

    Raises:
        InvalidInput: no position of any context may become a row, or activations are not finite.
    """

    def __init__(
        self,
        store: ObjectStore,
        index: CacheIndex,
        spec: ActivationCacheSpec,
        model: ActivationModel,
        groups: Sequence[int],
        *,
        before_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._index = index
        self._spec = spec
        self._model = model
        self._before_batch = before_batch
        self._contexts = ContextReader(store, index)
        self._excluded = excluded_token_ids(spec.sampling, index.tokenizer.special_token_ids)
        self._positions = spec.sampling.positions.of(index.context_size)
        self._copies = HostCopy()
        self.encoding = self._calibrate({group: index.groups[group].hooks for group in groups})

    def fill(self, shard: OpenShard, base: BaseRows | None = None, *, stop: int | None = None) -> Iterator[int]:
        """Run the model until a shard is full; yields how many rows each batch gave.

        Args:
            shard: what to fill.
            base: its rows, where its first part is stored already.
            stop: the context after its last one; as planned when None.

        Raises:
            InvalidInput: too few rows pass the norm filter, or a stored part or contexts are damaged.
        """
        plan = self._index.shards[shard.number]
        stop = plan.stop if stop is None else stop
        encoding = self.encoding.only(shard.parts)
        for batch in harvest(
            self._model, self._batches(plan.start, stop, base), encoding=encoding, copies=self._copies
        ):
            yield shard.add(batch)
            if shard.full:
                return
        if base is not None:
            raise InvalidInput(
                "CorruptShard",
                f"shard {shard.number} of {self._store.uri} has rows of other contexts than planned: delete its "
                ".safetensors and .json, and raise spec.retry to write it again",
            )
        raise InvalidInput(
            "TooFewRows",
            f"the norm filter leaves only {shard.filled} of {shard.rows} rows of shard {shard.number}, and drops "
            f"{shard.dropped}: raise maxNormRatio, or set it to 0",
            field="spec.sampling.maxNormRatio",
        )

    def rows(self, start: int, stop: int) -> Iterator[HostBatch]:
        """Rows of the contexts `start` to `stop` (global indices), in the forward passes of a shard that begins
        there."""
        return harvest(self._model, self._batches(start, stop, None), encoding=self.encoding, copies=self._copies)

    def usable_counts(self, start: int, stop: int) -> torch.Tensor:
        """Of each of some contexts, the positions that may become rows before any filter by norm, int64 [contexts]."""
        return self._usable(self._contexts.read(start, stop)).sum(dim=1)

    def _batches(self, start: int, stop: int, base: BaseRows | None) -> Iterator[ContextBatch]:
        """The same forward passes whichever hooks are asked for: results hang on them in the last bits."""
        size = self._spec.model.batch_size
        for first in range(start, stop, size):
            self._before_batch()
            end = min(first + size, stop)
            if base is None:
                tokens = self._contexts.read(first, end)
                usable = self._usable(tokens).reshape(-1)
                wanted = None if bool(usable.all()) else torch.nonzero(usable).flatten()
                yield ContextBatch(first, tokens, wanted)
                continue
            wanted, places = base.of_contexts(first, end)
            if len(wanted) > 0:
                yield ContextBatch(first, self._contexts.read(first, end), wanted, places)

    def _usable(self, tokens: torch.Tensor) -> torch.Tensor:
        return usable_positions(tokens, self._excluded, self._positions)

    def _calibrate(self, hooks: Mapping[int, Sequence[str]]) -> Encoding:
        """Median norms, and what the number format needs to know, from the cache's first forward pass that has usable
        positions: every worker finds the same, whichever hooks it takes."""
        ratio = self._spec.sampling.max_norm_ratio
        codec = CODECS[self._spec.storage.dtype]
        filters = {group: SinkFilter(0, {}) for group in hooks}
        constants: dict[str, dict[str, torch.Tensor]] = {}
        if ratio == 0 and not codec.constants(1):
            return Encoding(codec, constants, filters, hooks)
        tokens, usable = self._first_usable_batch()
        activations = self._model.activations(tokens)
        for group, names in hooks.items():
            found = {hook: activations[hook] for hook in names}
            if ratio > 0:
                filters[group] = SinkFilter.calibrate(found, usable, ratio)
            for hook, values in found.items():
                rows = values[usable.to(values.device)]
                if ratio > 0:
                    # Whatever other hooks make of these rows: the constants of a hook are its own.
                    rows = rows[row_norms(rows) <= ratio * filters[group].median_norms[hook]]
                constants[hook] = codec.calibrate(rows)
        return Encoding(codec, constants, filters, hooks)

    def _first_usable_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [contexts, positions] of the first batch with usable positions, and which they are."""
        size = self._spec.model.batch_size
        for first in range(0, self._index.contexts, size):
            tokens = self._contexts.read(first, min(first + size, self._index.contexts))
            usable = self._usable(tokens)
            if bool(usable.any()):
                return tokens, usable
        raise InvalidInput(
            "TooFewRows", "no position of any context may become a row: see spec.sampling", field="spec.sampling"
        )
