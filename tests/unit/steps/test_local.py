"""The local run: the manifests of a cluster, in this process, in order, continued where they were interrupted."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job import SAE, run
from sae_job.errors import InvalidInput, Stopped
from sae_job.steps.local import in_dependency_order, run_resources
from sae_operator.api.manifest import parse_manifests
from sae_operator.api.resources import Resource
from sae_operator.api.steps import Progress
from tests.tiny_model import write_tiny_model, write_tiny_text


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_model(folder / "model")
    write_tiny_text(folder / "text")
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def cache(inputs: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(inputs / "model"), "dtype": "float32"},
        "dataset": {"path": str(inputs / "text")},
        "hooks": [{"name": "model.layers.1"}],
        "contextSize": 16,
        "tokens": 3000,
        "storage": {"uri": "s3://bucket/caches", "shardBytes": 131072},
        **changes,
    }


def job(activations: dict[str, Any], name: str = "job", **changes: Any) -> dict[str, Any]:
    return {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "SAETrainingJob",
        "metadata": {"name": name},
        "spec": {
            "activations": activations,
            "saes": [
                {"name": "k4", "architecture": {"type": "topk", "k": 4}, "dSae": 64},
                {"name": "l1", "architecture": {"type": "standard", "l1Coefficient": 0.1}, "dSae": 64},
            ],
            "training": {"tokens": 8192, "batchSize": 128},
            "output": {"uri": f"s3://bucket/{name}"},
            **changes,
        },
    }


def resources(*manifests: dict[str, Any]) -> list[Resource]:
    return parse_manifests("\n---\n".join(json.dumps(manifest) for manifest in manifests), source="test.yaml")


class Recorded:
    """A display that records what it is asked to show, and may act at the first state of a step."""

    def __init__(self, act_in: str = "", act: Any = None) -> None:
        self.titles: list[str] = []
        self.states: list[Progress] = []
        self._act_in, self._act = act_in, act

    @contextmanager
    def __call__(self, title: str) -> Iterator[Any]:
        self.titles.append(title)

        def listen(state: Progress) -> None:
            self.states.append(state)
            if self._act is not None and title.endswith(self._act_in) and state.tokens > 0:
                act, self._act = self._act, None
                act()

        yield listen


def outputs(store: Path, name: str = "job") -> dict[str, bytes]:
    """Files whose content must not depend on interruptions."""
    folder = store / "bucket" / name
    kept = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "metrics.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.name in kept}


def test_the_steps_run_in_order_and_leave_the_documented_layout(inputs: Path, tmp_path: Path) -> None:
    display = Recorded()
    (outcome,) = run_resources(resources(job({"cache": cache(inputs)})), store_root=tmp_path, display=display).jobs
    assert display.titles == ["job preflight", "job prepare", "job cache", "job finalize", "job train"]
    folder = tmp_path / "bucket" / "job"
    for path in ("k4/cfg.json", "k4/sae_weights.safetensors", "k4/sparsity.safetensors", "l1/cfg.json"):
        assert (folder / path).exists()
    results = json.loads((folder / "results.json").read_text())
    assert [sae["name"] for sae in results["saes"]] == ["k4", "l1"]
    assert outcome.result.tokens == results["tokens"] == 8192
    assert results["saes"][0]["explained_variance"] > results["saes"][0]["explained_variance_at_10_percent"] - 0.05
    assert "<svg" in (folder / "report.html").read_text()
    log = (folder / "log.txt").read_text()
    assert "step cache of job" in log
    assert "k4 after 8192 of 8192 tokens: explained_variance" in log
    assert all(json.loads(line)["sae"] in ("k4", "l1") for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert not list((folder / "checkpoints").rglob("*.safetensors")) if (folder / "checkpoints").exists() else True


def test_progress_reaches_the_total_of_each_long_step(inputs: Path, tmp_path: Path) -> None:
    display = Recorded()
    run_resources(resources(job({"cache": cache(inputs)})), store_root=tmp_path, display=display)
    for step in ("cache", "train"):
        last = [state for state in display.states if state.step == step][-1]
        assert last.tokens == last.total_tokens > 0


def test_a_second_job_takes_the_cache_that_is_there(inputs: Path, tmp_path: Path) -> None:
    run_resources(resources(job({"cache": cache(inputs)})), store_root=tmp_path)
    display = Recorded()
    run_resources(resources(job({"cache": cache(inputs)}, "other")), store_root=tmp_path, display=display)
    assert display.titles == ["other preflight", "other prepare", "other train"]


def test_a_finished_job_is_adopted(inputs: Path, tmp_path: Path) -> None:
    manifest = job({"cache": cache(inputs)})
    run_resources(resources(manifest), store_root=tmp_path)
    before = outputs(tmp_path)
    display = Recorded()
    (outcome,) = run_resources(resources(manifest), store_root=tmp_path, display=display).jobs
    assert display.titles == ["job preflight"]
    assert outcome.result.adopted
    assert outcome.result.saes is not None
    assert outputs(tmp_path) == before


@pytest.mark.parametrize("step", ["cache", "train"])
def test_an_interrupted_run_continues_to_the_same_result(inputs: Path, tmp_path: Path, step: str) -> None:
    manifest = resources(job({"cache": cache(inputs)}))
    run_resources(manifest, store_root=tmp_path / "undisturbed")
    interrupt = Recorded(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        run_resources(manifest, store_root=tmp_path / "interrupted", display=interrupt)
    if step == "train":
        assert "stopped after" in (tmp_path / "interrupted/bucket/job/log.txt").read_text()
    run_resources(manifest, store_root=tmp_path / "interrupted")
    assert outputs(tmp_path / "interrupted") == outputs(tmp_path / "undisturbed")


def test_a_cache_of_its_own_is_made_before_the_job_that_refers_to_it(inputs: Path, tmp_path: Path) -> None:
    named = {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "ActivationCache",
        "metadata": {"name": "shared"},
        "spec": cache(inputs),
    }
    display = Recorded()
    run_resources(resources(job({"cacheRef": {"name": "shared"}}), named), store_root=tmp_path, display=display)
    assert display.titles == ["shared prepare", "shared cache", "shared finalize", "job preflight", "job train"]


def live(inputs: Path) -> dict[str, Any]:
    return {key: value for key, value in cache(inputs).items() if key != "storage"} | {"bufferBytes": 2**20}


def test_a_live_job_has_no_cache_steps_and_stores_contexts_alone(inputs: Path, tmp_path: Path) -> None:
    display = Recorded()
    (outcome,) = run_resources(resources(job({"live": live(inputs)})), store_root=tmp_path, display=display).jobs
    assert display.titles == ["job preflight", "job train"]
    assert outcome.result.tokens == 8192
    folder = tmp_path / "bucket/job"
    assert (folder / "k4/cfg.json").exists()
    assert (folder / "activations/tokens/index.json").exists()
    assert not list(tmp_path.rglob("shards"))
    for step, total in (("preflight", 3000), ("train", 8192)):
        last = [state for state in display.states if state.step == step][-1]
        assert last.tokens == last.total_tokens == total


def test_an_interrupted_live_run_continues_to_the_same_result(inputs: Path, tmp_path: Path) -> None:
    manifest = resources(job({"live": live(inputs)}))
    run_resources(manifest, store_root=tmp_path / "undisturbed")
    for step in ("preflight", "train"):
        interrupt = Recorded(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            run_resources(manifest, store_root=tmp_path / "interrupted", display=interrupt)
    run_resources(manifest, store_root=tmp_path / "interrupted")
    assert outputs(tmp_path / "interrupted") == outputs(tmp_path / "undisturbed")


def test_a_reference_to_a_cache_that_is_not_there_names_the_field() -> None:
    with pytest.raises(InvalidInput, match=r"spec\.activations\.cacheRef\.name: no ActivationCache named 'none'"):
        in_dependency_order(resources(job({"cacheRef": {"name": "none"}})))


def test_what_is_wrong_with_an_inline_cache_is_told_with_its_path_in_the_job(inputs: Path, tmp_path: Path) -> None:
    wrong = cache(inputs, dataset={"path": str(inputs / "text"), "column": "body"})
    with pytest.raises(InvalidInput) as caught:
        run_resources(resources(job({"cache": wrong})), store_root=tmp_path)
    assert caught.value.field == "spec.activations.cache.dataset.column"


def test_run_and_load_from_python(inputs: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(job({"cache": cache(inputs)})))
    results = run(file, store=tmp_path / "store")
    assert results["job"]["tokens"] == 8192
    sae = SAE.load(tmp_path / "store" / "bucket" / "job" / "k4")
    assert sae.cfg.hook_name == "model.layers.1"
    assert sae.cfg.context_size == 16
