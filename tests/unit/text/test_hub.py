"""Names on the Hub: resolved to commits by a server that stands in for it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_job.errors import InvalidInput
from sae_job.text.hub import is_connection_trouble, resolve_commit
from tests.hub_server import COMMIT, hub_server

TAGGED = "b" * 40
# Path of a request -> status, the Hub's error code, commit.
ANSWERS: dict[str, tuple[int, str, str]] = {
    "/api/models/team/model": (200, "", COMMIT),
    "/api/models/team/model/revision/v1": (200, "", TAGGED),
    "/api/models/team/model/revision/v2": (404, "RevisionNotFound", ""),
    "/api/models/team/gated": (403, "GatedRepo", ""),
    "/api/models/team/none": (404, "RepoNotFound", ""),
    "/api/datasets/team/data": (200, "", COMMIT),
    "/api/models/team/down": (500, "", ""),
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import huggingface_hub.constants

    with hub_server() as server:
        server.answers.update(ANSWERS)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        yield


def model_commit(name: str, revision: str | None = None) -> str | None:
    return resolve_commit(
        name, revision, kind="model", name_field="spec.model.name", revision_field="spec.model.revision"
    )


@pytest.mark.usefixtures("hub")
def test_a_name_stands_for_the_commit_of_its_branch_or_tag() -> None:
    assert model_commit("team/model") == COMMIT
    assert model_commit("team/model", "v1") == TAGGED
    data = resolve_commit("team/data", None, kind="dataset", name_field="", revision_field="")
    assert data == COMMIT


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "revision", "reason", "field"),
    [
        ("team/model", "v2", "RevisionNotFound", "spec.model.revision"),
        ("team/gated", None, "ModelGated", "spec.model.name"),
        ("team/none", None, "ModelNotFound", "spec.model.name"),
    ],
)
def test_what_the_hub_does_not_have_or_give_is_the_users_to_mend(
    name: str, revision: str | None, reason: str, field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        model_commit(name, revision)
    assert (caught.value.reason, caught.value.field) == (reason, field)


@pytest.mark.usefixtures("hub")
def test_a_hub_in_trouble_is_worth_a_retry() -> None:
    with pytest.raises(OSError) as caught:
        model_commit("team/down")
    assert is_connection_trouble(caught.value)


def test_a_hub_that_cannot_be_reached_is_worth_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    # Bound but not listening: connections are refused.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(Exception, match="refused") as caught:
            model_commit("team/model")
    assert not isinstance(caught.value, InvalidInput)
    assert is_connection_trouble(caught.value)


def test_a_mistake_is_no_trouble_with_the_connection() -> None:
    assert not is_connection_trouble(ValueError("no such split"))


def test_a_folder_has_no_commit(tmp_path: Path) -> None:
    assert model_commit(str(tmp_path)) is None


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(InvalidInput, match="neither a file or folder here nor an id"):
        model_commit(name)


def test_offline_the_commit_is_the_one_in_the_local_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--team--model" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT)
    assert model_commit("team/model") == COMMIT
    assert model_commit("team/other") is None
