"""Data sets and models read from a stand-in for the Hub, at one commit; a Hub in trouble ends in an error in time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hub_client import ask_hub
from tests.hub_server import COMMIT, Hub, Trouble, hub_server
from tests.tiny_model import write_tiny_model

HOOK = "model.layers.1"
TEXTS = ["one", "two", "three"]
TROUBLES: tuple[Trouble, ...] = ("unavailable", "stalls")
# Seconds without an answer, and of trouble. An error must come within BOUND, when all is imported: what comes before
# does that.
WAITS = ["waits", 0.3, 0.3, 1.0]
BOUND = 20


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


def write_dataset(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    (folder / "data").mkdir(parents=True)
    (folder / "lines.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[:2]}), folder / "data" / "train-00000.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[2:]}), folder / "data" / "train-00001.parquet")
    (folder / "sae_lens.json").write_text('{"context_size": 8}')
    return folder


def test_a_data_set_is_read_streaming_and_whole_at_its_commit(hub: Hub, tmp_path: Path) -> None:
    hub.datasets["team/data"] = write_dataset(tmp_path / "data")
    hub.revisions["v1"] = COMMIT
    lines = {"path": "team/data", "dataFiles": ["lines.jsonl"]}
    parquet = {"path": "team/data", "dataFiles": ["data/*.parquet"]}
    answers = ask_hub(
        hub.url,
        tmp_path / "cache",
        [
            ["texts", lines],
            ["texts", parquet],
            ["texts", {**lines, "streaming": False}],
            ["texts", {**parquet, "streaming": False, "revision": "v1"}],
        ],
    )
    assert answers == [{"texts": TEXTS, "revision": COMMIT, "metadata": '{"context_size": 8}'}] * 4
    read = [request for request in hub.requests if request.startswith("GET") and ".parquet" in request]
    assert read
    assert all(f"/resolve/{COMMIT}/" in request for request in read)


def test_what_a_repository_does_not_have_is_the_users_to_mend(hub: Hub, tmp_path: Path) -> None:
    hub.datasets["team/data"] = write_dataset(tmp_path / "data")
    answers = ask_hub(
        hub.url,
        tmp_path / "cache",
        [
            ["texts", {"path": "team/none"}],
            ["texts", {"path": "team/data", "revision": "v9"}],
            ["texts", {"path": "team/data", "dataFiles": ["none.jsonl"]}],
            ["texts", {"path": "team/data", "dataFiles": ["lines.jsonl"], "split": "test"}],
        ],
    )
    assert [answer["invalid"] for answer in answers] == [True] * 4
    fields = [answer["error"].partition(": ")[2].partition(":")[0] for answer in answers]
    assert fields == ["spec.dataset.path", "spec.dataset.revision", "spec.dataset.dataFiles", "spec.dataset.split"]


def check_errors(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert not answer["invalid"], answer["error"]
        assert answer["trouble"], answer["error"]
        assert answer["seconds"] < BOUND


def test_trouble_with_a_data_set_ends_in_an_error_worth_a_retry(hub: Hub, tmp_path: Path) -> None:
    folder = hub.datasets["team/data"] = write_dataset(tmp_path / "data")
    requests: list[list[Any]] = [["texts", {"path": "team/data", "dataFiles": ["lines.jsonl"]}]]
    for kind, path, streaming in itertools.product(TROUBLES, ("/api/datasets/{}", "{}/resolve/"), (True, False)):
        name = f"team/data-{len(requests)}"
        hub.datasets[name], hub.troubles[path.format(name)] = folder, kind
        requests += [WAITS, ["texts", {"path": name, "dataFiles": ["lines.jsonl"], "streaming": streaming}]]
    check_errors(ask_hub(hub.url, tmp_path / "cache", requests)[2::2])


def test_a_model_is_read_at_its_commit(hub: Hub, tmp_path: Path) -> None:
    from sae_job.models.load import load_hooked_model
    from sae_job.text.tokenize import TextTokenizer, load_tokenizer
    from sae_operator.api.activation_cache import ModelSource

    hub.models["team/tiny"] = write_tiny_model(tmp_path / "model")
    (answer,) = ask_hub(hub.url, tmp_path / "cache", [["model", "team/tiny", HOOK]])
    source = ModelSource(name=str(tmp_path / "model"), dtype="float32")
    (tokens,) = TextTokenizer(load_tokenizer(source)).encode(["some text"])
    local = load_hooked_model(source, [HOOK], device="cpu").activations(tokens.unsqueeze(0))[HOOK]
    assert answer["revision"] == COMMIT
    assert answer["tokens"] == tokens.tolist()
    torch.testing.assert_close(torch.tensor(answer["activations"]), local, rtol=1e-4, atol=1e-4)


def test_trouble_with_a_model_ends_in_an_error_worth_a_retry(hub: Hub, tmp_path: Path) -> None:
    folder = hub.models["team/tiny"] = write_tiny_model(tmp_path / "model")
    requests: list[list[Any]] = [["model", "team/tiny", HOOK]]
    for kind, file in itertools.product(TROUBLES, ("config.json", "tokenizer", "model.safetensors")):
        name = f"team/tiny-{len(requests)}"
        hub.models[name], hub.troubles[f"{name}/resolve/{COMMIT}/{file}"] = folder, kind
        requests += [WAITS, ["model", name, HOOK]]
    check_errors(ask_hub(hub.url, tmp_path / "cache", requests)[2::2])
