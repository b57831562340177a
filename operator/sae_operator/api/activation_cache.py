"""ActivationCache: activations of one model on one dataset at one or more hook points."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from sae_operator.api.base import (
    S3_PATTERN,
    TEXT_PATTERN,
    ApiModel,
    Count,
    CountOrZero,
    Rule,
    ShortText,
    TransitionRule,
    immutable,
    raised_only,
)
from sae_operator.api.run_settings import RunSettings
from sae_operator.api.store import StoreAccess, StoreLocation, has_no_parent_segment

Dtype = Literal["float32", "bfloat16", "float16"]
StorageDtype = Literal["float32", "bfloat16", "float16", "float8", "int8"]
# Of one cache, or of one live source.
MAX_HOOKS = 16
HOOK_NAME_PATTERN = r"^[A-Za-z0-9_.]+$"
HookName = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=HOOK_NAME_PATTERN)]
HOOK_KEY_PATTERN = r"^[A-Za-z0-9_.]+(:(0|[1-9][0-9]{0,3}))?$"
HookKey = Annotated[str, StringConstraints(min_length=1, max_length=261, pattern=HOOK_KEY_PATTERN)]
SPECIAL_TOKEN_PATTERN = r"^(none|bos|eos|sep|[0-9]{1,9})$"
SpecialToken = Annotated[str, StringConstraints(max_length=9, pattern=SPECIAL_TOKEN_PATTERN)]


def _rules_of_address(field: str) -> tuple[Rule, ...]:
    """The rules of a field that may hold an `s3://` address, and of the `store` beside it."""

    def is_address(source: ModelSource | DatasetSource) -> bool:
        return getattr(source, field).startswith("s3://")

    return (
        Rule(
            f"!has(self.store) || self.{field}.startsWith('s3://')",
            lambda source: source.store is None or is_address(source),
            f"store says how to reach an s3:// {field}; leave it out otherwise",
            "store",
        ),
        Rule(
            f"!self.{field}.startsWith('s3://') || !self.{field}.matches('(^|/)\\\\.\\\\.(/|$)')",
            lambda source: not is_address(source) or has_no_parent_segment(getattr(source, field)),
            f"{field} must not contain '..' segments",
            field,
        ),
        Rule(
            f"!self.{field}.startsWith('s3://') || self.{field}.matches('{S3_PATTERN}')",
            lambda source: not is_address(source) or re.match(S3_PATTERN, getattr(source, field)) is not None,
            f"{field} must be s3://bucket/prefix; a bucket's name has 3 to 63 lower-case letters, digits, '.' and '-'",
            field,
        ),
    )


class Processing(ApiModel):
    """Changes of the weights that leave the model's function as it is, but not its activations; all recorded."""

    fold_layer_norm: bool = False
    """Fold the weights of layer norms into the maps behind them."""
    center_writing_weights: bool = False
    """Subtract the mean from what writes to the residual stream."""
    center_unembed: bool = False
    """Subtract the mean from the unembedding."""
    fold_value_biases: bool = False
    """Fold value biases into the output bias of attention."""


