"""Texts to token ids: nothing is cut, nothing is put in front, and special tokens are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_job.errors import InvalidInput
from sae_job.text.contexts import SpecialTokens
from sae_job.text.tokenize import TextTokenizer, load_tokenizer
from sae_operator.api.activation_cache import ModelSource, Separators
from tests.tiny_model import BOS, EOS, PAD, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> TextTokenizer:
    return TextTokenizer(load_tokenizer(ModelSource(name=str(model))))


def test_a_text_longer_than_the_models_context_is_not_cut(tokenizer: TextTokenizer) -> None:
    (ids,) = tokenizer.encode(["x" * 3000])
    assert ids.shape == (3000,)


def test_the_tokenizers_own_bos_is_left_out(tokenizer: TextTokenizer) -> None:
    assert tokenizer.tokenizer("hi").input_ids[0] == BOS
    (ids,) = tokenizer.encode(["hi"])
    assert BOS not in ids.tolist()


def test_an_empty_text_gives_no_tokens(tokenizer: TextTokenizer) -> None:
    empty, other = tokenizer.encode(["", "a"])
    assert (len(empty), len(other)) == (0, 1)


def test_bos_begins_contexts_and_separates_documents_only_where_it_is_asked_for(tokenizer: TextTokenizer) -> None:
    assert tokenizer.packing(prepend_bos=True) == SpecialTokens(begin_context=BOS, separator=BOS)
    assert tokenizer.packing(prepend_bos=False) == SpecialTokens()


def test_separators_are_the_tokenizers_tokens_or_ids(tokenizer: TextTokenizer) -> None:
    separators = Separators(begin_context="none", begin_document="eos", between_documents="7")
    assert tokenizer.packing(prepend_bos=True, separators=separators) == SpecialTokens(None, EOS, 7)
    left_out = Separators(between_documents="eos")
    assert tokenizer.packing(prepend_bos=True, separators=left_out) == SpecialTokens(BOS, None, EOS)


def test_a_special_token_that_the_tokenizer_lacks_is_told(tokenizer: TextTokenizer) -> None:
    with pytest.raises(InvalidInput, match="no SEP token") as caught:
        tokenizer.packing(prepend_bos=True, separators=Separators(between_documents="sep"))
    assert (caught.value.reason, caught.value.field) == (
        "SpecialTokenMissing",
        "spec.sampling.separators.betweenDocuments",
    )


def test_all_special_tokens_are_found(tokenizer: TextTokenizer) -> None:
    assert tokenizer.special_token_ids() == [BOS, EOS, PAD]


def test_the_digest_is_that_of_the_vocabulary_not_of_the_last_call(model: Path) -> None:
    used = TextTokenizer(load_tokenizer(ModelSource(name=str(model))))
    fresh = TextTokenizer(load_tokenizer(ModelSource(name=str(model))))
    used.tokenizer("some text", truncation=True, max_length=3, padding="max_length")
    assert used.sha256() == fresh.sha256()


def test_another_special_token_is_another_digest(model: Path, tokenizer: TextTokenizer) -> None:
    other = TextTokenizer(load_tokenizer(ModelSource(name=str(model))))
    other.tokenizer.add_special_tokens({"sep_token": "<sep>"})
    assert other.sha256() != tokenizer.sha256()


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="has no tokenizer") as caught:
        load_tokenizer(ModelSource(name=str(tmp_path)))
    assert (caught.value.reason, caught.value.field) == ("TokenizerUnreadable", "spec.model.name")
