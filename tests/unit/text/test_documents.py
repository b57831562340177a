"""Data sets: what is read from where, and what is told when it cannot be."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from sae_job.errors import InvalidInput
from sae_job.text.documents import open_documents
from sae_operator.api.activation_cache import DatasetSource


def write_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def texts(path: Path, *, skip: int = 0, **source: object) -> list[str]:
    return list(open_documents(DatasetSource.model_validate({"path": str(path), **source})).texts(skip))


def refusal(path: Path | str, **source: object) -> tuple[str, str, str]:
    with pytest.raises(InvalidInput) as caught:
        list(open_documents(DatasetSource.model_validate({"path": str(path), **source})).texts())
    return caught.value.reason, caught.value.field, caught.value.message


def test_a_file_and_the_folder_that_holds_it_are_the_same_text(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    assert texts(file) == texts(tmp_path) == ["one", "two"]


def test_files_of_a_folder_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", [{"text": "second"}])
    write_lines(tmp_path / "a.jsonl", [{"text": "first"}])
    write_lines(tmp_path / ".hidden" / "c.jsonl", [{"text": "never"}])
    assert texts(tmp_path) == ["first", "second"]


def test_data_files_choose_some_of_a_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "first"}])
    write_lines(tmp_path / "b.jsonl", [{"text": "second"}])
    assert texts(tmp_path, dataFiles=["b.jsonl"]) == ["second"]


def test_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", "three"]}), tmp_path / "a.parquet")
    assert texts(tmp_path, skip=1) == ["two", "three"]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line\n\nanother\n")
    (tmp_path / "b.txt").write_text("more")
    assert [text.strip() for text in texts(tmp_path)] == ["one line\n\nanother", "more"]


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "set")
    assert texts(tmp_path / "set", skip=1) == ["two"]


def test_files_belong_to_the_split_that_their_name_tells(tmp_path: Path) -> None:
    write_lines(tmp_path / "train-0.jsonl", [{"text": "learn"}])
    write_lines(tmp_path / "test-0.jsonl", [{"text": "check"}])
    assert texts(tmp_path) == ["learn"]
    assert texts(tmp_path, split="test") == ["check"]
    assert refusal(tmp_path, split="validation")[:2] == ("SplitNotFound", "spec.dataset.split")


def test_the_text_column_comes_before_the_problem_column(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"problem": "2+2", "text": "four"}])
    write_lines(tmp_path / "only" / "b.jsonl", [{"problem": "2+2", "answer": "4"}])
    assert texts(tmp_path / "a.jsonl") == ["four"]
    assert texts(tmp_path / "only") == ["2+2"]
    assert texts(tmp_path / "only", column="answer") == ["4"]


def test_a_row_without_text_is_an_empty_document(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": None}, {"text": "three"}])
    assert texts(tmp_path) == ["one", "", "three"]


def test_an_unknown_column_is_told_with_those_there_are(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"body": "one", "title": "t"}])
    for source in ({}, {"column": "content"}):
        reason, field, message = refusal(file, **source)
        assert (reason, field) == ("ColumnNotFound", "spec.dataset.column")
        assert "body, title" in message


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": 3}])
    assert refusal(file)[:2] == ("ColumnNotText", "spec.dataset.column")


def test_a_column_of_token_ids_comes_first(tmp_path: Path) -> None:
    row = {"text": "one", "problem": "p", "input_ids": [1, 2], "tokens": [3, 4]}
    file = write_lines(tmp_path / "a.jsonl", [row, row])
    opened = open_documents(DatasetSource(path=str(file)))
    assert opened.tokenized
    assert list(opened.token_rows(skip=1)) == [(1, [3, 4])]
    assert texts(file, column="text") == ["one", "one"]
    named = open_documents(DatasetSource(path=str(file), column="input_ids"))
    assert list(named.token_rows()) == [(0, [1, 2]), (1, [1, 2])]


def test_a_row_that_holds_something_else_is_told_by_its_number(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"tokens": [1]}, {"tokens": None}])
    with pytest.raises(InvalidInput, match="row 1 ") as caught:
        list(open_documents(DatasetSource(path=str(file))).token_rows())
    assert (caught.value.reason, caught.value.field) == ("ColumnNotTokens", "spec.dataset.column")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning", "error::ResourceWarning")
def test_csv_is_read_and_closed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,other\none,1\n"two,\nlines",2\n')
    (tmp_path / "b.csv").write_text("text,other\n,3\nfour,4\n")
    assert texts(tmp_path) == ["one", "two,\nlines", "", "four"]
    assert texts(tmp_path, skip=3) == ["four"]
    assert refusal(tmp_path, column="other")[:2] == ("ColumnNotText", "spec.dataset.column")
    gc.collect()


def test_a_broken_csv_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,other\none,1\ntwo,2,3\n")
    assert refusal(tmp_path)[:2] == ("DatasetUnreadable", "spec.dataset.path")


def test_a_split_of_a_saved_data_set_is_read(tmp_path: Path) -> None:
    import datasets

    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": [name, "two"]}) for name in ("train", "check")}
    )
    both.save_to_disk(tmp_path / "set")
    assert texts(tmp_path / "set", split="check") == ["check", "two"]
    reason, field, message = refusal(tmp_path / "set", split="none")
    assert (reason, field) == ("SplitNotFound", "spec.dataset.split")
    assert "train, check" in message


def test_what_does_not_exist_is_told(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing")[:2] == ("DatasetNotFound", "spec.dataset.path")
    assert refusal(tmp_path, dataFiles=["a.jsonl"])[:2] == ("FileNotFound", "spec.dataset.dataFiles[0]")
    assert refusal(tmp_path)[:2] == ("DatasetUnreadable", "spec.dataset.path")


def test_a_broken_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{nonsense\n")
    assert refusal(tmp_path)[:2] == ("DatasetUnreadable", "spec.dataset.path")


def test_files_of_several_kinds_need_a_choice(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    (tmp_path / "b.txt").write_text("two")
    assert refusal(tmp_path)[:2] == ("DatasetMixed", "spec.dataset.dataFiles")


def test_an_empty_file_has_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    assert texts(tmp_path) == []


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    def fingerprint() -> str | None:
        return open_documents(DatasetSource(path=str(tmp_path))).record.fingerprint

    write_lines(tmp_path / "a.jsonl", [{"text": "one"}])
    before = fingerprint()
    assert fingerprint() == before
    write_lines(tmp_path / "a.jsonl", [{"text": "two"}])
    assert fingerprint() != before


@pytest.mark.parametrize(
    "second", ['{"text": "two"}\n{"text": "thr', '{"title": "two"}\n'], ids=["cut off", "other column"]
)
def test_a_file_behind_the_first_that_cannot_be_read_is_told(tmp_path: Path, second: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").write_text(second)
    documents = open_documents(DatasetSource.model_validate({"path": str(tmp_path)}))
    with pytest.raises(InvalidInput, match="behind row 1") as caught:
        list(documents.texts())
    assert (caught.value.reason, caught.value.field) == ("DatasetUnreadable", "spec.dataset.path")
