"""What is known of a model before its weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sae_job.errors import InvalidInput
from sae_job.text.plan import contexts_per_block
from sae_operator.api.activation_cache import ModelSource


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model, as the hooks of a cache need it.

    Attributes:
        name: Hub id or folder.
        revision: commit on the Hub; None for a folder.
        d_in: width of each hook's activations.
        context_limit: longest context that the model was made for; None when it has no limit.
        vocabulary: token ids are below this.
        parameter_bytes: memory of the weights up to the last hook, in the number format asked for.
        total_parameter_bytes: memory of all weights.
        predicts_tokens: whether it has an output head.
        layers: layers that are loaded.
        total_layers: layers of the whole model; None when it has no list of layers.
    """

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


def nearest_names(name: str, names: Sequence[str], *, layers: Sequence[str] = (), count: int = 3) -> list[str]:
    """Names that are most like a wrong one, best first.

    Args:
        layers: paths of the lists of layers; TransformerLens' `blocks.8.hook_resid_post` stands for `<list>.8`.
    """
    import difflib
    import re

    nearest: list[str] = []
    if numbered := re.search(r"\.(\d+)(\.|$)", name):
        nearest = [there for path in layers if (there := f"{path}.{numbered[1]}") in names]
    nearest += difflib.get_close_matches(name, [there for there in names if there not in nearest], n=count, cutoff=0)
    return nearest[:count]
