"""Data sets in an object store: files are fetched one at a time to this machine, read, and removed."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectInfo, ObjectNotFound, ObjectStore, StoreError
from sae_job.text.local_files import METADATA_FILE, choose_files, read_files, reader_for, reader_of
from sae_operator.api.store import StoreLocation

if TYPE_CHECKING:
    from sae_operator.api.activation_cache import DatasetSource

S3 = "s3://"
_PART_BYTES = 2**24


@dataclass(frozen=True)
class StoredFiles:
    """Rows of files in an object store, in order; on disk lies one file at a time.

    Attributes:
        store: where they are.
        files: as they were listed.
        reader: reader of the `datasets` library for them.
        skipped: rows that iteration leaves out.
    """

    store: ObjectStore
    files: Sequence[ObjectInfo]
    reader: str
    skipped: int = 0

    def skip(self, rows: int) -> StoredFiles:
        """The same without the first rows."""
        return replace(self, skipped=self.skipped + rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """
        Raises:
            InvalidInput: a file has changed since it was listed.
            StoreError: the store failed.
        """
        left = self.skipped
        for info in self.files:
            with tempfile.TemporaryDirectory(prefix="sae-data-") as folder:
                path = Path(folder) / PurePosixPath(info.key).name
                _fetch(self.store, info, path)
                for row in read_files(self.reader, [path]):
                    if left > 0:
                        left -= 1
                    else:
                        yield cast("dict[str, Any]", row)

    @property
    def fingerprint(self) -> str:
        """Digest over keys, sizes and etags."""
        told = json.dumps([[info.key, info.size, info.etag] for info in self.files])
        return hashlib.sha256(told.encode()).hexdigest()

    def metadata(self) -> bytes | None:
        """Content of the metadata file beside the data; None when there is none."""
        try:
            return self.store.get(METADATA_FILE)
        except ObjectNotFound:
            return None


def stored_files(source: DatasetSource, open_store: Callable[[StoreLocation], ObjectStore]) -> StoredFiles:
    """Files of a data set at `s3://bucket/prefix`, or the one object of that name.

    Raises:
        InvalidInput: there are none, not those that the source asks for, or of a kind that is not read.
        StoreError: the store failed.
    """
    access = source.store.model_dump() if source.store is not None else {}
    uri = source.path.rstrip("/")
    parent, _, name = uri.rpartition("/")
    if reader_of(name) and parent != S3.rstrip("/"):
        store = open_store(StoreLocation(uri=parent, **access))
        info = store.head(name)
        if info is not None:
            return StoredFiles(store, [info], reader_for(source, [name]))
    store = open_store(StoreLocation(uri=uri, **access))
    there = {info.key: info for info in store.list()}
    if not there:
        raise InvalidInput(
            "DatasetNotFound", f"{source.path} holds no objects; check the address", field="spec.dataset.path"
        )
    names = choose_files(there, source, store.get)
    missing = next((name for name in names if name not in there), None)
    if missing is not None:
        raise InvalidInput(
            "DatasetUnreadable", f"{uri}/{missing} is missing; copy it there again", field="spec.dataset.path"
        )
    return StoredFiles(store, [there[name] for name in names], reader_for(source, names))


def _fetch(store: ObjectStore, info: ObjectInfo, path: Path) -> None:
    now = store.head(info.key)
    if now is None or (now.size, now.etag) != (info.size, info.etag):
        raise InvalidInput(
            "DatasetChanged",
            f"{store.uri}/{info.key} was changed or removed while it was read; bring it back, or start again",
            field="spec.dataset.path",
        )
    with path.open("wb") as file:
        for start in range(0, info.size, _PART_BYTES):
            length = min(_PART_BYTES, info.size - start)
            data = store.get_range(info.key, start, length)
            if len(data) != length:
                raise StoreError(f"{store.uri}/{info.key}: shorter than the {info.size} bytes that it was listed with")
            file.write(data)
