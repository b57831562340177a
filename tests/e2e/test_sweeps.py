"""A sweep on real parts: one manifest, SAEs of two hooks from one cache in real pods, and a report in the bucket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job import SAE
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.api.sweep_expansion import expand
from tests.e2e.lives import Life, is_current, user_namespace
from tests.operator_process import OperatorProcess
from tests.testbed.control_plane import ControlPlane
from tests.testbed.data import POD_DATA
from tests.testbed.object_server import ObjectServer
from tests.tiny_model import WIDTH

BUCKET = "sweeps"
SECONDS = 400
pytestmark = pytest.mark.timeout(900)
SECRET = {"secretRef": {"name": "s3"}}
HOOKS = ["model.layers.0", "model.layers.1"]
ROWS = 2000
SPEC: dict[str, Any] = {
    "template": {
        "activations": {
            "cache": {
                "model": {"name": f"{POD_DATA}/tiny-model", "dtype": "float32"},
                "dataset": {"path": f"{POD_DATA}/tiny-text"},
                "hooks": [{"name": hook} for hook in HOOKS],
                "contextSize": 16,
                "tokens": ROWS,
                "storage": {"uri": f"s3://{BUCKET}/caches", "dtype": "float32", **SECRET},
            }
        },
        "saes": [{"name": "sae", "hook": HOOKS[0], "architecture": {"type": "topk", "k": 4}, "dSae": 64}],
        "training": {"tokens": 4000},
        "output": {"uri": f"s3://{BUCKET}/sweep", **SECRET},
    },
    "space": {
        "parameters": [
            {"path": "saes[0].hook", "values": HOOKS},
            {"path": "saes[0].architecture.k", "values": [2, 8]},
        ]
    },
    "trialsPerJob": 3,
    "maxParallel": 1,
    "objective": {"l0AtMost": 4},
}


@dataclass(frozen=True)
class Swept:
    """What a sweep left, and what it left after its space had grown.

    Attributes:
        before, after: ETags of the bucket's objects at the end of the first and of the second round.
        jobs, jobs_after: names of the training jobs, with their phases.
        caches: the namespace's ActivationCaches.
        objects: every object at the end.
    """

    sweep: Life
    first: dict[str, Any]
    second: dict[str, Any]
    before: dict[str, str]
    after: dict[str, str]
    jobs: dict[str, str]
    jobs_after: dict[str, str]
    caches: list[dict[str, Any]]


@pytest.fixture(scope="module")
def s3(object_server: ObjectServer) -> Any:
    return object_server.client()


def etags(s3: Any) -> dict[str, str]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return {entry["Key"]: entry["ETag"] for page in pages for entry in page.get("Contents", [])}


@pytest.fixture(scope="module")
def swept(
    control_plane: ControlPlane,
    object_server: ObjectServer,
    operator: OperatorProcess,
    tiny_model_dir: Path,
    tiny_text_dir: Path,
    s3: Any,
) -> Iterator[Swept]:
    object_server.create_bucket(BUCKET)
    with user_namespace(control_plane, object_server) as namespace:

        def apply(spec: dict[str, Any]) -> None:
            manifest = {
                "apiVersion": "sae-operator.dev/v1alpha1",
                "kind": "SAESweep",
                "metadata": {"name": "sweep"},
                "spec": spec,
            }
            control_plane.kubectl("apply", "--namespace", namespace, "-f", "-", input=json.dumps(manifest))

        def jobs() -> dict[str, str]:
            found = control_plane.get("saetrainingjobs", "-n", namespace)["items"]
            return {job["metadata"]["name"]: job["status"]["phase"] for job in found}

        apply(SPEC)
        sweep = Life(control_plane, namespace, "saesweeps", "sweep")
        first = sweep.wait_for_phase("Succeeded", "Failed", seconds=SECONDS)
        before, jobs_before = etags(s3), jobs()
        parameters = [SPEC["space"]["parameters"][0], {"path": "saes[0].architecture.k", "values": [2, 8, 16]}]
        apply({**SPEC, "space": {"parameters": parameters}})
        second = sweep.wait(
            "the end of the edited sweep",
            lambda state: state["metadata"]["generation"] == 2 and is_current(state),
            SECONDS,
        )
        caches = control_plane.get("activationcaches", "-n", namespace)["items"]
        yield Swept(sweep, first, second, before, etags(s3), jobs_before, jobs(), caches)


def read_json(s3: Any, key: str) -> Any:
    return json.loads(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())


def test_each_trial_is_trained_and_the_status_tells_the_best(swept: Swept) -> None:
    status = swept.first["status"]
    assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
    assert {key: status["trials"][key] for key in ("total", "succeeded", "failed")} == {
        "total": 4,
        "succeeded": 4,
        "failed": 0,
    }
    assert len(swept.jobs) == 2, "four trials, three to a job"
    best = status["best"][0]
    assert best["l0"] <= 4
    assert "saes[0].architecture.k=2" in best["parameters"]
    assert swept.sweep.phases[-1] == "Succeeded"
    assert "Reporting" in swept.sweep.phases


def test_the_model_ran_once_for_both_hooks(swept: Swept) -> None:
    (cache,) = swept.caches
    assert [hook["name"] for hook in cache["spec"]["hooks"]] == HOOKS
    assert cache["status"]["tokens"] == ROWS
    assert not [key for key in swept.before if ".g1." in key], "a second pass would have made a second group"


def test_each_trial_has_a_folder_of_its_own_with_an_sae_of_its_hook(swept: Swept, s3: Any, tmp_path: Path) -> None:
    trials = read_json(s3, "sweep/trials.json")["trials"]
    parameters = [*SPEC["space"]["parameters"][:1], {"path": "saes[0].architecture.k", "values": [2, 8, 16]}]
    spec = {**SPEC, "space": {"parameters": parameters}}
    assert [trial["name"] for trial in trials] == [trial.name for trial in expand(SAESweepSpec.model_validate(spec))]
    for trial in trials:
        (sae,) = trial["saes"]
        folder = sae["uri"].removeprefix(f"s3://{BUCKET}/")
        for file in ("cfg.json", "sae_weights.safetensors"):
            (tmp_path / file).write_bytes(s3.get_object(Bucket=BUCKET, Key=f"{folder}/{file}")["Body"].read())
        loaded = SAE.load(str(tmp_path))
        k = trial["parameters"]["saes[0].architecture.k"]
        assert (loaded.encode(torch.randn(8, WIDTH)) != 0).sum(dim=1).max() <= k
        assert json.loads((tmp_path / "cfg.json").read_text())["hook_name"] == trial["parameters"]["saes[0].hook"]


def test_an_edit_adds_trials_and_runs_none_again(swept: Swept) -> None:
    status = swept.second["status"]
    assert status["trials"]["total"] == status["trials"]["succeeded"] == 6
    assert swept.jobs.items() <= swept.jobs_after.items()
    assert len(swept.jobs_after) == 3
    changed = {key for key, tag in swept.before.items() if swept.after.get(key) != tag}
    assert changed == {"sweep/report.html", "sweep/trials.json"}


def test_the_report_shows_each_trial(swept: Swept, s3: Any) -> None:
    page = s3.get_object(Bucket=BUCKET, Key="sweep/report.html")["Body"].read().decode()
    assert swept.second["status"]["reportUri"] == f"s3://{BUCKET}/sweep/report.html"
    for trial in read_json(s3, "sweep/trials.json")["trials"]:
        assert trial["name"] in page
