"""`sae-job pretokenize`: from a text to a data set that caches read; mistakes name the option to change."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from sae_job.cli import run_command_line
from sae_job.text.documents import open_documents
from sae_operator.api.activation_cache import DatasetSource
from tests.tiny_model import BOS, write_tiny_model, write_tiny_text

SIZE = 16


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a model's folder and a text's."""
    root = tmp_path_factory.mktemp("inputs")
    write_tiny_text(root / "text", documents=30, words=(5, 20))
    model = write_tiny_model(root / "model")
    return ["pretokenize", "--model", str(model), "--dataset", str(root / "text"), "--context-size", str(SIZE)]


def rows_of(folder: Path) -> list[list[int]]:
    return [row for _, row in open_documents(DatasetSource(path=str(folder))).token_rows()]


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert run_command_line(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_folder_and_a_stores_stand_in_get_the_same_data_set(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line([*inputs, "--output", str(tmp_path / "out")]) == 0
    assert run_command_line([*inputs, "--store", str(tmp_path / "store"), "--output", "s3://bucket/tokens"]) == 0
    rows = rows_of(tmp_path / "out")
    assert rows_of(tmp_path / "store" / "bucket" / "tokens") == rows
    assert {len(row) for row in rows} == {SIZE}
    assert {row[0] for row in rows} == {BOS}
    told = f"{len(rows):,} contexts of {SIZE} tokens ({len(rows) * SIZE:,} tokens)\n"
    assert capsys.readouterr().out == told * 2


def test_text_is_read_from_an_s3_address(inputs: list[str], tmp_path: Path) -> None:
    text = Path(inputs[4]) / "text.jsonl"
    (tmp_path / "bucket" / "text").mkdir(parents=True)
    (tmp_path / "bucket" / "text" / "text.jsonl").write_bytes(text.read_bytes())
    stored = [*inputs[:4], "s3://bucket/text", *inputs[5:], "--store", str(tmp_path), "--output", "s3://bucket/tokens"]
    assert run_command_line(stored) == 0
    assert run_command_line([*inputs, "--output", str(tmp_path / "out")]) == 0
    assert rows_of(tmp_path / "bucket" / "tokens") == rows_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--column", "body"], "--column: "),
        (["--split", "test"], "--split: "),
        (["--dataset", "/nowhere/text"], "--dataset: "),
        (["--tokenizer", "/nowhere/model"], "--tokenizer: "),
        (["--begin-context", "cls"], "--begin-context: 'cls' is none of bos, eos, sep, a token id, or none"),
        (["--begin-document", "sep"], "--begin-document: the tokenizer has no SEP token"),
        (["--between-documents", "259"], "--between-documents: there is no token 259"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_option(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    line = refusal(capsys, [*inputs, "--output", str(tmp_path / "out"), *options])
    assert line.startswith(f"sae-job: {told}")
    assert not (tmp_path / "out" / "sae_lens.json").exists()


def test_a_finished_data_set_is_not_written_over(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*inputs, "--output", str(tmp_path / "out")]
    assert run_command_line(arguments) == 0
    capsys.readouterr()
    assert "holds a data set already; choose another place" in refusal(capsys, arguments)


def test_it_must_be_told_where_to_write_and_whose_tokens(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--output or --hub-repo" in refusal(capsys, inputs)
    assert "--tokenizer" in refusal(capsys, [inputs[0], *inputs[3:], "--output", "out"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_one_line(
    inputs: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    import sae_job.text.tokenize

    load = sae_job.text.tokenize.load_tokenizer

    def load_and_be_asked_to_stop(*arguments: object, **options: object) -> object:
        signal.raise_signal(number)
        return load(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sae_job.text.tokenize, "load_tokenizer", load_and_be_asked_to_stop)
    before = signal.getsignal(number)
    assert run_command_line([*inputs, "--output", str(tmp_path / "out")]) == 143
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "sae-job: stopped; the data set has no metadata file yet: the same command begins anew"
    assert not (tmp_path / "out" / "sae_lens.json").exists()
    assert signal.getsignal(number) is before
