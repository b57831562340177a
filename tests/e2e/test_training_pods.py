"""A training in two pods on real parts: the same curve as in one, and what the status tells of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.lives import Life, user_namespace
from tests.operator_process import OperatorProcess
from tests.testbed.control_plane import ControlPlane
from tests.testbed.data import POD_DATA
from tests.testbed.object_server import ObjectServer

BUCKET = "pods"
SECONDS = 300
SECRET = {"secretRef": {"name": "s3"}}
CACHE = {
    "model": {"name": f"{POD_DATA}/tiny-model", "dtype": "float32"},
    "dataset": {"path": f"{POD_DATA}/tiny-text"},
    "hooks": [{"name": "model.layers.1"}],
    "contextSize": 16,
    "tokens": 2000,
    "storage": {"uri": f"s3://{BUCKET}/caches", "dtype": "float32", **SECRET},
}


def job(name: str, pods: int) -> dict[str, Any]:
    saes = [
        {"name": "topk", "architecture": {"type": "topk", "k": 4}, "dSae": 64},
        {"name": "batchtopk", "architecture": {"type": "batchtopk", "k": 4}, "dSae": 64},
    ]
    spec = {
        "activations": {"cache": CACHE},
        "saes": saes,
        "training": {"tokens": 4000, "batchSize": 128, "logEverySteps": 1},
        "output": {"uri": f"s3://{BUCKET}/{name}", **SECRET},
        "parallelism": pods,
        "run": {"env": [{"name": "OMP_NUM_THREADS", "value": "1"}]},
    }
    return {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "SAETrainingJob",
        "metadata": {"name": name},
        "spec": spec,
    }


@dataclass(frozen=True)
class Lives:
    """The same training in one pod and in two, with the two's Jobs and pods at the end."""

    alone: Life
    together: Life
    jobs: list[dict[str, Any]]
    pods: list[dict[str, Any]]


@pytest.fixture(scope="module")
def lives(
    control_plane: ControlPlane,
    object_server: ObjectServer,
    operator: OperatorProcess,
    tiny_model_dir: Path,
    tiny_text_dir: Path,
) -> Iterator[Lives]:
    object_server.create_bucket(BUCKET)
    with user_namespace(control_plane, object_server) as namespace:
        found: dict[str, Life] = {}
        for name, pods in (("alone", 1), ("together", 2)):
            control_plane.kubectl("apply", "--namespace", namespace, "-f", "-", input=json.dumps(job(name, pods)))
            found[name] = Life(control_plane, namespace, "saetrainingjobs", name)
        for life in found.values():
            life.wait_for_phase("Succeeded", "Failed", seconds=SECONDS)
        selector = "sae-operator.dev/name=together,sae-operator.dev/step=train"
        jobs, pods = (control_plane.get(kind, "-n", namespace, "-l", selector)["items"] for kind in ("jobs", "pods"))
        yield Lives(found["alone"], found["together"], jobs, pods)


def curve(object_server: ObjectServer, name: str) -> list[dict[str, Any]]:
    body = object_server.client().get_object(Bucket=BUCKET, Key=f"{name}/metrics.jsonl")["Body"].read()
    return [line for line in map(json.loads, body.splitlines()) if "loss" in line]


def test_both_succeed_at_the_first_attempt(lives: Lives) -> None:
    for life in (lives.alone, lives.together):
        state = life.look()
        assert Life.phase_of(state) == "Succeeded", state["status"]
        assert not state["status"].get("attempts"), state["status"]["attempts"]


def test_two_pods_trained_as_one_indexed_job(lives: Lives) -> None:
    (job,) = lives.jobs
    assert (job["spec"]["completionMode"], job["spec"]["completions"]) == ("Indexed", 2)
    indices = {pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] for pod in lives.pods}
    assert indices == {"0", "1"}
    assert {pod["status"]["phase"] for pod in lives.pods} == {"Succeeded"}


def test_the_curve_is_that_of_one_pod(lives: Lives, object_server: ObjectServer) -> None:
    alone, together = curve(object_server, "alone"), curve(object_server, "together")
    assert [(line["step"], line["sae"]) for line in alone] == [(line["step"], line["sae"]) for line in together]
    assert [line["loss"] for line in together] == pytest.approx([line["loss"] for line in alone], rel=1e-5)


def test_tokens_are_counted_once(lives: Lives) -> None:
    state = lives.together.look()
    assert state["status"]["progress"]["tokens"] == lives.alone.look()["status"]["progress"]["tokens"]
    totals = [
        seen["status"]["progress"].get("totalTokens")
        for seen in lives.together.states
        if seen["status"].get("progress")
    ]
    assert max(total for total in totals if total is not None) <= state["status"]["progress"]["tokens"]
