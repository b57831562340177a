"""The step `prepare` on token ids that were made elsewhere: rows are contexts as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.errors import InvalidInput
from sae_job.steps.pretokenize import Pretokenization, StoreOutput, pretokenize_documents
from sae_job.storage.file_store import FileStore
from sae_job.text import plan
from sae_job.text.blocks import read_block_records, shuffled_order
from sae_job.text.documents import open_documents
from sae_job.text.tokenize import TextTokenizer, load_tokenizer
from sae_operator.api.activation_cache import ActivationCacheSpec, DatasetSource, ModelSource, Separators
from tests.faults import KILLED, FaultPlan, count_calls, folder_bytes, run_in_child
from tests.preparing import CONTEXT_SIZE, Bench, all_contexts, index_of
from tests.tiny_model import BOS, EOS, write_tiny_model, write_tiny_text

BLOCK_CONTEXTS = 64
VOCABULARY = 259
ROWS = 300


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BLOCK_TOKENS", BLOCK_CONTEXTS * CONTEXT_SIZE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_tiny_model(tmp_path_factory.mktemp("inputs") / "model")


def token_rows(count: int = ROWS, *, length: int = CONTEXT_SIZE, first: int = BOS) -> list[list[int]]:
    """Rows that all differ, of ordinary tokens behind the first."""
    ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = first
    return ids.tolist()


def write_tokens(folder: Path, rows: list[list[int]], *, column: str = "tokens") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps({column: row})}\n" for row in rows))
    return folder


def bench_of(root: Path, model: Path, rows: list[list[int]]) -> Bench:
    return Bench(root / "cache", (model, write_tokens(root / "data", rows)))


def in_order_of_the_rows(bench: Bench, spec: ActivationCacheSpec) -> list[list[int]]:
    """The stored contexts, with the shuffle of each block undone."""
    store = bench.store(spec)
    index = index_of(store)
    contexts: list[list[int]] = []
    for number, block in enumerate(all_contexts(store, index).split([block.contexts for block in index.blocks])):
        order = torch.from_numpy(shuffled_order(spec.seed, number, len(block)))
        contexts += block[order.argsort()].tolist()
    return contexts


def test_rows_are_contexts_as_they_are(model: Path, tmp_path: Path) -> None:
    rows = token_rows(first=5)
    bench = bench_of(tmp_path, model, rows)
    spec = bench.spec(tokens=4000)
    bench.prepare(spec)
    contexts = in_order_of_the_rows(bench, spec)
    assert contexts == rows[: len(contexts)]
    assert index_of(bench.store(spec)).dataset.tokenized


@pytest.mark.parametrize(
    ("column", "named"), [("tokens", None), ("input_ids", None), ("tokens", "tokens"), ("ids", "ids")]
)
def test_the_column_is_found_or_named(model: Path, tmp_path: Path, column: str, named: str | None) -> None:
    rows = token_rows(BLOCK_CONTEXTS)
    bench = Bench(tmp_path / "cache", (model, write_tokens(tmp_path / "data", rows, column=column)))
    spec = bench.spec(tokens=500, dataset={"path": str(bench.text), "column": named})
    bench.prepare(spec)
    assert in_order_of_the_rows(bench, spec) == rows


def test_a_short_row_is_refused_with_its_number_and_both_sizes(model: Path, tmp_path: Path) -> None:
    rows = token_rows()
    rows[70] = rows[70][:9]
    reason, field, message = bench_of(tmp_path, model, rows).refusal(bench_of(tmp_path, model, rows).spec(tokens=4000))
    assert (reason, field) == ("RowTooShort", "spec.contextSize")
    assert "row 70 " in message
    assert "has 9 token ids" in message
    assert f"contextSize {CONTEXT_SIZE}" in message


def test_longer_rows_are_cut_and_told_once(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = token_rows(length=CONTEXT_SIZE + 4)
    bench = bench_of(tmp_path, model, rows)
    spec = bench.spec(tokens=1500)
    bench.prepare(spec)
    contexts = in_order_of_the_rows(bench, spec)
    assert contexts == [row[:CONTEXT_SIZE] for row in rows[: len(contexts)]]
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith("row 0 ")
    assert f"has {CONTEXT_SIZE + 4} token ids; the first {CONTEXT_SIZE} " in told


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_an_id_that_the_model_does_not_take_is_refused_with_its_row(model: Path, tmp_path: Path, token: int) -> None:
    rows = token_rows()
    rows[3][7] = token
    bench = bench_of(tmp_path, model, rows)
    reason, field, message = bench.refusal(bench.spec())
    assert (reason, field) == ("TokenizerMismatch", "spec.dataset.path")
    assert "row 3 " in message
    assert f"token id {token}, the model takes {VOCABULARY}" in message


def test_too_few_rows_are_told(model: Path, tmp_path: Path) -> None:
    bench = bench_of(tmp_path, model, token_rows(10))
    reason, field, message = bench.refusal(bench.spec())
    assert (reason, field) == ("NotEnoughText", "spec.tokens")
    # BOS of each row never becomes a row of the cache.
    assert f"({10 * (CONTEXT_SIZE - 1)} with those" in message


def test_positions_and_excluded_ids_are_not_counted_as_usable(model: Path, tmp_path: Path) -> None:
    rows = token_rows()
    for row in rows[::2]:
        row[9] = 77
    rows = [[token if token != 77 or place == 9 else 78 for place, token in enumerate(row)] for row in rows]
    bench = bench_of(tmp_path, model, rows)
    spec = bench.spec(
        tokens=500, sampling={"positions": {"start": 1, "stop": 13, "step": 4}, "excludeTokenIds": [77, EOS]}
    )
    bench.prepare(spec)
    contexts = all_contexts(bench.store(spec), index_of(bench.store(spec))).tolist()
    usable = [count for record in read_block_records(bench.store(spec)) for count in record.usable]
    # Positions 1, 5 and 9, without the 9 of every other row.
    assert usable == [2 if context[9] == 77 else 3 for context in contexts]
    assert {2, 3} == set(usable)


def test_a_kill_at_any_store_call_leaves_nothing_that_the_next_run_does_not_mend(model: Path, tmp_path: Path) -> None:
    undisturbed = bench_of(tmp_path / "undisturbed", model, token_rows())
    spec = undisturbed.spec(tokens=3500)
    calls = count_calls(lambda faults: undisturbed.prepare(spec, faults=faults))
    wanted = folder_bytes(undisturbed.store(spec).root)
    assert len(read_block_records(undisturbed.store(spec))) > 3
    for number in range(1, calls + 1):
        killed = Bench(tmp_path / f"killed-{number}", (model, undisturbed.text))
        spec = killed.spec(tokens=3500)

        def work(killed: Bench = killed, spec: ActivationCacheSpec = spec, number: int = number) -> None:
            killed.prepare(spec, faults=FaultPlan(at=number))

        assert run_in_child(work) == KILLED
        killed.prepare(spec)
        assert folder_bytes(killed.store(spec).root) == wanted


def test_an_extended_cache_is_the_one_that_was_long_from_the_start(model: Path, tmp_path: Path) -> None:
    bench = bench_of(tmp_path, model, token_rows())
    fresh = Bench(tmp_path / "fresh", (model, bench.text))
    bench.prepare(bench.spec(tokens=500))
    bench.prepare(bench.spec(tokens=3500))
    fresh.prepare(fresh.spec(tokens=3500))
    assert folder_bytes(bench.store(bench.spec()).root) == folder_bytes(fresh.store(fresh.spec()).root)


def test_a_model_without_a_tokenizer_takes_token_ids_and_no_text(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*token*", "special*"))
    rows = token_rows(BLOCK_CONTEXTS)
    bench = bench_of(tmp_path, bare, rows)
    spec = bench.spec(tokens=500)
    bench.prepare(spec)
    assert in_order_of_the_rows(bench, spec) == rows
    index = index_of(bench.store(spec))
    assert (index.tokenizer.special_token_ids, index.tokenizer.bos_token_id) == ([], None)
    # Without known special tokens every position is usable.
    assert read_block_records(bench.store(spec))[0].usable == [CONTEXT_SIZE] * BLOCK_CONTEXTS
    text = write_tiny_text(tmp_path / "text", documents=5)
    assert bench.refusal(bench.spec(dataset={"path": str(text)}))[0] == "TokenizerUnreadable"


def write_other_tokenizer(model: Path, folder: Path) -> Path:
    """The model's tokenizer with two ids exchanged."""
    shutil.copytree(model, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    return folder


def test_tokens_of_another_vocabulary_are_refused_and_of_the_same_one_accepted(model: Path, tmp_path: Path) -> None:
    bench = bench_of(tmp_path, model, token_rows())
    other = write_other_tokenizer(model, tmp_path / "other")
    same = tmp_path / "same"
    shutil.copytree(model, same)
    metadata = bench.text / "sae_lens.json"
    metadata.write_text(json.dumps({"tokenizer_name": str(other), "context_size": CONTEXT_SIZE}))
    reason, field, message = bench.refusal(bench.spec())
    assert (reason, field) == ("TokenizerMismatch", "spec.dataset.path")
    assert str(other) in message
    metadata.write_text(json.dumps({"tokenizer_name": str(same), "context_size": CONTEXT_SIZE}))
    assert bench.prepare(bench.spec()).exit_code == 0


def test_metadata_that_tells_of_shorter_rows_is_enough_to_refuse(model: Path, tmp_path: Path) -> None:
    bench = bench_of(tmp_path, model, token_rows())
    (bench.text / "sae_lens.json").write_text('{"context_size": 8}')
    reason, field, message = bench.refusal(bench.spec())
    assert (reason, field) == ("RowTooShort", "spec.contextSize")
    assert "have 8 token ids (sae_lens.json)" in message


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"tokenizer_name": null}'])
def test_metadata_that_tells_nothing_is_no_obstacle(model: Path, tmp_path: Path, content: str) -> None:
    bench = bench_of(tmp_path, model, token_rows())
    (bench.text / "sae_lens.json").write_text(content)
    assert bench.prepare(bench.spec()).exit_code == 0