class ModelSource(ApiModel):
    RULES = (
        *_rules_of_address("name"),
        Rule(
            "self.loader == 'TransformerLens' || !has(self.processing)",
            lambda model: model.loader == "TransformerLens" or model.processing is None,
            "processing is only for loader TransformerLens",
            "processing",
        ),
    )

    name: ShortText
    """Id of a model on the Hugging Face Hub, a folder in the pod, or the `s3://` address of a folder."""
    store: StoreAccess | None = None
    """How to reach an `s3://` name."""
    revision: ShortText | None = None
    """Branch, tag or commit on the Hub; the default branch when empty. The commit is recorded in the manifest."""
    loader: Literal["HuggingFace", "TransformerLens"] = "HuggingFace"
    """Library that loads the model. `HuggingFace`: hook names are dotted module paths, e.g. `transformer.h.7`.
    `TransformerLens`: hook names are its own, e.g. `blocks.7.hook_resid_post`."""
    processing: Processing | None = None
    """TransformerLens: changes of the weights; none when empty."""
    dtype: Dtype = "bfloat16"
    """Number format of weights and forward pass."""
    autocast: bool = False
    """Run the forward pass in bfloat16 where PyTorch's autocast does so, with weights in `dtype`."""
    attention_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    """Attention kernel, by its name in Transformers; the model's default when empty."""
    compile: bool = False
    """Compile the model with `torch.compile` before the first forward pass."""
    device_map: Literal["single", "auto"] = "single"
    """`auto`: spread the layers over all GPUs of the pod; for models that do not fit on one."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings; only where the operator's administrator allows it. Pin
    `revision` to a commit."""
    mirror: bool = False
    """Copy a Hub model's files beside the cache once, in `prepare`, so that the GPU pods need nothing but the store."""
    batch_size: Annotated[Count, Field(le=4096)] = 16
    """Contexts per forward pass. Part of the cache's identity, since results depend on it in the last bits."""


class DatasetSource(ApiModel):
    RULES = _rules_of_address("path")

    path: ShortText
    """Id of a dataset on the Hugging Face Hub, a file or folder in the pod, or the `s3://` address of one (parquet,
    JSON lines, arrow, CSV, text, or what `save_to_disk` wrote)."""
    store: StoreAccess | None = None
    """How to reach an `s3://` path."""
    name: ShortText | None = None
    """Configuration of the dataset; the default one when empty."""
    split: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=TEXT_PATTERN)] = "train"
    """Split of the dataset."""
    revision: ShortText | None = None
    """Branch, tag or commit on the Hub; the default branch when empty."""
    data_files: Annotated[list[ShortText], Field(max_length=256)] = Field(default_factory=list)
    """Files of the dataset to read; all when empty."""
    column: Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=TEXT_PATTERN)] | None = None
    """Column with text or token ids; the first of `tokens`, `input_ids`, `text` and `problem` that exists when
    empty. Rows of token ids are taken as they are: each one's first `contextSize` ids are a context."""
    streaming: bool = True
    """Read a Hub dataset as a stream instead of downloading it whole."""


class Hook(ApiModel):
    name: HookName
    """Module whose output is stored, by its dotted path, e.g. `model.layers.8`; `<path>.input` is its input instead,
    e.g. `model.layers.8.self_attn.o_proj.input`. With loader TransformerLens one of its names, e.g.
    `blocks.8.hook_resid_post`. What has a dimension of heads is flattened to heads · width."""
    head_index: Annotated[int, Field(ge=0, le=4095)] | None = None
    """Attention head that is stored alone, where the hook has a dimension of heads; the hook is then called
    `name:headIndex`."""

    @property
    def key(self) -> str:
        """What the hook is called in manifests, shards and `saes[].hook`."""
        return self.name if self.head_index is None else f"{self.name}:{self.head_index}"


class Separators(ApiModel):
    """Special tokens that packing inserts, each only where the next token is not already that one: `bos`, `eos` or
    `sep` of the tokenizer, a token id, or `none`. What is empty follows `prependBos`."""

    begin_context: SpecialToken | None = None
    """Stands at position 0 of every context; `bos` with prependBos."""
    begin_document: SpecialToken | None = None
    """Is the first token of every document; `none` when empty."""
    between_documents: SpecialToken | None = None
    """Stands between two documents that share a context; `bos` with prependBos."""


class Positions(ApiModel):
    """A slice of positions of each context, as Python has it."""

    start: Annotated[int, Field(ge=-1_048_576, le=1_048_576)] = 0
    """First position; counted from the end when negative."""
    stop: Annotated[int, Field(ge=-1_048_576, le=1_048_576)] | None = None
    """Position behind the last one; counted from the end when negative, the end when empty."""
    step: Count = 1
    """Distance between positions."""

    def of(self, context_size: int) -> range:
        """The positions of a context of this size."""
        return range(context_size)[self.start : self.stop : self.step]


