"""Data sets as streams of documents or of rows of token ids, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectStore
from sae_job.text.hub import first_line, is_connection_trouble, is_local, resolve_commit
from sae_job.text.hub_dataset import hub_metadata, read_hub_dataset
from sae_job.text.local_files import CsvRows, fingerprint, local_files, local_metadata, read_files, reader_for
from sae_job.text.plan import DatasetRecord
from sae_job.text.s3_files import S3, StoredFiles, stored_files
from sae_operator.api.store import StoreLocation

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from sae_operator.api.activation_cache import DatasetSource

    Rows = Dataset | IterableDataset | StoredFiles | CsvRows

# Columns that are read when the spec names none, in order of preference; the first ones hold token ids.
TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "problem")


@dataclass(frozen=True)
class Documents:
    """An open data set.

    Attributes:
        record: what it is, resolved to a commit or fingerprint; its column is the one that is read.
        metadata: reads `sae_lens.json` beside the data; gives None when there is none.
    """

    record: DatasetRecord
    _rows: Rows
    metadata: Callable[[], bytes | None] = field(default=lambda: None)

    @property
    def tokenized(self) -> bool:
        """Whether rows are token ids; otherwise they are text."""
        return self.record.tokenized

    def texts(self, skip: int = 0) -> Iterator[str]:
        """Texts of the rows in order, without the first `skip`; a row without text gives an empty string.

        Raises:
            InvalidInput: the column holds something else than text, or a file is damaged.
        """
        for number, value in self._values(skip):
            if value is None:
                yield ""
            elif isinstance(value, str):
                yield value
            else:
                raise InvalidInput(
                    "ColumnNotText",
                    f"{self._place(number)} is {type(value).__name__}, not text; name another column",
                    field="spec.dataset.column",
                )

    def token_rows(self, skip: int = 0) -> Iterator[tuple[int, list[int]]]:
        """Number and token ids of the rows in order, without the first `skip`.

        Raises:
            InvalidInput: the column holds something else than lists of integers, or a file is damaged.
        """
        for number, value in self._values(skip):
            if not _is_token_ids(value):
                raise InvalidInput(
                    "ColumnNotTokens",
                    f"{self._place(number)} is no list of token ids; mend that row or name another column",
                    field="spec.dataset.column",
                )
            yield number, value

    def _place(self, number: int) -> str:
        return f"row {number} of {self.record.path!r}, column {self.record.column!r}"

    def _values(self, skip: int) -> Iterator[tuple[int, Any]]:
        """Number and value of the rows, with what the library says of a damaged file as the user's mistake."""
        column = self.record.column
        if column is None:
            return
        rows = iter(self._rows.skip(skip) if skip else self._rows)
        number = skip
        while True:
            try:
                row = cast("dict[str, Any] | None", next(rows, None))
            except ValueError as error:
                if is_connection_trouble(error):
                    raise
                raise InvalidInput(
                    "DatasetUnreadable",
                    f"{self.record.path!r} cannot be read behind row {number}: {first_line(error)}; mend that file",
                    field="spec.dataset.path",
                ) from error
            if row is None:
                return
            if column not in row:
                raise InvalidInput(
                    "DatasetUnreadable",
                    f"{self.record.path!r} cannot be read behind row {number}: no column {column!r}; mend that file",
                    field="spec.dataset.path",
                )
            yield number, row[column]
            number += 1


def open_documents(
    source: DatasetSource,
    *,
    revision: str | None = None,
    open_store: Callable[[StoreLocation], ObjectStore] | None = None,
) -> Documents:
    """Open a data set and find its text or token ids.

    Args:
        revision: commit to read on the Hub, instead of the one that the source's revision stands for now.
        open_store: opens the store of an `s3://` path.

    Raises:
        InvalidInput: there is no such data set, split, file or column.
        StoreError: the store of an `s3://` path failed.
    """
    import datasets

    datasets.disable_progress_bars()
    commit, digest = None, None
    rows: Rows
    metadata: Callable[[], bytes | None]
    if source.path.startswith(S3):
        if open_store is None:
            raise ValueError(f"{source.path} needs open_store")
        rows = stored_files(source, open_store)
        digest, metadata = rows.fingerprint, rows.metadata
    elif is_local(source.path):
        path = Path(source.path).expanduser()
        files = local_files(source, path)
        digest = fingerprint(files, path)
        rows = read_files(reader_for(source, [file.name for file in files]), files)
        metadata = partial(local_metadata, path)
    else:
        commit = revision or resolve_commit(
            source.path,
            source.revision,
            kind="dataset",
            name_field="spec.dataset.path",
            revision_field="spec.dataset.revision",
        )
        rows = read_hub_dataset(source, commit)
        metadata = partial(hub_metadata, source, commit)
    column, tokenized = _column(source, rows)
    record = DatasetRecord(
        path=source.path,
        name=source.name,
        split=source.split,
        revision=commit,
        fingerprint=digest,
        column=column,
        tokenized=tokenized,
    )
    return Documents(record, rows, metadata)


def _column(source: DatasetSource, rows: Rows) -> tuple[str | None, bool]:
    """The column to read and whether it holds token ids, from the first row; no column when there are no rows."""
    try:
        first = cast("dict[str, Any] | None", next(iter(rows), None))
    except (ValueError, OSError) as error:
        if is_connection_trouble(error):
            raise
        raise InvalidInput(
            "DatasetUnreadable", f"cannot read {source.path!r}: {first_line(error)}", field="spec.dataset.path"
        ) from error
    if first is None:
        return None, False
    there = ", ".join(first)
    if source.column is not None and source.column not in first:
        raise InvalidInput(
            "ColumnNotFound",
            f"{source.path!r} has no column {source.column!r}; there are: {there}",
            field="spec.dataset.column",
        )
    known = (*TOKEN_COLUMNS, *TEXT_COLUMNS)
    column = source.column or next((column for column in known if column in first), None)
    if column is None:
        raise InvalidInput(
            "ColumnNotFound",
            f"{source.path!r} has none of the columns {', '.join(known)}; name one of: {there}",
            field="spec.dataset.column",
        )
    value = first[column]
    if _is_token_ids(value):
        return column, True
    if isinstance(value, str) or value is None:
        return column, value is None and column in TOKEN_COLUMNS
    raise InvalidInput(
        "ColumnNotText",
        f"column {column!r} of {source.path!r} holds {type(value).__name__} in row 0, neither text nor a list of token "
        f"ids; name another of: {there}",
        field="spec.dataset.column",
    )


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)