def test_a_separator_beyond_the_vocabulary_is_the_specs_mistake(model: Path, tmp_path: Path) -> None:
    text = write_tiny_text(tmp_path / "text", documents=60)
    bench = Bench(tmp_path / "cache", (model, text.parent))
    sampling: dict[str, Any] = {"separators": {"betweenDocuments": str(VOCABULARY)}}
    reason, field, message = bench.refusal(bench.spec(sampling=sampling))
    assert (reason, field) == ("TokenizerMismatch", "spec.sampling.separators.betweenDocuments")
    assert f"no token {VOCABULARY}: ids are below {VOCABULARY}" in message
    sampling["separators"]["betweenDocuments"] = str(VOCABULARY - 1)
    assert bench.prepare(bench.spec(sampling=sampling)).exit_code == 0


def test_pre_tokenized_without_a_shuffle_gives_the_blocks_that_the_text_gives(model: Path, tmp_path: Path) -> None:
    """Prepare shuffles each block by seed and number alone, so equal contexts in equal order are equal blocks."""
    text = write_tiny_text(tmp_path / "text", documents=60, words=(5, 20))
    source = DatasetSource(path=str(text))
    wanted = Pretokenization(
        tokenizer_name=str(model),
        dataset=source,
        context_size=CONTEXT_SIZE,
        separators=Separators(begin_context="bos", between_documents="bos"),
        shuffle=False,
        shard_bytes=4 * CONTEXT_SIZE * 50,
    )
    tokenizer = TextTokenizer(load_tokenizer(ModelSource(name=str(model))))
    pretokenize_documents(wanted, open_documents(source), tokenizer, [StoreOutput(FileStore(tmp_path / "tokens"))])
    from_text = Bench(tmp_path / "from-text", (model, text))
    from_tokens = Bench(tmp_path / "from-tokens", (model, tmp_path / "tokens"))
    contexts, usable = [], []
    for bench in (from_text, from_tokens):
        spec = bench.spec(tokens=3500, seed=7)
        bench.prepare(spec)
        store = bench.store(spec)
        contexts.append(all_contexts(store, index_of(store)))
        usable.append([record.usable for record in read_block_records(store)])
    assert len(usable[0]) > 3
    assert torch.equal(contexts[0], contexts[1])
    assert usable[0] == usable[1]


def test_other_lists_than_token_ids_are_refused(model: Path, tmp_path: Path) -> None:
    rows: list[Any] = [["a", "b"]] * 3
    bench = bench_of(tmp_path, model, rows)
    with pytest.raises(InvalidInput) as caught:
        bench.prepare(bench.spec())
    assert (caught.value.reason, caught.value.field) == ("ColumnNotText", "spec.dataset.column")
