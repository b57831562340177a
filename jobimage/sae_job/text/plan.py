"""The plan of a cache, `tokens/index.json`: which contexts there are and which of them each shard takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectInfo, ObjectNotFound, ObjectStore
from sae_operator.api.activation_cache import ActivationCacheSpec

INDEX_KEY = "tokens/index.json"
# Blocks hold about this many tokens, whatever the context size: small enough for memory, few enough to list.
BLOCK_TOKENS = 2**20
# `token_ids`, `sequence` and `position` of a row, int32 each; a later group of hooks has one byte instead.
ROW_OVERHEAD_BYTES = 12
LATER_GROUP_OVERHEAD_BYTES = 1
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}
# The scale that 8-bit formats store beside each row of a hook.
SCALE_BYTES = {"float8": 4, "int8": 4}
# Part of a shard's rows that may be dropped by the norm filter before the shard runs short.
SLACK_FRACTION = 32


class IndexPart(BaseModel):
    """A part of the index: camelCase in JSON; fields of a newer version are ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, extra="ignore", frozen=True
    )


class BlockEntry(IndexPart):
    """One block of contexts: how many it holds, and its checksum."""

    contexts: int
    sha256: str


class TokenizerRecord(IndexPart):
    """The tokenizer that made the contexts; `sha256` is over its full serialisation, empty for a model without one.

    The last three are ids of the tokens that packing inserted; null where it inserted none.
    """

    name: str
    sha256: str
    bos_token_id: int | None
    special_token_ids: list[int]
    begin_context: int | None = None
    begin_document: int | None = None
    between_documents: int | None = None


class ModelRecord(IndexPart):
    """The model: its commit (null for a folder) and the width of each hook's activations."""

    name: str
    revision: str | None
    d_in: dict[str, int]


class DatasetRecord(IndexPart):
    """The data set: its commit on the Hub, or the fingerprint of local files."""

    path: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    column: str | None = None
    tokenized: bool = False
    """Whether the column holds token ids."""


class ShardPlan(IndexPart):
    """One shard: `rows` rows, taken from the contexts `start` (global index) up to, but not including, `stop`."""

    start: int
    stop: int
    rows: int


class HookGroup(IndexPart):
    """Hooks whose activations lie together in one file per shard: those that a cache began with, or that one extension
    added."""

    hooks: list[str]


class CacheIndex(IndexPart):
    """What prepare decides and cache workers follow.

    Context g lies in block `g // contexts_per_block` at place `g % contexts_per_block`.
    """

    format_version: Literal[1] = 1
    context_size: int
    contexts_per_block: int
    blocks: list[BlockEntry]
    tokenizer: TokenizerRecord
    model: ModelRecord
    dataset: DatasetRecord
    exhausted: bool
    """Whether the blocks hold all contexts that the data set gives."""
    rows_per_shard: int
    slack: int
    """Usable positions that a full shard's contexts hold beyond its rows."""
    shards: list[ShardPlan] = Field(default_factory=list)
    tokens: int
    """Rows of all shards together."""
    groups: list[HookGroup]
    """All hooks of the cache, in the order in which they came to it."""

    @property
    def contexts(self) -> int:
        return sum(block.contexts for block in self.blocks)

    def group_widths(self, group: int) -> dict[str, int]:
        """Width of each hook of a group, in its order."""
        return {hook: self.model.d_in[hook] for hook in self.groups[group].hooks}

    @classmethod
    def load(cls, store: ObjectStore) -> CacheIndex | None:
        """The index below a cache's prefix; None when prepare has not written one.

        Raises:
            InvalidInput: what is there is no index of this format version.
        """
        try:
            data = store.get(INDEX_KEY)
        except ObjectNotFound:
            return None
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            raise InvalidInput(
                "IndexUnreadable",
                f"{store.uri}/{INDEX_KEY} is not an index of cache format 1; remove the cache and build it again",
            ) from error

    def encode(self) -> bytes:
        return (self.model_dump_json(by_alias=True) + "\n").encode()

    def save(self, store: ObjectStore, *, over: ObjectInfo | None = None, first: bool = False) -> None:
        """Store it, in place of what is there.

        Args:
            store: the cache's folder.
            over: what must be there.
            first: nothing must be there.

        Raises:
            PreconditionFailed: another prepare was faster.
        """
        store.put(INDEX_KEY, self.encode(), if_match=None if over is None else over.etag, if_absent=first)


