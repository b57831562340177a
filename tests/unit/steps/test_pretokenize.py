"""Pretokenized data: what a cache makes from text itself, in files that others read, finished when its metadata is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_job.errors import InvalidInput, Stopped
from sae_job.steps.pretokenize import HubOutput, Output, Pretokenization, StoreOutput, pretokenize_documents
from sae_job.storage.file_store import FileStore
from sae_job.text.contexts import pack_contexts
from sae_job.text.documents import open_documents
from sae_job.text.tokenize import TextTokenizer, load_tokenizer
from sae_operator.api.activation_cache import DatasetSource, ModelSource, Separators
from tests.tiny_model import BOS, EOS, write_tiny_model, write_tiny_text

SIZE = 16
BOS_TWICE = Separators(begin_context="bos", between_documents="bos")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder and a text's file."""
    root = tmp_path_factory.mktemp("inputs")
    return write_tiny_model(root / "model"), write_tiny_text(root / "text", documents=30, words=(5, 20))


def make(
    inputs: tuple[Path, Path],
    outputs: list[Output],
    *,
    progress: Callable[[int], None] = lambda contexts: None,
    should_stop: Callable[[], bool] = lambda: False,
    **fields: Any,
) -> int:
    model, text = inputs
    source = DatasetSource(path=str(text))
    wanted = Pretokenization(
        **{
            "tokenizer_name": str(model),
            "dataset": source,
            "context_size": SIZE,
            "separators": BOS_TWICE,
            "shuffle": False,
            "shard_bytes": 4 * SIZE * 50,
            **fields,
        }
    )
    tokenizer = TextTokenizer(load_tokenizer(ModelSource(name=str(model))))
    return pretokenize_documents(
        wanted, open_documents(source), tokenizer, outputs, progress=progress, should_stop=should_stop
    )


def on_the_fly(inputs: tuple[Path, Path]) -> list[list[int]]:
    model, text = inputs
    tokenizer = TextTokenizer(load_tokenizer(ModelSource(name=str(model))))
    rows = list(open_documents(DatasetSource(path=str(text))).texts())
    packing = tokenizer.packing(prepend_bos=True)
    return [context.tolist() for context in pack_contexts(tokenizer.encode(rows), SIZE, packing)]


def rows_of(folder: Path) -> list[list[int]]:
    return [row for _, row in open_documents(DatasetSource(path=str(folder))).token_rows()]


