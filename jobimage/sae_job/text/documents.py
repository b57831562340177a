"""Data sets as streams of documents: local files and folders, folders written by `save_to_disk`, and the Hub."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sae_job.errors import InvalidInput
from sae_job.text.hub import first_line, is_connection_trouble, is_local, resolve_commit
from sae_job.text.plan import DatasetRecord

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from sae_operator.api.activation_cache import DatasetSource

logger = logging.getLogger(__name__)

# Columns that hold text, in order of preference, and those that hold token ids.
TEXT_COLUMNS = ("text", "problem")
TOKEN_COLUMNS = ("tokens", "input_ids")
# File name ending -> reader of the `datasets` library.
READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".csv": "csv",
}
# Of each local file this much of both ends enters the fingerprint: enough to notice a change, cheap for terabytes.
_FINGERPRINT_BYTES = 65_536


@dataclass(frozen=True)
class Documents:
    """An open data set.

    Attributes:
        record: what it is, resolved to a commit or fingerprint; its column is the one that is read.
    """

    record: DatasetRecord
    _rows: Dataset | IterableDataset

    def texts(self, skip: int = 0) -> Iterator[str]:
        """Texts of the rows in order, without the first `skip`; a row without text gives an empty string.

        Raises:
            InvalidInput: the column holds something else than text, or a file is damaged.
        """
        column = self.record.column
        if column is None:
            return
        rows = iter(cast("Iterable[dict[str, Any]]", self._rows.skip(skip) if skip else self._rows))
        for row in self._readable(rows, skip):
            value = row[column]
            if value is None:
                yield ""
            elif isinstance(value, str):
                yield value
            else:
                raise InvalidInput(
                    "ColumnNotText",
                    f"column {column!r} holds {type(value).__name__}, not text; name another column",
                    field="spec.dataset.column",
                )

    def _readable(self, rows: Iterator[dict[str, Any]], number: int) -> Iterator[dict[str, Any]]:
        """The rows from `number` on, with what the library says of a damaged file as the user's mistake."""
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except ValueError as error:
                if is_connection_trouble(error):
                    raise
                raise InvalidInput(
                    "DatasetUnreadable",
                    f"{self.record.path!r} cannot be read behind row {number}: {first_line(error)}; mend that file",
                    field="spec.dataset.path",
                ) from error
            yield row
            number += 1


def open_documents(source: DatasetSource, *, revision: str | None = None) -> Documents:
    """Open a data set and find its text.

    Args:
        revision: commit to read on the Hub, instead of the one that the source's revision stands for now.

    Raises:
        InvalidInput: there is no such data set, split, file or column.
    """
    import datasets

    datasets.disable_progress_bars()
    if is_local(source.path):
        path = Path(source.path).expanduser()
        commit = None
        files = _local_files(source, path)
        fingerprint = _fingerprint(files, path)
        rows = _saved_to_disk(source, path) if _is_saved_to_disk(path) else _read_files(source, files)
    else:
        commit = revision or resolve_commit(
            source.path,
            source.revision,
            kind="dataset",
            name_field="spec.dataset.path",
            revision_field="spec.dataset.revision",
        )
        fingerprint = None
        rows = _from_hub(source, commit)
    record = DatasetRecord(
        path=source.path,
        name=source.name,
        split=source.split,
        revision=commit,
        fingerprint=fingerprint,
        column=_text_column(source, rows),
    )
    return Documents(record, rows)


