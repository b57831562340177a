"""What is known of a model before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass

from sae_job.errors import InvalidInput
from sae_job.text.plan import ITEM_BYTES, contexts_per_block
from sae_operator.api.activation_cache import ModelSource


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model, as the hooks of a cache need it.

    Attributes:
        source: what tokenizer and weights are loaded from; a folder, for a model that lies in an object store.
        name: what the spec calls it.
        revision: commit on the Hub; what stands for one in a store; None for a folder.
        d_in: width of each hook's activations.
        context_limit: longest context that the model was made for; None when it has no limit.
        vocabulary: token ids are below this.
        parameter_bytes: memory of the weights up to the last hook, in the number format asked for.
        total_parameter_bytes: memory of all weights.
        predicts_tokens: whether it has an output head.
        layers: layers that are loaded.
        total_layers: layers of the whole model; None when it has no list of layers.
        forward_width: numbers per token that the modules of the widest layer give, all together.
        attention_heads: 0 for a model without attention.
    """

    source: ModelSource
    name: str
    revision: str | None
    d_in: dict[str, int]
    context_limit: int | None
    vocabulary: int
    parameter_bytes: int
    total_parameter_bytes: int
    predicts_tokens: bool
    layers: int | None
    total_layers: int | None
    forward_width: int = 0
    attention_heads: int = 0


def check_context_size(facts: ModelFacts, context_size: int, *, field: str = "spec.contextSize") -> None:
    """Raises InvalidInput when contexts are longer than the model takes."""
    if facts.context_limit is not None and context_size > facts.context_limit:
        raise InvalidInput(
            "ContextTooLong",
            f"{context_size} tokens are more than the {facts.context_limit} that {facts.name!r} takes; lower it",
            field=field,
        )


def check_batch_size(source: ModelSource, context_size: int, *, field: str = "spec.model.batchSize") -> None:
    """Raises InvalidInput when a forward pass takes more contexts than one block of text has.

    The norm filter is calibrated on the cache's first forward pass, which must be the same however long the cache is.
    """
    most = contexts_per_block(context_size)
    if source.batch_size > most:
        raise InvalidInput(
            "BatchTooLarge",
            f"{source.batch_size} contexts of {context_size} tokens are more than the {most} of a text block; lower it",
            field=field,
        )


def forward_bytes(facts: ModelFacts, source: ModelSource, context_size: int) -> int:
    """Memory that a forward pass needs at most, beside the weights: what a layer's modules give, and what hooks keep.

    Attention kernels other than the plain one keep no scores. The plain one is that of TransformerLens; where it is a
    model's own, the spec should say so.
    """
    # Autocast keeps float32 beside bfloat16.
    item = 6 if source.autocast else ITEM_BYTES[source.dtype]
    per_token = (facts.forward_width + sum(facts.d_in.values())) * item
    plain = source.loader == "TransformerLens" or source.attention_implementation == "eager"
    # Scores in float32 for the softmax, and rounded.
    per_pair = facts.attention_heads * (4 + item) if plain else 0
    return source.batch_size * context_size * (per_token + per_pair * context_size)
