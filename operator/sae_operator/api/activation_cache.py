"""ActivationCache: activations of one model on one dataset at one or more hook points."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from sae_operator.api.base import (
    TEXT_PATTERN,
    ApiModel,
    Count,
    CountOrZero,
    Rule,
    ShortText,
    immutable,
    raised_only,
)
from sae_operator.api.run_settings import RunSettings
from sae_operator.api.store import StoreLocation

Dtype = Literal["float32", "bfloat16", "float16"]
HOOK_NAME_PATTERN = r"^[A-Za-z0-9_.]+$"
HookName = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=HOOK_NAME_PATTERN)]


class ModelSource(ApiModel):
    name: ShortText
    """Id of a model on the Hugging Face Hub, or a folder in the pod."""
    revision: ShortText | None = None
    """Branch, tag or commit on the Hub; the default branch when empty. The commit is recorded in the manifest."""
    loader: Literal["HuggingFace"] = "HuggingFace"
    """Library that loads the model. Hook names are dotted module paths, e.g. `transformer.h.7`."""
    dtype: Dtype = "bfloat16"
    """Number format of weights and forward pass."""
    batch_size: Annotated[Count, Field(le=4096)] = 16
    """Contexts per forward pass. Part of the cache's identity, since results depend on it in the last bits."""


class DatasetSource(ApiModel):
    path: ShortText
    """Id of a dataset on the Hugging Face Hub, or a file or folder in the pod (parquet, JSON lines, text)."""
    name: ShortText | None = None
    """Configuration of the dataset; the default one when empty."""
    split: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=TEXT_PATTERN)] = "train"
    """Split of the dataset."""
    revision: ShortText | None = None
    """Branch, tag or commit on the Hub; the default branch when empty."""
    data_files: Annotated[list[ShortText], Field(max_length=256)] = Field(default_factory=list)
    """Files of the dataset to read; all when empty."""
    column: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=TEXT_PATTERN)] | None = None
    """Column with text; the first of `text` and `problem` that exists when empty."""
    streaming: bool = True
    """Read a Hub dataset as a stream instead of downloading it whole."""


class Hook(ApiModel):
    name: HookName
    """Module whose output is stored, by its dotted path, e.g. `model.layers.8`."""


class Sampling(ApiModel):
    """Which positions of a context become rows of the cache."""

    prepend_bos: bool = True
    """Begin every context with the tokenizer's BOS token, and separate documents by it. Without effect for tokenizers
    that have none."""
    exclude_special_tokens: bool = True
    """Drop rows of special tokens (BOS, EOS, padding)."""
    max_norm_ratio: Annotated[float, Field(ge=0, le=1e6)] = 10.0
    """Drop rows whose norm is above this multiple of the median norm: attention sinks, which otherwise hold most of the
    variance. 0 keeps all."""


class CacheStorage(StoreLocation):
    dtype: Dtype = "bfloat16"
    """Number format of the stored activations."""
    shard_bytes: Annotated[Count, Field(ge=4096, le=2**34)] = 2**28
    """Approximate size of a shard file. A shard holds as many rows as fit."""
    max_bytes: Count | None = None
    """Refuse to build a cache that is larger than this."""


class ActivationCacheSpec(ApiModel):
    RULES = (
        Rule(
            "self.hooks.all(h, self.hooks.exists_one(g, g.name == h.name))",
            lambda spec: len({hook.name for hook in spec.hooks}) == len(spec.hooks),
            "names of hooks must be unique",
            "hooks",
        ),
    )
    # parallelism, run and suspend may change at any time.
    TRANSITION_RULES = (
        *(immutable(field) for field in ("model", "dataset", "hooks", "contextSize", "seed", "sampling", "storage")),
        raised_only("tokens"),
        raised_only("retry"),
    )

    model: ModelSource
    """The language model."""
    dataset: DatasetSource
    """The text."""
    hooks: Annotated[list[Hook], Field(min_length=1, max_length=16)]
    """Where activations are taken; several hooks share one forward pass."""
    context_size: Annotated[Count, Field(ge=2, le=1_048_576)] = 128
    """Tokens per context."""
    tokens: Count
    """Rows to store, after filters. May be raised later: the cache is extended."""
    seed: CountOrZero = 0
    """Seed of the order of contexts and rows."""
    sampling: Sampling = Field(default_factory=Sampling)
    """Which positions become rows."""
    storage: CacheStorage
    """Where and how activations are stored; the cache lies at `<uri>/<namespace>/<identity hash>/`."""
    parallelism: Annotated[Count, Field(le=1024)] = 1
    """Pods that write shards at the same time."""
    run: RunSettings = Field(default_factory=RunSettings)
    """Pod and Job settings; may be changed for the next attempt."""
    suspend: bool = False
    """Stop the work and free its pods; what is written stays."""
    retry: CountOrZero = 0
    """Raise this number to run a failed resource again."""