class Sampling(ApiModel):
    """Which positions of a context become rows of the cache."""

    prepend_bos: bool = True
    """Begin every context with the tokenizer's BOS token, and separate documents by it. Without effect for tokenizers
    that have none, and for datasets of token ids."""
    separators: Separators = Field(default_factory=Separators)
    """Special tokens that packing inserts, one by one. Without effect for datasets of token ids."""
    positions: Positions = Field(default_factory=Positions)
    """Positions that may become rows; the model sees all of them."""
    exclude_special_tokens: bool = True
    """Drop rows of special tokens (BOS, EOS, padding)."""
    exclude_token_ids: Annotated[list[CountOrZero], Field(max_length=1024)] = Field(default_factory=list)
    """Drop rows of these tokens, too."""
    max_norm_ratio: Annotated[float, Field(ge=0, le=1e6)] = 10.0
    """Drop rows whose norm is above this multiple of the median norm: attention sinks, which otherwise hold most of the
    variance. 0 keeps all."""


def _position(field: str) -> str:
    """CEL: a position of a context as it is counted from the front."""
    position = f"self.sampling.positions.{field}"
    return f"({position} < 0 ? {position} + self.contextSize : {position})"


# What a cache and a live source have in common.
UNIQUE_HOOKS = Rule(
    "self.hooks.all(h, self.hooks.exists_one(g, g == h))",
    lambda source: len({hook.key for hook in source.hooks}) == len(source.hooks),
    "hooks must be unique",
    "hooks",
)
SOME_POSITIONS = Rule(
    f"{_position('start')} < self.contextSize && (!has(self.sampling.positions.stop)"
    f" || ({_position('stop')} > 0 && {_position('start')} < {_position('stop')}))",
    lambda source: len(source.sampling.positions.of(source.context_size)) > 0,
    "sampling.positions leaves no position of a context",
    "sampling.positions",
)


class CacheStorage(StoreLocation):
    RULES = (
        *StoreLocation.RULES,
        Rule(
            "!has(self.bufferBytes) || self.bufferBytes >= 2 * self.shardBytes",
            lambda storage: storage.buffer_bytes is None or storage.buffer_bytes >= 2 * storage.shard_bytes,
            "bufferBytes must be at least twice shardBytes: one shard is filled while another is stored",
            "bufferBytes",
        ),
    )

    dtype: StorageDtype = "bfloat16"
    """Number format of the stored activations. `int8`: centred and scaled per dimension and row; `float8`: scaled per
    row. Both take half of `bfloat16`."""
    shard_bytes: Annotated[Count, Field(ge=4096, le=2**34)] = 2**28
    """Approximate size of a shard file. A shard holds as many rows as fit."""
    buffer_bytes: Count | None = None
    """Memory of one worker for shards that are being filled and stored: as many as fit, two to five; three when
    empty."""
    max_bytes: Count | None = None
    """Refuse to build a cache that is larger than this."""


class ActivationCacheSpec(ApiModel):
    RULES = (UNIQUE_HOOKS, SOME_POSITIONS)
    # parallelism, run and suspend may change at any time.
    TRANSITION_RULES = (
        *(immutable(field) for field in ("model", "dataset", "contextSize", "seed", "sampling", "storage")),
        TransitionRule(
            "oldSelf.hooks.all(h, self.hooks.exists(g, g == h))",
            "hooks can only be added; create a new resource instead",
            "hooks",
        ),
        raised_only("tokens"),
        raised_only("retry"),
    )

    model: ModelSource
    """The language model."""
    dataset: DatasetSource
    """The text."""
    hooks: Annotated[list[Hook], Field(min_length=1, max_length=MAX_HOOKS)]
    """Where activations are taken; several hooks share one forward pass. More may be added later: the cache is
    extended."""
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
