"""Data sets on disk: one file, a folder of files, or what `save_to_disk` wrote; and which files make one up."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sae_job.errors import InvalidInput

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from sae_operator.api.activation_cache import DatasetSource

# File name ending -> reader of the `datasets` library.
READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".csv": "csv",
}
# Describes a data set of token ids; no rows of it.
METADATA_FILE = "sae_lens.json"
# What `save_to_disk` writes beside the rows of a data set, and of one with several splits.
_STATE, _SPLITS = "state.json", "dataset_dict.json"
# Of each local file this much of both ends enters the fingerprint: enough to notice a change, cheap for terabytes.
_FINGERPRINT_BYTES = 65_536
_CSV_ROWS = 1000


def choose_files(names: Iterable[str], source: DatasetSource, read: Callable[[str], bytes]) -> list[str]:
    """Files of a folder that make up a data set, in the order of its rows.

    These are `dataFiles`; or what the notes of `save_to_disk` list; or, sorted, those whose path names the split; or,
    for `train` without any such, all.

    Args:
        names: paths of all files below the folder, relative to it, with `/` between their parts.
        source: the data set.
        read: gives the content of one of them.

    Raises:
        InvalidInput: a file of `dataFiles` or the split does not exist, or there are none that can be read.
    """
    there = sorted(names)
    if source.data_files:
        for index, name in enumerate(source.data_files):
            if name not in there:
                raise InvalidInput(
                    "FileNotFound",
                    f"{source.path.rstrip('/')}/{name} is not a file",
                    field=f"spec.dataset.dataFiles[{index}]",
                )
        return list(source.data_files)
    if _SPLITS in there:
        splits = [str(split) for split in json.loads(read(_SPLITS))["splits"]]
        if source.split not in splits:
            raise no_split(source, splits)
        return _saved_files(f"{source.split}/", read)
    if _STATE in there:
        return _saved_files("", read)
    found = [
        name
        for name in there
        if reader_of(name) and name != METADATA_FILE and not any(part.startswith(".") for part in name.split("/"))
    ]
    named = [name for name in found if _names_split(name, source.split)]
    if source.split != "train" and not named:
        raise no_split(source, [])
    return named or found


def _saved_files(folder: str, read: Callable[[str], bytes]) -> list[str]:
    return [folder + file["filename"] for file in json.loads(read(folder + _STATE))["_data_files"]]


def no_split(source: DatasetSource, splits: Sequence[str]) -> InvalidInput:
    """The error for a split that does not exist."""
    return InvalidInput(
        "SplitNotFound",
        f"{source.path!r} has no split {source.split!r}; there are: {', '.join(splits) or 'none by name'}",
        field="spec.dataset.split",
    )


def reader_of(name: str) -> str | None:
    """Reader of the `datasets` library for a file, by its name's ending; None when there is none."""
    return READERS.get(PurePosixPath(name).suffix.lower())


def reader_for(source: DatasetSource, names: Sequence[str]) -> str:
    """The one reader that all files need.

    Raises:
        InvalidInput: there are no files, or of several kinds, or of one that is not read.
    """
    readers = {reader_of(name) for name in names}
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
    return str(readers.pop())


def local_files(source: DatasetSource, path: Path) -> list[Path]:
    """Files of a data set on disk, in the order of its rows. Raises InvalidInput as `choose_files`."""
    if path.is_file():
        return [path]
    names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return [path / name for name in choose_files(names, source, lambda name: (path / name).read_bytes())]


def local_metadata(path: Path) -> bytes | None:
    """Content of the metadata file beside the data; None when there is none."""
    file = (path.parent if path.is_file() else path) / METADATA_FILE
    return file.read_bytes() if file.is_file() else None


def fingerprint(files: Sequence[Path], root: Path) -> str:
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


@dataclass(frozen=True)
class CsvRows:
    """Rows of CSV files, in order. The reader of the `datasets` library leaves files open.

    Attributes:
        files: with a line of column names each.
        skipped: rows that iteration leaves out.
    """

    files: Sequence[Path]
    skipped: int = 0

    def skip(self, rows: int) -> CsvRows:
        """The same without the first rows."""
        return replace(self, skipped=self.skipped + rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(self._rows(), self.skipped, None)

    def _rows(self) -> Iterator[dict[str, Any]]:
        import pandas
        import pyarrow

        for file in self.files:
            with pandas.read_csv(file, chunksize=_CSV_ROWS) as chunks:
                for chunk in chunks:
                    yield from pyarrow.Table.from_pandas(chunk, preserve_index=False).to_pylist()


def read_files(reader: str, files: Sequence[Path]) -> Dataset | IterableDataset | CsvRows:
    """Stream files of one kind; a text file is one document."""
    from datasets import Dataset, load_dataset

    # The readers of the library fail on files without a row.
    filled = [str(file) for file in files if file.stat().st_size > 0]
    if not filled:
        return Dataset.from_dict({})
    if reader == "csv":
        return CsvRows([Path(file) for file in filled])
    options: dict[str, Any] = {"sample_by": "document"} if reader == "text" else {}
    return load_dataset(reader, data_files={"train": filled}, split="train", streaming=True, **options)


def _names_split(name: str, split: str) -> bool:
    """Whether a word of the path is the split's name, as in `train-00000-of-00002.parquet` or `train/a.jsonl`."""
    return split in re.split(r"[^A-Za-z0-9]+", name)
