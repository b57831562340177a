"""What saved SAEs tell of the activations that they were trained on, under the names of the SAE format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_job.models.hook_names import parse_hook
from sae_job.saes.config import Provenance
from sae_operator.api.activation_cache import ModelSource, Positions, Sampling

# Fields of `model.processing`, and the arguments of HookedTransformer.from_pretrained_no_processing.
_PROCESSING_ARGUMENTS = {
    "fold_layer_norm": "fold_ln",
    "center_writing_weights": "center_writing_weights",
    "center_unembed": "center_unembed",
    "fold_value_biases": "fold_value_biases",
}


def provenance_of(
    hook: str,
    *,
    model_name: str,
    model: ModelSource | None,
    dataset_path: str,
    context_size: int,
    sampling: Sampling,
    tokenizer: Mapping[str, Any],
) -> Provenance:
    """Provenance of SAEs on one hook.

    Args:
        hook: its key.
        model_name: the model, as it was asked for.
        model: how it was loaded, where that is known.
        dataset_path: the text, as it was asked for.
        context_size: tokens per context.
        sampling: how contexts became rows.
        tokenizer: what the index or manifest tells of it.
    """
    parsed = parse_hook(hook)
    return Provenance(
        model_name=model_name,
        hook_name=parsed.name,
        hook_head_index=parsed.head,
        dataset_path=dataset_path,
        context_size=context_size,
        prepend_bos=_begins_with_bos(sampling, tokenizer),
        seqpos_slice=_slice(sampling.positions),
        model_from_pretrained_kwargs={} if model is None else _arguments(model),
    )


def _begins_with_bos(sampling: Sampling, tokenizer: Mapping[str, Any]) -> bool:
    bos = tokenizer.get("bosTokenId", "unknown")
    begin = sampling.separators.begin_context
    if begin is None:
        return sampling.prepend_bos and bos is not None
    return begin in ("bos", str(bos))


def _slice(positions: Positions) -> tuple[int | None, ...]:
    if positions == Positions():
        return (None,)
    slice_ = (positions.start, positions.stop)
    return slice_ if positions.step == 1 else (*slice_, positions.step)


def _arguments(model: ModelSource) -> dict[str, Any]:
    """Of a model that TransformerLens processed: only what is not its default."""
    if model.processing is None:
        return {}
    return {name: True for field, name in _PROCESSING_ARGUMENTS.items() if getattr(model.processing, field)}
