"""SAELens's data sets of cached activations: what is written is what `datasets` reads, and what it wrote is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Array2D, Dataset, Features, Sequence, Value, load_from_disk

from sae_job.activations.saelens_dataset import ContextBatch, DatasetShape, write_dataset
from sae_job.activations.saelens_reading import SavedActivations
from sae_job.errors import InvalidInput

HOOK = "blocks.3.hook_resid_post"
POSITIONS, D_IN = 4, 3


def contexts(count: int, dtype: str = "float32") -> ContextBatch:
    values = np.random.default_rng(0).standard_normal((count, POSITIONS, D_IN)).astype(dtype)
    return values, np.arange(count * POSITIONS, dtype=np.int32).reshape(count, POSITIONS)


def in_batches(all_contexts: ContextBatch, sizes: list[int]) -> Iterator[ContextBatch]:
    start = 0
    for size in sizes:
        yield all_contexts[0][start : start + size], all_contexts[1][start : start + size]
        start += size


def saved_by_datasets(folder: Path, *, dtype: str = "float32", tokens: str = "int32", count: int = 5) -> ContextBatch:
    """A data set as the library itself writes it."""
    values, token_ids = contexts(count, dtype)
    features = Features(
        {
            HOOK: Array2D(shape=(POSITIONS, D_IN), dtype=dtype),
            "token_ids": Sequence(Value(tokens), length=POSITIONS),
        }
    )
    Dataset.from_dict({HOOK: values, "token_ids": token_ids}, features=features).save_to_disk(folder, num_shards=2)
    return values, token_ids


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_datasets_reads_what_is_written(tmp_path: Path, dtype: str) -> None:
    written = contexts(7, dtype)
    shape = DatasetShape(HOOK, POSITIONS, D_IN, dtype)
    told: list[int] = []
    names = write_dataset(
        tmp_path / "set",
        shape,
        in_batches(written, [5, 2]),
        contexts=7,
        identity="a",
        progress=told.append,
        file_bytes=3 * shape.context_bytes,
    )
    assert names == [f"data-0000{number}-of-00003.arrow" for number in range(3)]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [*names, "dataset_info.json", "state.json"]
    # Files hold 3 contexts; batches end where either a file or what came in does.
    assert told == [3, 5, 6, 7]

    found = load_from_disk(str(tmp_path / "set"))
    assert isinstance(found, Dataset)
    assert found.column_names == [HOOK, "token_ids"]
    assert found.features[HOOK].shape == (POSITIONS, D_IN)
    assert found.features[HOOK].dtype == dtype
    rows = found.with_format("numpy")[:]
    np.testing.assert_array_equal(rows[HOOK], written[0])
    np.testing.assert_array_equal(rows["token_ids"], written[1])


def test_equal_contents_have_equal_fingerprints(tmp_path: Path) -> None:
    def fingerprint(folder: str, identity: str) -> str:
        shape = DatasetShape(HOOK, POSITIONS, D_IN, "float32")
        write_dataset(tmp_path / folder, shape, iter([contexts(2)]), contexts=2, identity=identity)
        return json.loads((tmp_path / folder / "state.json").read_text())["_fingerprint"]

    assert fingerprint("1", "a") == fingerprint("2", "a") != fingerprint("3", "b")


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    shape = DatasetShape(HOOK, POSITIONS, D_IN, "float32")
    with pytest.raises(InvalidInput, match="not empty"):
        write_dataset(tmp_path, shape, iter([contexts(1)]), contexts=1, identity="a")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("tokens", ["int32", "int64"])
def test_what_datasets_wrote_is_read(tmp_path: Path, dtype: str, tokens: str) -> None:
    values, token_ids = saved_by_datasets(tmp_path, dtype=dtype, tokens=tokens)
    saved = SavedActivations(tmp_path)
    assert (saved.hook, saved.positions, saved.d_in, saved.dtype) == (HOOK, POSITIONS, D_IN, dtype)
    assert saved.contexts() == 5
    for skip in range(6):
        found = list(saved.batches(skip))
        assert sum(len(batch[0]) for batch in found) == 5 - skip
        if found:
            np.testing.assert_array_equal(np.concatenate([batch[0] for batch in found]), values[skip:])
            np.testing.assert_array_equal(np.concatenate([batch[1] for batch in found]), token_ids[skip:])
            assert {batch[1].dtype for batch in found} == {np.dtype(np.int32)}


def read_all(folder: Path) -> list[ContextBatch]:
    return list(SavedActivations(folder).batches())


def edit_json(name: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        edit(told)
        (folder / name).write_text(json.dumps(told))

    return damage


def other_rows(folder: Path) -> None:
    """Arrow files of another shape than dataset_info.json tells."""
    shutil.rmtree(folder)
    saved_by_datasets(folder)
    edit_json("dataset_info.json", lambda told: told["features"][HOOK].update(shape=[2, 6]))(folder)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no saved data set: it has no state.json"),
    "no info": (lambda folder: (folder / "dataset_info.json").unlink(), "no dataset_info.json"),
    "no JSON": (lambda folder: (folder / "state.json").write_text("{"), "state.json is damaged"),
    "splits": (lambda folder: (folder / "dataset_dict.json").write_text("{}"), "several splits"),
    "no activations": (edit_json("dataset_info.json", lambda told: told["features"].pop(HOOK)), "no column with"),
    "no tokens": (edit_json("dataset_info.json", lambda told: told["features"].pop("token_ids")), "'token_ids'"),
    "integers": (
        edit_json("dataset_info.json", lambda told: told["features"][HOOK].update(dtype="int8")),
        "dtype int8; known: float32, float16, float64",
    ),
    "any length": (
        edit_json("dataset_info.json", lambda told: told["features"][HOOK].update(shape=[None, 3])),
        "fixed shape",
    ),
    "text": (
        edit_json("dataset_info.json", lambda told: told["features"]["token_ids"]["feature"].update(dtype="string")),
        "'token_ids' is not a list of int32",
    ),
    "indices": (edit_json("state.json", lambda told: told.update(_indices_data_files=["i.arrow"])), "flatten_indices"),
    "file gone": (lambda folder: (folder / "data-00001-of-00002.arrow").unlink(), "missing: data-00001-of-00002"),
    "file cut": (lambda folder: (folder / "data-00000-of-00002.arrow").write_bytes(b"cut"), "00000-of-00002"),
    "other rows": (other_rows, "rows that are not"),
    "other column": (
        edit_json("dataset_info.json", lambda told: told["features"].update(x=told["features"].pop(HOOK))),
        "has no column x",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_no_such_data_set_is_told(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "set"
    saved_by_datasets(folder)
    damage, told = DAMAGE[kind]
    damage(folder)
    with pytest.raises(InvalidInput, match=told) as error:
        read_all(folder)
    assert str(error.value).startswith(str(folder))


def test_one_of_several_hooks_is_chosen_by_name(tmp_path: Path) -> None:
    values, token_ids = contexts(2)
    array = Array2D(shape=(POSITIONS, D_IN), dtype="float32")
    features = Features({"a": array, "b": array, "token_ids": Sequence(Value("int32"), length=POSITIONS)})
    Dataset.from_dict({"a": values, "b": -values, "token_ids": token_ids}, features=features).save_to_disk(tmp_path)
    with pytest.raises(InvalidInput, match="a, b: choose one with --hook"):
        SavedActivations(tmp_path)
    with pytest.raises(InvalidInput, match="no column 'c'"):
        SavedActivations(tmp_path, "c")
    ((found, _),) = SavedActivations(tmp_path, "b").batches()
    np.testing.assert_array_equal(found, -values)