def _is_saved_to_disk(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _saved_to_disk(source: DatasetSource, path: Path) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    loaded = load_from_disk(str(path))
    if not isinstance(loaded, DatasetDict):
        return loaded
    if source.split not in loaded:
        raise _no_split(source, list(map(str, loaded)))
    return loaded[source.split]


def _no_split(source: DatasetSource, splits: Sequence[str]) -> InvalidInput:
    return InvalidInput(
        "SplitNotFound",
        f"{source.path!r} has no split {source.split!r}; there are: {', '.join(splits) or 'none by name'}",
        field="spec.dataset.split",
    )


def _local_files(source: DatasetSource, path: Path) -> list[Path]:
    """Files of the data set, sorted: those whose path names the split or, for `train` without any such, all."""
    if _is_saved_to_disk(path):
        return sorted(path.rglob("*.arrow"))
    if path.is_file():
        return [path]
    if source.data_files:
        files = [path / name for name in source.data_files]
        for index, file in enumerate(files):
            if not file.is_file():
                raise InvalidInput("FileNotFound", f"{file} is not a file", field=f"spec.dataset.dataFiles[{index}]")
        return files
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in READERS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    named = [file for file in found if _names_split(file.relative_to(path), source.split)]
    if named or source.split != "train":
        if not named:
            raise _no_split(source, [])
        return named
    return found


def _names_split(path: Path, split: str) -> bool:
    """Whether a word of the path is the split's name, as in `train-00000-of-00002.parquet` or `train/a.jsonl`."""
    return split in re.split(r"[^A-Za-z0-9]+", str(path))


def _fingerprint(files: Sequence[Path], root: Path) -> str:
    """Digest over names, sizes, and both ends of the files."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        name = file.relative_to(root) if file != root else Path(file.name)
        digest.update(f"{name}\n{size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(_FINGERPRINT_BYTES))
            content.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(content.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()


def _read_files(source: DatasetSource, files: Sequence[Path]) -> Dataset | IterableDataset:
    """Stream local files; a text file is one document."""
    from datasets import Dataset, load_dataset

    readers = {READERS.get(file.suffix.lower()) for file in files}
    if None in readers or not readers:
        raise InvalidInput(
            "DatasetUnreadable",
            f"{source.path!r} holds no files that can be read; their names end in {', '.join(READERS)}",
            field="spec.dataset.path",
        )
    if len(readers) > 1:
        raise InvalidInput(
            "DatasetMixed",
            f"{source.path!r} holds files of several kinds ({', '.join(sorted(map(str, readers)))}); name some of them",
            field="spec.dataset.dataFiles",
        )
    reader = str(readers.pop())
    # The readers of the library fail on files without a row.
    filled = [str(file) for file in files if file.stat().st_size > 0]
    if not filled:
        return Dataset.from_dict({})
    options: dict[str, Any] = {"sample_by": "document"} if reader == "text" else {}
    return load_dataset(reader, data_files={"train": filled}, split="train", streaming=True, **options)


def _from_hub(source: DatasetSource, commit: str | None) -> Dataset | IterableDataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(
            source.path,
            name=source.name,
            split=source.split,
            revision=commit or source.revision,
            data_files=list(source.data_files) or None,
            streaming=source.streaming,
        )
    except DatasetNotFoundError as error:
        if is_connection_trouble(error):
            raise
        raise InvalidInput("DatasetNotFound", first_line(error), field="spec.dataset.path") from error
    except (ValueError, FileNotFoundError) as error:
        if is_connection_trouble(error):
            raise
        raise InvalidInput("DatasetUnreadable", first_line(error), field=_field_to_blame(source, error)) from error


def _field_to_blame(source: DatasetSource, error: Exception) -> str:
    text = str(error).lower()
    if "config" in text:
        return "spec.dataset.name"
    if "split" in text:
        return "spec.dataset.split"
    return "spec.dataset.dataFiles" if source.data_files else "spec.dataset.path"


def _text_column(source: DatasetSource, rows: Dataset | IterableDataset) -> str | None:
    """The column to read, from the first row; None when there are no rows."""
    try:
        first = next(iter(rows), None)
    except (ValueError, OSError) as error:
        if is_connection_trouble(error):
            raise
        raise InvalidInput(
            "DatasetUnreadable", f"cannot read {source.path!r}: {first_line(error)}", field="spec.dataset.path"
        ) from error
    if first is None:
        return None
    there = ", ".join(first)
    if source.column is not None:
        if source.column not in first:
            raise InvalidInput(
                "ColumnNotFound",
                f"{source.path!r} has no column {source.column!r}; there are: {there}",
                field="spec.dataset.column",
            )
        return source.column
    for column in TEXT_COLUMNS:
        if column in first:
            return column
    if tokenized := next((column for column in TOKEN_COLUMNS if column in first), None):
        raise InvalidInput(
            "DatasetTokenized",
            f"{source.path!r} holds token ids (column {tokenized!r}); only data sets of text are read",
            field="spec.dataset.path",
        )
    raise InvalidInput(
        "ColumnNotFound",
        f"{source.path!r} has none of the columns {' and '.join(TEXT_COLUMNS)}; name one of: {there}",
        field="spec.dataset.column",
    )
