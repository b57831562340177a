"""What saved SAEs tell of their activations."""

from __future__ import annotations

from typing import Any

import pytest

from sae_job.saes.config import Provenance
from sae_job.steps.provenance import provenance_of
from sae_operator.api.activation_cache import ModelSource, Sampling


def provenance(
    hook: str = "model.layers.7",
    *,
    model: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> Provenance:
    return provenance_of(
        hook,
        model_name="gpt2",
        model=ModelSource.model_validate({"name": "gpt2", **(model or {})}),
        dataset_path="some/text",
        context_size=64,
        sampling=Sampling.model_validate(sampling or {}),
        tokenizer={"bosTokenId": 0} if tokenizer is None else tokenizer,
    )


def test_plain_activations_tell_the_defaults_of_the_format() -> None:
    assert provenance() == Provenance(
        model_name="gpt2", hook_name="model.layers.7", dataset_path="some/text", context_size=64
    )
    assert provenance().hook_layer == 7


def test_a_head_is_told_apart_from_its_hook() -> None:
    found = provenance("blocks.3.attn.hook_z:11")
    assert (found.hook_name, found.hook_head_index, found.hook_layer) == ("blocks.3.attn.hook_z", 11, 3)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ({}, (None,)),
        ({"start": 2}, (2, None)),
        ({"start": 2, "stop": -3}, (2, -3)),
        ({"stop": 8, "step": 2}, (0, 8, 2)),
    ],
)
def test_positions_are_a_slice(positions: dict[str, int], expected: tuple[int | None, ...]) -> None:
    found = provenance(sampling={"positions": positions}).seqpos_slice
    assert found == expected
    full = range(64)
    start, stop, step = (*found, None, None)[:3] if found != (None,) else (None, None, None)
    assert full[slice(start, stop, step)] == Sampling.model_validate({"positions": positions}).positions.of(64)


@pytest.mark.parametrize(
    ("sampling", "tokenizer", "expected"),
    [
        ({}, {"bosTokenId": 0}, True),
        ({}, {"bosTokenId": None}, False),
        ({"prependBos": False}, {"bosTokenId": 0}, False),
        ({"prependBos": False, "separators": {"beginContext": "bos"}}, {"bosTokenId": 0}, True),
        ({"separators": {"beginContext": "none"}}, {"bosTokenId": 0}, False),
        ({"separators": {"beginContext": "0"}}, {"bosTokenId": 0}, True),
        ({"separators": {"beginContext": "eos"}}, {"bosTokenId": 0}, False),
        ({}, {}, True),
    ],
)
def test_bos_is_told_where_contexts_begin_with_it(
    sampling: dict[str, Any], tokenizer: dict[str, Any], expected: bool
) -> None:
    assert provenance(sampling=sampling, tokenizer=tokenizer).prepend_bos is expected


def test_processing_is_told_under_the_names_that_load_the_model_again() -> None:
    processing = {"foldLayerNorm": True, "centerUnembed": True}
    found = provenance(model={"loader": "TransformerLens", "processing": processing})
    assert found.model_from_pretrained_kwargs == {"fold_ln": True, "center_unembed": True}
    assert provenance(model={"loader": "TransformerLens"}).model_from_pretrained_kwargs == {}
