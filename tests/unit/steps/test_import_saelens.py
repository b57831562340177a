"""A cache from SAELens's data set of activations: the same values, exact statistics, and an import that resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Sequence, Value
from safetensors.torch import load

from sae_job.activations.contexts import ContextReader
from sae_job.activations.manifest import CacheManifest
from sae_job.activations.marker import MARKER_KEY, mark
from sae_job.activations.reader import CachedActivations
from sae_job.activations.saelens_export import CacheExport
from sae_job.activations.verify import verify_cache
from sae_job.cli import run_command_line
from sae_job.errors import InvalidInput
from sae_job.steps.import_saelens import Imported, import_activations
from sae_job.storage.base import ObjectStore, StoreError
from sae_job.storage.file_store import FileStore
from sae_job.text.plan import CacheIndex
from sae_operator.api.activation_cache import Positions, StorageDtype
from tests.caches import finished_cache
from tests.faults import FaultPlan, fail, folder_bytes

HOOK = "blocks.3.hook_resid_post"
CONTEXTS, POSITIONS, D_IN = 50, 8, 16


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def made_up(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """Activations [contexts, positions, d_in], no two of them equal, and token ids."""
    values = np.random.default_rng(0).standard_normal((CONTEXTS, POSITIONS, D_IN)).astype(dtype)
    return values, np.arange(CONTEXTS * POSITIONS, dtype=np.int32).reshape(CONTEXTS, POSITIONS)


def save(folder: Path, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    values, token_ids = made_up(dtype)
    features = Features(
        {HOOK: Array2D(shape=(POSITIONS, D_IN), dtype=dtype), "token_ids": Sequence(Value("int32"), length=POSITIONS)}
    )
    Dataset.from_dict({HOOK: values, "token_ids": token_ids}, features=features).save_to_disk(folder, num_shards=3)
    return values, token_ids


def import_to(store: ObjectStore, folder: Path, **options: Any) -> Imported:
    chosen: dict[str, Any] = {"shard_bytes": 8192} | options
    return import_activations(folder, store, model="gpt2", dataset="text", **chosen)


def rows_in_order(store: ObjectStore, manifest: CacheManifest) -> torch.Tensor:
    """All rows by context and position, decoded."""
    codec, parts = manifest.codec, []
    for entry in manifest.shards:
        tensors = load(store.get(entry.parts[0].key))
        rows = codec.decode(
            {suffix: tensors[HOOK + suffix] for suffix, _, _ in codec.row_tensors(D_IN)},
            {suffix: tensors[HOOK + suffix] for suffix, _, _ in codec.constants(D_IN)},
        )
        order = torch.argsort(tensors["sequence"].long() * manifest.context_size + tensors["position"].long())
        assert not torch.equal(order, torch.arange(entry.rows)), "rows are permuted inside a shard"
        parts.append(rows.float()[order])
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_a_cache_holds_the_data_sets_values(tmp_path: Path, dtype: str) -> None:
    values, token_ids = save(tmp_path / "set", dtype)
    store = FileStore(tmp_path / "cache")
    told: list[tuple[int, int]] = []
    manifest = import_to(store, tmp_path / "set", progress=lambda done, total: told.append((done, total))).manifest
    assert manifest.dtype == {"float64": "float32"}.get(dtype, dtype)
    assert (manifest.tokens, manifest.context_size) == (CONTEXTS * POSITIONS, POSITIONS)
    assert len(manifest.shards) >= 3
    assert all(entry.rows % POSITIONS == 0 for entry in manifest.shards), "shards hold whole contexts"
    assert torch.equal(rows_in_order(store, manifest), torch.from_numpy(values.astype(np.float32)).flatten(0, 1))
    assert told[-1] == (CONTEXTS, CONTEXTS)

    reader = CachedActivations.open(store, hooks=[HOOK], batch_size=8, seed=0, held_out_contexts=7)
    held_out = reader.held_out(1000)
    reader.close()
    assert held_out.token_ids.tolist() == token_ids[:7].flatten().tolist()
    assert torch.equal(
        held_out.activations[HOOK].float(), torch.from_numpy(values[:7].astype(np.float32)).flatten(0, 1)
    )


def test_what_was_exported_of_one_attention_head_comes_back(tmp_path: Path) -> None:
    key = "blocks.3.attn.hook_z:2"
    store, cached = finished_cache(tmp_path / "cache", hooks={key: 8, "blocks.3.mlp": 4}, tokens=500)
    CacheExport(store, cached, key).write(tmp_path / "set")
    manifest = import_to(
        FileStore(tmp_path / "back"), tmp_path / "set", context_size=16, positions=Positions(start=1)
    ).manifest
    assert manifest.spec["hooks"] == [{"name": "blocks.3.attn.hook_z", "headIndex": 2}]
    assert [hook.name for hook in manifest.hooks] == [key]


@pytest.mark.parametrize("dtype", get_args(StorageDtype))
def test_it_is_a_sound_cache_in_every_format(tmp_path: Path, dtype: StorageDtype) -> None:
    save(tmp_path / "set")
    store = FileStore(tmp_path / "cache")
    manifest = import_to(store, tmp_path / "set", dtype=dtype).manifest
    found = verify_cache(store)
    assert (found.problems, found.orphans, found.finished) == ([], [], True)
    rows = rows_in_order(store, manifest).double()
    statistics = manifest.hook(HOOK)
    norms = rows.norm(dim=1)
    torch.testing.assert_close(torch.tensor(statistics.mean, dtype=torch.float64), rows.mean(dim=0))
    assert statistics.mean_norm == pytest.approx(float(norms.mean()))
    assert statistics.mean_squared_norm == pytest.approx(float(norms.square().mean()))


def test_the_manifest_tells_where_it_came_from(tmp_path: Path) -> None:
    save(tmp_path / "set")
    store = FileStore(tmp_path / "cache")
    manifest = import_to(store, tmp_path / "set", prepend_bos=False, seed=3).manifest
    assert manifest.model["name"] == "gpt2"
    assert manifest.spec["model"]["loader"] == "TransformerLens"
    assert manifest.dataset["path"] == "text"
    assert manifest.spec["sampling"]["prependBos"] is False
    assert manifest.seed == 3
    assert manifest.spec["imported"]["format"] == "SAELens"
    assert store.head(MARKER_KEY) is not None


def test_contexts_are_stored_for_the_ce_loss_score(tmp_path: Path) -> None:
    _, token_ids = save(tmp_path / "set")
    store = FileStore(tmp_path / "cache")
    import_to(store, tmp_path / "set")
    index = CacheIndex.load(store)
    assert index is not None
    contexts = ContextReader(store, index).read(0, CONTEXTS)
    assert contexts.tolist() == token_ids.tolist()


def test_rows_of_a_slice_of_positions_keep_their_positions(tmp_path: Path) -> None:
    values, _ = save(tmp_path / "set")
    store = FileStore(tmp_path / "cache")
    manifest = import_to(store, tmp_path / "set", context_size=12, positions=Positions(start=3, stop=-1)).manifest
    tensors = load(store.get(manifest.shards[0].parts[0].key))
    assert sorted(set(tensors["position"].tolist())) == list(range(3, 11))
    assert torch.equal(rows_in_order(store, manifest), torch.from_numpy(values).flatten(0, 1))
    assert verify_cache(store).problems == []
    # The tokens at other positions are not known, so there are no contexts.
    assert CacheIndex.load(store) is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"context_size": 12}, "rows of 8 positions; a context of 12 has 12"),
        ({"positions": Positions(start=1)}, "rows of 8 positions; a context of 8 has 7"),
        ({"hook": "blocks.4"}, "no column 'blocks.4'"),
        ({"context_size": 8, "positions": Positions(start=8)}, "leaves no position"),
    ],
)
def test_what_does_not_fit_is_told_and_nothing_is_written(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    save(tmp_path / "set")
    store = FileStore(tmp_path / "cache")
    with pytest.raises(InvalidInput, match=told):
        import_to(store, tmp_path / "set", **options)
    assert list(store.list()) == []


def test_an_import_that_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    save(tmp_path / "set")
    undisturbed = FileStore(tmp_path / "undisturbed")
    plan = FaultPlan()
    manifest = import_to(plan.wrap(undisturbed), tmp_path / "set").manifest
    for number in range(1, plan.calls + 1):
        store = FileStore(tmp_path / str(number))
        with pytest.raises(StoreError):
            import_to(FaultPlan(at=number, action=fail).wrap(store), tmp_path / "set")
        proved = {info.key for info in store.list("shards/") if info.key.endswith(".json")}
        again = FaultPlan()
        assert import_to(again.wrap(store), tmp_path / "set").manifest == manifest
        assert folder_bytes(store.root) == folder_bytes(undisturbed.root)
        written = {name.removeprefix("put ") for name in again.names if name.startswith("put shards/")}
        assert not proved & written, "what was proved is not written again"


def test_a_second_import_adopts_the_first(tmp_path: Path) -> None:
    save(tmp_path / "set")
    store = FileStore(tmp_path / "cache")
    first = import_to(store, tmp_path / "set")
    second = import_to(store, tmp_path / "set")
    assert (first.adopted, second.adopted) == (False, True)
    assert second.manifest == first.manifest


def test_a_folder_that_holds_another_cache_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "set")
    store = FileStore(tmp_path / "cache")
    mark(store, "another")
    with pytest.raises(InvalidInput, match="holds something else"):
        import_to(store, tmp_path / "set")
    other = FileStore(tmp_path / "other")
    import_to(other, tmp_path / "set")
    with pytest.raises(InvalidInput, match="holds something else"):
        import_to(other, tmp_path / "set", dtype="float16")


def test_what_was_exported_is_imported(tmp_path: Path) -> None:
    store, manifest = finished_cache(tmp_path / "cache", hooks={HOOK: D_IN}, tokens=1000, dtype="float32")
    export = CacheExport(store, manifest, HOOK)
    export.write(tmp_path / "set")
    copy = FileStore(tmp_path / "copy")
    options = {"context_size": manifest.context_size, "positions": Positions(start=1)}
    imported = import_to(copy, tmp_path / "set", **options).manifest
    values = np.concatenate([batch[0] for batch in export.batches()])
    assert torch.equal(rows_in_order(copy, imported), torch.from_numpy(values).flatten(0, 1))


def test_the_command_tells_how_to_train_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "set")
    arguments = ["cache", "import", str(tmp_path / "set"), str(tmp_path / "cache"), "--model", "gpt2"]
    assert run_command_line([*arguments, "--dataset", "text", "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert f"400 rows of {HOOK} in 1 shards" in told
    assert f"activations: {{uri: 'file://{tmp_path}/cache'}}" in told
    assert run_command_line(["cache", "verify", str(tmp_path / "cache")]) == 0
    assert run_command_line(arguments) == 2, "--dataset is missing"
