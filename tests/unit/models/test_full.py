"""The whole model's loss, clean and with activations replaced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.models.full import FullModel, splice
from sae_job.models.load import load_full_model
from sae_operator.api.activation_cache import ModelSource
from tests.tiny_model import BOS, write_tiny_model

HOOK = "model.layers.1"
TOKENS = torch.tensor([[BOS, 10, 11, 12, BOS, 13], [BOS, 20, 21, 22, 23, 24]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    torch.set_num_threads(1)
    return ModelSource(name=str(write_tiny_model(tmp_path_factory.mktemp("model"))), dtype="float32")


@pytest.fixture(scope="module")
def model(source: ModelSource) -> FullModel:
    return load_full_model(source, device="cpu")


def test_the_clean_loss_is_the_librarys(source: ModelSource, model: FullModel) -> None:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source.name)(TOKENS, labels=TOKENS).loss
    total, count = model.cross_entropy(TOKENS)
    assert count == 10
    assert total / count == pytest.approx(float(expected), rel=1e-6)


def test_predictions_of_ignored_tokens_do_not_count_and_those_after_them_do(model: FullModel) -> None:
    _, count = model.cross_entropy(TOKENS, ignore_token_ids=[BOS])
    # The first position of a context is never predicted; the BOS in the middle is.
    assert count == 9


def test_the_same_activations_give_the_same_loss(model: FullModel) -> None:
    assert model.cross_entropy(TOKENS, replace={HOOK: lambda x: x.double()}) == model.cross_entropy(TOKENS)


def test_ablation_costs_loss_and_leaves_no_hook_behind(model: FullModel) -> None:
    clean = model.cross_entropy(TOKENS)
    assert model.cross_entropy(TOKENS, replace={HOOK: torch.zeros_like}) != clean
    assert model.cross_entropy(TOKENS) == clean


def test_activations_at_ignored_tokens_are_not_given_to_the_replacement(model: FullModel) -> None:
    seen: list[Tensor] = []

    def look(activations: Tensor) -> Tensor:
        seen.append(activations)
        return activations

    model.cross_entropy(TOKENS, replace={HOOK: look}, ignore_token_ids=[BOS])
    assert [tuple(activations.shape) for activations in seen] == [(9, 32)]


def test_a_replacement_that_never_happens_is_no_score(model: FullModel) -> None:
    with pytest.raises(ValueError, match=r"did not come to \['model.layers'\]"):
        model.cross_entropy(TOKENS, replace={"model.layers": torch.zeros_like})


def test_the_number_format_is_kept_and_the_models_own_tensor_is_not_written_to() -> None:
    activation = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    replaced = splice(activation, lambda x: 2 * x.double(), torch.tensor([[True, False]]))
    assert replaced.dtype == torch.bfloat16
    assert replaced.tolist() == [[[1.0] * 3, [2.0] * 3]]
    assert activation.tolist() == [[[1.0] * 3] * 2]


def test_an_encoder_has_no_loss(tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("bert")
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(path)
    with pytest.raises(InvalidInput, match="predicts no tokens") as caught:
        load_full_model(ModelSource(name=str(path)), device="cpu")
    assert (caught.value.reason, caught.value.field) == ("NoLanguageModelHead", "spec.evaluation.metrics")
