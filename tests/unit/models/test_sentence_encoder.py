"""A real encoder: all-MiniLM-L6-v2, which predicts no tokens, and whose tokenizer has no BOS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae_job.errors import InvalidInput
from sae_job.models.load import inspect_model, load_full_model, load_hooked_model
from sae_job.text.tokenize import load_tokenizer
from sae_operator.api.activation_cache import ModelSource
from tests.testbed.data import ensure_sentence_encoder

HOOK = "encoder.layer.2"
SENTENCES = ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply today."]


@pytest.fixture(scope="module")
def folder() -> Path:
    torch.set_num_threads(1)
    return ensure_sentence_encoder()


@pytest.fixture(scope="module")
def source(folder: Path) -> ModelSource:
    return ModelSource(name=str(folder), dtype="float32")


def test_facts(source: ModelSource) -> None:
    facts = inspect_model(source, [HOOK, "encoder.layer.2.attention.self.query:11"])
    assert facts.d_in == {HOOK: 384, "encoder.layer.2.attention.self.query:11": 32}
    assert (facts.layers, facts.total_layers, facts.context_limit) == (3, 6, 512)
    assert not facts.predicts_tokens


def test_a_layer_in_the_middle_is_the_whole_models(source: ModelSource) -> None:
    from transformers import AutoModel

    tokenizer = load_tokenizer(source)
    assert tokenizer.bos_token_id is None
    tokens = torch.tensor([tokenizer(" ".join(SENTENCES))["input_ids"]])
    hooked = load_hooked_model(source, [HOOK], device="cpu")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(source.name)(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(hooked.activations(tokens)[HOOK], hidden[3])


def test_it_is_the_real_encoder(source: ModelSource) -> None:
    """Of three sentences the two that say nearly the same lie nearest, by the mean of their last layer."""
    tokenizer = load_tokenizer(source)
    hooked = load_hooked_model(source, ["encoder.layer.5"], device="cpu")
    vectors = []
    for sentence in SENTENCES:
        tokens = torch.tensor([tokenizer(sentence)["input_ids"]])
        vectors.append(torch.nn.functional.normalize(hooked.activations(tokens)["encoder.layer.5"][0].mean(0), dim=0))
    similarity = torch.stack(vectors) @ torch.stack(vectors).T
    assert similarity[0, 1] > 0.7
    assert similarity[0, 2] < 0.2


def test_it_has_no_loss(source: ModelSource) -> None:
    with pytest.raises(InvalidInput, match="predicts no tokens") as caught:
        load_full_model(source, device="cpu")
    assert caught.value.field == "spec.evaluation.metrics"
