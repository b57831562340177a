"""SAELens's data sets of cached activations: a folder that `datasets.load_from_disk` reads.

Arrow files with a row for each context: a column named after the hook with the activations, `Array2D` [positions,
d_in], and `token_ids`, int32 [positions]. What is written here is read by old and new releases of `datasets`; nothing
of that library is needed to write it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_job.errors import InvalidInput

if TYPE_CHECKING:
    import pyarrow as pa

TOKEN_COLUMN = "token_ids"
STATE_FILE, INFO_FILE = "state.json", "dataset_info.json"
# Data files of about this size: as `datasets` itself makes them.
FILE_BYTES = 500_000_000
# Contexts become rows in batches of about this size.
BATCH_BYTES = 2**25
# How `datasets` names the Arrow type of an Array2D.
_ARRAY_2D = b"datasets.features.features.Array2DExtensionType"
NUMPY_DTYPES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class DatasetShape:
    """What a data set's rows look like.

    Attributes:
        hook: name of the column with the activations.
        positions: positions of a context.
        d_in: width of the activations.
        dtype: `float32` or `float16`.
    """

    hook: str
    positions: int
    d_in: int
    dtype: str

    @property
    def context_bytes(self) -> int:
        return self.positions * (self.d_in * np.dtype(NUMPY_DTYPES[self.dtype]).itemsize + 4)

    @property
    def contexts_per_batch(self) -> int:
        return max(1, BATCH_BYTES // self.context_bytes)

    def features(self) -> dict[str, Any]:
        """The columns in `datasets`' own words, those of its older releases, which newer ones read, too."""
        return {
            self.hook: {"shape": [self.positions, self.d_in], "dtype": self.dtype, "_type": "Array2D"},
            TOKEN_COLUMN: {
                "feature": {"dtype": "int32", "_type": "Value"},
                "length": self.positions,
                "_type": "Sequence",
            },
        }

    def schema(self) -> pa.Schema:
        import pyarrow as pa

        array = {
            b"ARROW:extension:name": _ARRAY_2D,
            b"ARROW:extension:metadata": json.dumps([[self.positions, self.d_in], self.dtype]).encode(),
        }
        values = pa.from_numpy_dtype(NUMPY_DTYPES[self.dtype])
        info = json.dumps({"info": {"features": self.features()}})
        return pa.schema(
            [
                pa.field(self.hook, pa.list_(pa.list_(values)), metadata=array),
                pa.field(TOKEN_COLUMN, pa.list_(pa.int32(), self.positions)),
            ],
            metadata={b"huggingface": info.encode()},
        )

    def record_batch(self, activations: np.ndarray, token_ids: np.ndarray) -> pa.RecordBatch:
        """Rows, without a copy of the values.

        Args:
            activations: [contexts, positions, d_in] in `dtype`, contiguous.
            token_ids: int32 [contexts, positions], contiguous.
        """
        import pyarrow as pa

        contexts = len(activations)
        rows = np.arange(contexts * self.positions + 1, dtype=np.int32) * np.int32(self.d_in)
        outer = np.arange(contexts + 1, dtype=np.int32) * np.int32(self.positions)
        inner = pa.ListArray.from_arrays(pa.array(rows), pa.array(activations.reshape(-1)))
        return pa.record_batch(
            [
                pa.ListArray.from_arrays(pa.array(outer), inner),
                pa.FixedSizeListArray.from_arrays(pa.array(token_ids.reshape(-1)), self.positions),
            ],
            schema=self.schema(),
        )


ContextBatch = tuple[np.ndarray, np.ndarray]
"""Activations [contexts, positions, d_in] and token ids int32 [contexts, positions]."""


def write_dataset(
    folder: Path,
    shape: DatasetShape,
    batches: Iterator[ContextBatch],
    *,
    contexts: int,
    identity: str,
    progress: Callable[[int], None] = lambda contexts: None,
    file_bytes: int = FILE_BYTES,
) -> list[str]:
    """Write a data set into an empty or missing folder; returns the names of its data files.

    `state.json` comes last: a folder without it is not a data set.

    Args:
        shape: what the rows look like.
        batches: the contexts, in order.
        contexts: how many there are in all: the names of the files tell how many files there are.
        identity: what determines the contents: equal ones have equal fingerprints.
        progress: told how many contexts are written.
        file_bytes: size of a data file, about.

    Raises:
        InvalidInput: the folder holds something.
    """
    import pyarrow as pa

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput("OutputTaken", f"{folder} is not empty: delete what is there, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    per_file = max(1, file_bytes // shape.context_bytes)
    files = -(-contexts // per_file)
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    schema = shape.schema()
    done = 0
    rest = ContextStream(batches)
    for number, name in enumerate(names):
        left = min(per_file, contexts - number * per_file)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            while left > 0:
                activations, token_ids = rest.take(min(left, shape.contexts_per_batch))
                stream.write_batch(shape.record_batch(activations, token_ids))
                left -= len(activations)
                done += len(activations)
                progress(done)
    info = {"citation": "", "description": "", "features": shape.features(), "homepage": "", "license": ""}
    (folder / INFO_FILE).write_text(json.dumps(info, indent=2))
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2))
    return names


class ContextStream:
    """Batches of contexts, cut where whoever takes them wants."""

    def __init__(self, batches: Iterator[ContextBatch]) -> None:
        self._batches = batches
        self._held: ContextBatch | None = None

    def take(self, most: int) -> ContextBatch:
        """At least one and at most `most` of the next contexts.

        Raises:
            StopIteration: there are none.
        """
        activations, token_ids = next(self._batches) if self._held is None else self._held
        self._held = (activations[most:], token_ids[most:]) if len(activations) > most else None
        return activations[:most], token_ids[:most]