def test_contexts_are_those_that_a_cache_makes_from_the_text(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    expected = on_the_fly(inputs)
    assert make(inputs, [StoreOutput(FileStore(tmp_path))]) == len(expected)
    assert rows_of(tmp_path) == expected
    assert len(list(tmp_path.glob("data/*.parquet"))) == -(-len(expected) // 50)


def test_the_datasets_library_reads_them(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    from datasets import load_dataset

    make(inputs, [StoreOutput(FileStore(tmp_path / "out"))])
    loaded = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == ["input_ids"]
    assert list(loaded["input_ids"]) == on_the_fly(inputs)


def test_a_shuffle_moves_contexts_across_all_files(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    expected = on_the_fly(inputs)
    made = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(inputs, [StoreOutput(FileStore(tmp_path / name))], shuffle=True, seed=seed)
        made[name] = rows_of(tmp_path / name)
    assert made["a"] == made["b"]
    assert made["a"] != made["c"]
    order = np.random.default_rng([1, 0]).permutation(len(expected))
    assert made["a"] == [expected[place] for place in order]


def test_more_contexts_than_are_held_are_shuffled_in_parts(
    inputs: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = on_the_fly(inputs)
    assert len(expected) > 100
    # Files of 50 contexts; 149 contexts hold two of them.
    make(inputs, [StoreOutput(FileStore(tmp_path))], shuffle=True, seed=3, shuffle_tokens=149 * SIZE)
    found = rows_of(tmp_path)
    for part, start in enumerate(range(0, len(expected), 100)):
        there = expected[start : start + 100]
        order = np.random.default_rng([3, part]).permutation(len(there))
        assert found[start : start + 100] == [there[place] for place in order]
    (told,) = [record.message for record in caplog.records if "shuffled" in record.message]
    assert "each part of 100 contexts" in told


def test_progress_counts_contexts(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    told: list[int] = []
    contexts = make(inputs, [StoreOutput(FileStore(tmp_path))], progress=told.append)
    assert told == list(range(1, contexts + 1))


def test_a_stop_leaves_no_finished_data_set_and_the_next_run_makes_it(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(Stopped, match="begins anew"):
        make(inputs, [StoreOutput(FileStore(tmp_path))], should_stop=lambda: True)
    assert not (tmp_path / "sae_lens.json").exists()
    make(inputs, [StoreOutput(FileStore(tmp_path))])
    assert rows_of(tmp_path) == on_the_fly(inputs)


def test_a_token_that_the_tokenizer_does_not_have_is_told(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no token 259: ids are below 259") as caught:
        make(inputs, [StoreOutput(FileStore(tmp_path))], separators=Separators(begin_document="259"))
    assert caught.value.field == "spec.sampling.separators.beginDocument"


def test_too_little_text_is_told(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not fill one context of 1000000") as caught:
        make(inputs, [StoreOutput(FileStore(tmp_path))], context_size=1_000_000)
    assert (caught.value.reason, caught.value.field) == ("NoTokens", "spec.dataset.path")


def test_the_metadata_tells_what_was_made(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    separators = Separators(begin_context="bos", begin_document="none", between_documents=str(EOS))
    make(inputs, [StoreOutput(FileStore(tmp_path))], separators=separators)
    facts = json.loads((tmp_path / "sae_lens.json").read_text())
    assert facts["tokenizer_name"] == str(inputs[0])
    assert (facts["original_dataset"], facts["original_split"]) == (str(inputs[1]), "train")
    assert (facts["context_size"], facts["shuffled"], facts["seed"]) == (SIZE, False, None)
    assert facts["begin_batch_token"] == "bos"
    assert facts["begin_sequence_token"] is None
    assert facts["sequence_separator_token"] == EOS
    assert all(row[0] == BOS for row in rows_of(tmp_path))


def test_no_more_tokens_than_asked_for(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    assert make(inputs, [StoreOutput(FileStore(tmp_path))], max_tokens=60 * SIZE + 1) == 60
    assert rows_of(tmp_path) == on_the_fly(inputs)[:60]


def test_a_finished_data_set_is_not_written_over_and_an_unfinished_one_is(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    store = FileStore(tmp_path)
    store.put("data/train-00099.parquet", b"of an earlier run")
    make(inputs, [StoreOutput(store)])
    assert rows_of(tmp_path) == on_the_fly(inputs)
    with pytest.raises(InvalidInput, match="holds a data set already"):
        make(inputs, [StoreOutput(store)])


class FakeHub:
    """The calls of `HfApi` that are made, and their files."""

    def __init__(self) -> None:
        self.uploads: list[tuple[str, str]] = []
        self.branches: list[str] = []
        self.private: bool | None = None

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert (repo_type, exist_ok) == ("dataset", True)
        self.private = private

    def create_branch(self, repo_id: str, *, branch: str, repo_type: str, exist_ok: bool) -> None:
        self.branches.append(branch)

    def list_repo_files(self, repo_id: str, *, repo_type: str, revision: str) -> list[str]:
        return [path for path, there in self.uploads if there == revision]

    def upload_file(self, *, path_in_repo: str, revision: str, **_: Any) -> None:
        self.uploads.append((path_in_repo, revision))


def test_data_and_metadata_go_to_the_same_revision_and_metadata_last(inputs: tuple[Path, Path]) -> None:
    hub: Any = FakeHub()
    make(inputs, [HubOutput(hub, "me/tokens", "v2", private=True)])
    assert {revision for _, revision in hub.uploads} == {"v2"}
    assert (hub.branches, hub.private) == (["v2"], True)
    assert hub.uploads[0][0] == "data/train-00000.parquet"
    assert hub.uploads[-1][0] == "sae_lens.json"


def test_token_ids_are_not_tokenized_again(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    make(inputs, [StoreOutput(FileStore(tmp_path))])
    with pytest.raises(InvalidInput, match="holds token ids already; name a column of text"):
        pretokenize_documents(
            Pretokenization("t", DatasetSource(path=str(tmp_path)), SIZE, BOS_TWICE),
            open_documents(DatasetSource(path=str(tmp_path))),
            TextTokenizer(load_tokenizer(ModelSource(name=str(inputs[0])))),
            [],
        )
