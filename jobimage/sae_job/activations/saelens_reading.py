"""SAELens's data sets of cached activations, read: checked against what they say of themselves, a batch at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sae_job.activations.saelens_dataset import BATCH_BYTES, INFO_FILE, STATE_FILE, TOKEN_COLUMN, ContextBatch
from sae_job.errors import InvalidInput

ACTIVATION_DTYPES = ("float32", "float16", "float64")
TOKEN_DTYPES = ("int32", "int64")


class SavedActivations:
    """A folder with a data set of cached activations.

    Args:
        folder: what `save_to_disk` wrote.
        hook: column with the activations; None for the only one there is.

    Raises:
        InvalidInput: no such data set, or columns of another kind.
    """

    def __init__(self, folder: Path, hook: str | None = None) -> None:
        self.folder = folder
        self._state = self._read_json(STATE_FILE)
        features = self._read_json(INFO_FILE).get("features")
        if not isinstance(features, dict) or not isinstance(self._state.get("_data_files"), list):
            raise self._invalid(f"{INFO_FILE} or {STATE_FILE} does not describe a data set")
        self._features: dict[str, Any] = features
        if self._state.get("_indices_data_files"):
            raise self._invalid(
                "its rows lie in another order than its files: call flatten_indices() and save it again"
            )
        self.hook = hook or self._only_hook()
        self.positions, self.d_in, self.dtype = self._shape()
        self._check_tokens()

    @property
    def fingerprint(self) -> str:
        """Hash of what tells this data set from others without reading it: its own fingerprint, and its files."""
        files = [(path.name, path.stat().st_size) for path in self.files]
        told = json.dumps([self._state.get("_fingerprint"), files, self._features, self.hook], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def files(self) -> list[Path]:
        """Data files in order.

        Raises:
            InvalidInput: one is missing.
        """
        found = [self.folder / str(entry["filename"]) for entry in self._state["_data_files"]]
        missing = [path.name for path in found if not path.is_file()]
        if missing:
            raise self._invalid(f"data files are missing: {', '.join(missing[:3])}")
        return found

    def contexts(self) -> int:
        """How many rows there are.

        Raises:
            InvalidInput: a file is damaged.
        """
        return sum(len(batch) for path in self.files for batch in self._record_batches(path))

    def token_ids(self) -> Iterator[np.ndarray]:
        """Token ids int32 [contexts, positions] of all contexts, in order; activations are not read.

        Raises:
            InvalidInput: as `batches`.
        """
        for path in self.files:
            for batch in self._record_batches(path):
                yield self._values(batch.column(TOKEN_COLUMN), [self.positions], None, path).astype(np.int32)

    def batches(self, skip: int = 0) -> Iterator[ContextBatch]:
        """Activations [contexts, positions, d_in] in the data set's dtype and token ids int32 [contexts, positions], in
        order, without the first `skip` contexts.

        Raises:
            InvalidInput: a file is damaged, or holds rows of another shape.
        """
        item = np.dtype(self.dtype).itemsize
        step = max(1, BATCH_BYTES // (self.positions * self.d_in * item))
        for path in self.files:
            for batch in self._record_batches(path):
                begin = min(skip, len(batch))
                skip -= begin
                for start in range(begin, len(batch), step):
                    part = batch.slice(start, step)
                    values = self._values(part.column(self.hook), [self.positions, self.d_in], self.dtype, path)
                    tokens = self._values(part.column(TOKEN_COLUMN), [self.positions], None, path)
                    yield values, tokens.astype(np.int32, copy=False)

    def _record_batches(self, path: Path) -> Iterator[Any]:
        import pyarrow as pa

        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                missing = {self.hook, TOKEN_COLUMN} - set(stream.schema.names)
                if missing:
                    raise self._invalid(f"{path.name} has no column {', '.join(sorted(missing))}")
                yield from stream
        except pa.ArrowInvalid as error:
            raise self._invalid(f"{path.name} is damaged ({error})") from error

    def _values(self, column: Any, shape: list[int], dtype: str | None, path: Path) -> np.ndarray:
        """Values of nested lists as one array [rows, *shape]."""
        import pyarrow as pa
        from pyarrow.compute import call_function

        rows = len(column)
        array = column.storage if isinstance(column, pa.ExtensionArray) else column
        for length in shape:
            lengths = call_function("min_max", [call_function("list_value_length", [array])]).as_py()
            if array.null_count or set(lengths.values()) != {length}:
                raise self._invalid(f"{path.name} has rows that are not {shape}")
            array = array.flatten()
        if array.null_count or (dtype is not None and str(array.type) != str(pa.from_numpy_dtype(np.dtype(dtype)))):
            raise self._invalid(f"{path.name} has values of type {array.type} instead of {dtype}")
        return array.to_numpy(zero_copy_only=True).reshape(rows, *shape)

    def _only_hook(self) -> str:
        hooks = [name for name, feature in self._features.items() if _kind(feature) == "Array2D"]
        if len(hooks) != 1:
            raise self._invalid(
                f"columns with activations are {', '.join(hooks)}: choose one with --hook"
                if hooks
                else f"it has no column with activations (Array2D), only {', '.join(self._features)}"
            )
        return hooks[0]

    def _shape(self) -> tuple[int, int, str]:
        feature = self._features.get(self.hook)
        if feature is None:
            raise self._invalid(f"it has no column {self.hook!r}; columns: {', '.join(self._features)}")
        shape, dtype = feature.get("shape") if isinstance(feature, dict) else None, _dtype(feature)
        if _kind(feature) != "Array2D" or not isinstance(shape, list) or len(shape) != 2 or not all(shape):
            raise self._invalid(f"column {self.hook!r} is not an Array2D of a fixed shape [context, dIn]")
        if dtype not in ACTIVATION_DTYPES:
            raise self._invalid(f"column {self.hook!r} has dtype {dtype}; known: {', '.join(ACTIVATION_DTYPES)}")
        return int(shape[0]), int(shape[1]), dtype

    def _check_tokens(self) -> None:
        feature = self._features.get(TOKEN_COLUMN)
        if feature is None:
            raise self._invalid(
                f"it has no column {TOKEN_COLUMN!r}: write it again with a newer SAELens, or cache with `sae-job run`"
            )
        inner = feature.get("feature") if isinstance(feature, dict) else None
        if _dtype(inner) not in TOKEN_DTYPES:
            raise self._invalid(f"column {TOKEN_COLUMN!r} is not a list of {' or '.join(TOKEN_DTYPES)}")

    def _read_json(self, name: str) -> dict[str, Any]:
        if (self.folder / "dataset_dict.json").is_file():
            raise self._invalid("it holds several splits: give the folder of one of them")
        try:
            found = json.loads((self.folder / name).read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise self._invalid(f"it is no saved data set: it has no {name}") from None
        except ValueError:
            raise self._invalid(f"{name} is damaged") from None
        if not isinstance(found, dict):
            raise self._invalid(f"{name} is damaged")
        return found

    def _invalid(self, why: str) -> InvalidInput:
        return InvalidInput("DatasetInvalid", f"{self.folder}: {why}")


def _kind(feature: Any) -> str:
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _dtype(feature: Any) -> str:
    return str(feature.get("dtype", "")) if isinstance(feature, dict) else ""