def block_key(block: int) -> str:
    """Key of a block's contexts, below the cache's prefix."""
    return f"tokens/{block:06d}.safetensors"


def block_sidecar_key(block: int) -> str:
    """Key of a block's sidecar, written after its contexts."""
    return f"tokens/{block:06d}.json"


def contexts_per_block(context_size: int) -> int:
    """Contexts in a full block."""
    return max(1, BLOCK_TOKENS // context_size)


def row_bytes(d_in: Mapping[str, int], dtype: str, group: int = 0) -> int:
    """Bytes of one row of a group's part of a shard: its hooks' activations, with their scales, and in group 0 the
    row's token id, sequence and position, in later ones whether to keep it.

    Args:
        d_in: width of each of the group's hooks.
        dtype: as in `storage.dtype`.
        group: number of the group.
    """
    overhead = ROW_OVERHEAD_BYTES if group == 0 else LATER_GROUP_OVERHEAD_BYTES
    return sum(d_in.values()) * ITEM_BYTES[dtype] + len(d_in) * SCALE_BYTES.get(dtype, 0) + overhead


def rows_per_shard(spec: ActivationCacheSpec, d_in: Mapping[str, int]) -> int:
    """Rows of a full shard: as many as fit into `storage.shardBytes`, at least 1.

    Args:
        spec: the cache.
        d_in: width of each hook that the cache begins with.
    """
    return max(1, spec.storage.shard_bytes // row_bytes(d_in, spec.storage.dtype))


def slack_for(rows: int, spec: ActivationCacheSpec) -> int:
    """Usable positions beyond `rows` that a shard's contexts must hold, so that the norm filter may drop some.

    0 without the filter.
    """
    if spec.sampling.max_norm_ratio == 0:
        return 0
    return -(-rows // SLACK_FRACTION) + spec.context_size


@dataclass(frozen=True)
class Plan:
    """Shards of a cache, and how many rows they hold; fewer than asked for when the contexts do not suffice."""

    shards: list[ShardPlan]
    rows: int


def plan_shards(
    usable: Sequence[int] | np.ndarray[Any, Any], tokens: int, spec: ActivationCacheSpec, *, shard_rows: int
) -> Plan:
    """Deal consecutive contexts to shards until `tokens` rows are planned or the contexts run out.

    The bounds of a full shard depend on the contexts before its end alone: a plan for more tokens begins with the
    full shards of a plan for fewer.

    Args:
        usable: per context, in shuffled order, the positions that may become rows.
        tokens: rows wanted.
        shard_rows: rows of a full shard.
    """
    total = np.concatenate([[0], np.cumsum(np.asarray(usable, dtype=np.int64))])
    shards: list[ShardPlan] = []
    start = planned = 0
    while planned < tokens:
        rows = min(shard_rows, tokens - planned)
        stop = _stop(total, start, rows + slack_for(rows, spec))
        if stop is None:
            rows = _rows_that_fit(int(total[-1] - total[start]), rows, spec)
            if rows > 0:
                shards.append(ShardPlan(start=start, stop=len(total) - 1, rows=rows))
                planned += rows
            break
        shards.append(ShardPlan(start=start, stop=stop, rows=rows))
        planned += rows
        start = stop
    return Plan(shards=shards, rows=planned)


def _stop(total: np.ndarray[Any, Any], start: int, wanted: int) -> int | None:
    """First bound at which the contexts from `start` hold `wanted` usable positions; None when they never do."""
    stop = int(np.searchsorted(total, total[start] + wanted, side="left"))
    return stop if stop < len(total) else None


def _rows_that_fit(usable: int, limit: int, spec: ActivationCacheSpec) -> int:
    """Largest number of rows below `limit` whose slack the usable positions allow."""
    low, high = 0, limit - 1
    while low < high:
        middle = (low + high + 1) // 2
        if middle + slack_for(middle, spec) <= usable:
            low = middle
        else:
            high = middle - 1
    return low
