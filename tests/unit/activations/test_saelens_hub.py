"""A data set to the Hub: data and metadata in one commit, to one revision, never public by mistake."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from sae_job.activations.saelens_dataset import DatasetShape, write_dataset
from sae_job.activations.saelens_hub import METADATA_FILE, push_dataset
from sae_job.errors import InvalidInput
from sae_job.storage.base import StoreError

HOOK = "blocks.3.hook_resid_post"
VALUES = np.random.default_rng(0).standard_normal((5, 4, 3)).astype(np.float32)
# The library that the Hub's client speaks HTTP with; which one that is has changed.
http: Any = importlib.import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
TOKENS = np.arange(20, dtype=np.int32).reshape(5, 4)


@dataclass
class FakeHub:
    """The Hub's API as far as a push calls it: repositories by id, and what was committed."""

    root: Path
    private: dict[str, bool] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    error: Exception | None = None

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool | None, exist_ok: bool) -> None:
        assert (repo_type, exist_ok) == ("dataset", True)
        if self.error is not None:
            raise self.error
        self.private.setdefault(repo_id, bool(private))

    def repo_info(self, repo_id: str, *, repo_type: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private[repo_id])

    def create_branch(self, repo_id: str, *, branch: str, repo_type: str, exist_ok: bool) -> None:
        assert (repo_id in self.private, repo_type, exist_ok) == (True, "dataset", True)
        self.branches.append(branch)

    def upload_folder(self, *, repo_id: str, folder_path: str | Path, **told: Any) -> None:
        assert repo_id in self.private
        shutil.copytree(folder_path, self.root / repo_id)
        self.commits.append(told)


@pytest.fixture
def hub(tmp_path: Path) -> FakeHub:
    return FakeHub(tmp_path / "hub")


def push(
    tmp_path: Path,
    hub: FakeHub,
    *,
    private: bool = False,
    revision: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> list[str]:
    shape = DatasetShape(HOOK, 4, 3, "float32")
    folder = tmp_path / "set"
    files = write_dataset(
        folder, shape, iter([(VALUES, TOKENS)]), contexts=5, identity="a", file_bytes=3 * shape.context_bytes
    )
    push_dataset(folder, files, "me/acts", private=private, revision=revision, metadata=metadata or {"dIn": 3}, api=hub)
    return files


def test_data_and_metadata_are_one_commit_to_one_revision(tmp_path: Path, hub: FakeHub) -> None:
    push(tmp_path, hub, private=True, revision="v1", metadata={"hook": HOOK, "cache": {"identity": "1"}})
    assert hub.private == {"me/acts": True}
    assert hub.branches == ["v1"]
    (commit,) = hub.commits
    assert (commit["revision"], commit["repo_type"]) == ("v1", "dataset")
    there = hub.root / "me/acts"
    files = sorted(str(path.relative_to(there)) for path in there.rglob("*") if path.is_file())
    assert files == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", METADATA_FILE]
    assert json.loads((there / METADATA_FILE).read_text()) == {"hook": HOOK, "cache": {"identity": "1"}}
    # Files of an earlier push, of which there may have been more, would be read together with these.
    assert commit["delete_patterns"] == ["data/train-*.parquet"]


def test_what_is_pushed_loads_as_a_data_set(tmp_path: Path, hub: FakeHub) -> None:
    push(tmp_path, hub)
    found = load_dataset(str(hub.root / "me/acts/data"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.features[HOOK].shape == (4, 3)
    rows = found.with_format("numpy")[:]
    np.testing.assert_array_equal(rows[HOOK], VALUES)
    np.testing.assert_array_equal(rows["token_ids"], TOKENS)


def test_the_default_branch_is_not_made(tmp_path: Path, hub: FakeHub) -> None:
    push(tmp_path, hub)
    assert hub.branches == []
    assert hub.commits[0]["revision"] is None


def test_nothing_private_goes_to_a_public_repository(tmp_path: Path, hub: FakeHub) -> None:
    hub.private["me/acts"] = False
    with pytest.raises(InvalidInput, match="public already"):
        push(tmp_path, hub, private=True)
    assert hub.commits == []


def test_nothing_is_left_beside_the_data_set(tmp_path: Path, hub: FakeHub) -> None:
    push(tmp_path, hub)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "set"]


def answer(status: int) -> HfHubHTTPError:
    request = http.Request("POST", "https://huggingface.co/api/repos/create")
    return HfHubHTTPError(f"{status} of the Hub\nadvice", response=http.Response(status, request=request))


@pytest.mark.parametrize(
    "error", [answer(401), answer(403), HFValidationError("Repo id must be in the form namespace/name")]
)
def test_what_the_hub_refuses_is_the_users_to_mend(tmp_path: Path, hub: FakeHub, error: Exception) -> None:
    hub.error = error
    with pytest.raises(InvalidInput, match=r"refuses 'me/acts': .*HF_TOKEN") as told:
        push(tmp_path, hub)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("error", [answer(500), answer(503), http.ConnectError("refused"), TimeoutError("slow")])
def test_a_hub_that_cannot_be_reached_is_worth_another_try(tmp_path: Path, hub: FakeHub, error: Exception) -> None:
    hub.error = error
    with pytest.raises(StoreError, match="cannot be reached"):
        push(tmp_path, hub)
