"""Activations of a model that runs beside the training: the batches of a cache that is never stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sae_job.activations.harvest import ActivationModel
from sae_job.activations.manifest import HookStatistics
from sae_job.storage.base import ObjectStore
from sae_operator.api.activation_cache import ActivationCacheSpec

# Rows that the scale of activations is measured on: enough for three digits of a mean norm.
STATISTICS_ROWS = 2**16
# Shards that are mixed, and computed ahead: together those that a live source's memory is planned for.
MIX_SHARDS, SHARDS_AHEAD = 8, 2


class LiveSource:
    """A model and the contexts that it runs on: what a cache of the same spec would hold.

    Args:
        store: the live source's folder (`identity.live_location`), with the contexts that prepare stored.
        spec: what the live source would be as a cache (`identity.cache_of`).
        model: gives activations at all hooks of the spec, as for a cache worker:
            `load_hooked_model(spec.model, keys, revision=index.model.revision)`.

    Attributes:
        index: the plan that prepare stored: `index.model.d_in`, `index.context_size`, `index.tokenizer`.

    Raises:
        InvalidInput: the folder holds no contexts.
    """

    def __init__(self, store: ObjectStore, spec: ActivationCacheSpec, model: ActivationModel) -> None:
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """Rows of one pass over the text, as `manifest.tokens` of a cache."""
        raise NotImplementedError

    def statistics(self, rows: int = STATISTICS_ROWS) -> list[HookStatistics]:
        """Measured statistics of every hook, over the first contexts that hold `rows` rows (or over all), held-out ones
        included. The same for every attempt: a function of contexts, model and device."""
        raise NotImplementedError

    def held_out_contexts(self, rows: int) -> int:
        """As `reader.held_out_contexts_for` of a cache: smallest number of first contexts that hold `rows` rows.

        Raises:
            InvalidInput: one pass has fewer rows.
        """
        raise NotImplementedError


class LiveActivations:
    """Endless batches of rows that a model computes in a background thread: the members of `CachedActivations`.

    Given the same mixing and seed, batches, held-out rows and state are those of a cache of the same spec. A restored
    stream computes the shards of the current phase again. What goes wrong in the background is raised by `next_batch`.

    Memory: `mix_shards + SHARDS_AHEAD` shards of `spec.storage.shard_bytes`.
    """

    @classmethod
    def open(
        cls,
        source: LiveSource,
        *,
        hooks: Sequence[str],
        batch_size: int,
        seed: int,
        held_out_contexts: int,
        total_rows: int | None = None,
        mix_shards: int = MIX_SHARDS,
        device: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> LiveActivations:
        """Begin to compute; arguments as of `CachedActivations.open`.

        Raises:
            InvalidInput: the spec has no such hook, or no rows are left to train on.
        """
        raise NotImplementedError

    @property
    def training_rows(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    def next_batch(self) -> dict[str, torch.Tensor]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def held_out(self, max_rows: int) -> Any:
        """The `HeldOut` of `CachedActivations.held_out`."""

    def close(self) -> None:
        """End the background thread."""
