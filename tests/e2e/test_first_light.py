"""The main job on real parts: `kubectl apply` of an example, to trained SAEs in S3 and back to the status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from sae_job import SAE
from tests.e2e.lives import Life, is_current, user_namespace
from tests.operator_process import OperatorProcess
from tests.testbed.control_plane import ControlPlane
from tests.testbed.object_server import ObjectServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "testbed" / "sae-job.yaml"
BUCKET = "saes"
SECONDS = 400
SAE_FILES = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")


@dataclass(frozen=True)
class FirstLight:
    """What one run of the example left, and what a second and a third job found."""

    namespace: str
    job: Life
    cache: Life
    done: dict[str, Any]
    table_while_running: str
    waited: str
    second: Life
    second_cache_jobs: int
    shards_before: dict[str, str]
    shards_after: dict[str, str]
    third: Life
    objects: dict[str, bytes]


def example(name: str, *, tokens: int | None = None) -> dict[str, Any]:
    """The example's manifest under another name and output, and with more tokens where asked."""
    manifest: dict[str, Any] = YAML(typ="safe").load(EXAMPLE.read_text())
    manifest["metadata"]["name"] = name
    manifest["spec"]["output"]["uri"] = f"s3://{BUCKET}/{name}"
    manifest["spec"]["saes"] = manifest["spec"]["saes"][:1]
    if tokens is not None:
        manifest["spec"]["activations"]["cache"]["tokens"] = tokens
        manifest["spec"].setdefault("training", {})["tokens"] = tokens
    return manifest


@pytest.fixture(scope="module")
def s3(object_server: ObjectServer) -> Any:
    return object_server.client()


def etags(s3: Any, prefix: str) -> dict[str, str]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {entry["Key"]: entry["ETag"] for page in pages for entry in page.get("Contents", [])}


@pytest.fixture(scope="module")
def pod_data(small_model_dir: Path, english_text_dir: Path) -> None:
    """The model and the text that pods see as folders."""


@pytest.fixture(scope="module")
def first_light(
    control_plane: ControlPlane, object_server: ObjectServer, operator: OperatorProcess, pod_data: None, s3: Any
) -> Iterator[FirstLight]:
    object_server.create_bucket(BUCKET)
    with user_namespace(control_plane, object_server) as namespace:

        def kubectl(*arguments: str, input: str | None = None) -> str:
            return control_plane.kubectl("--namespace", namespace, *arguments, input=input)

        def start(manifest: dict[str, Any]) -> Life:
            kubectl("apply", "-f", "-", input=json.dumps(manifest))
            return Life(control_plane, namespace, "saetrainingjobs", manifest["metadata"]["name"])

        kubectl("apply", "-f", str(EXAMPLE))
        name = YAML(typ="safe").load(EXAMPLE.read_text())["metadata"]["name"]
        job = Life(control_plane, namespace, "saetrainingjobs", name)
        job.wait_for_phase("WaitingForCache", seconds=SECONDS)
        cache_name = job.look()["status"]["cacheName"]
        cache = Life(control_plane, namespace, "activationcaches", cache_name)

        def caching_or_done(state: dict[str, Any]) -> bool:
            job.look()
            return Life.phase_of(state) in ("Ready", "Failed")

        cache.wait("Ready", caching_or_done, SECONDS)
        job.wait_for_phase("Running", seconds=SECONDS)
        job.wait(
            "a figure while it runs",
            lambda state: (
                bool(state["status"].get("saes", [{}])[0].get("explainedVariance"))
                or Life.phase_of(state) in ("Succeeded", "Failed")
            ),
            SECONDS,
        )
        table = kubectl("get", "saejobs", name)
        done = job.wait_for_phase("Succeeded", "Failed", seconds=SECONDS)
        waited = kubectl("wait", "--for=condition=Ready", f"saejob/{name}", "--timeout=120s")
        bucket_prefix = f"caches/{namespace}/"
        before = etags(s3, bucket_prefix)

        jobs_before = len(cache.jobs())
        second = start(example("second"))
        second.wait_for_phase("Succeeded", "Failed", seconds=SECONDS)
        second_cache_jobs = len(cache.jobs()) - jobs_before

        tokens = cache.look()["spec"]["tokens"]
        third = start(example("third", tokens=tokens + tokens // 2))
        third.wait_for_phase("Succeeded", "Failed", seconds=SECONDS)
        after = etags(s3, bucket_prefix)

        objects = {
            key: s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            for key in etags(s3, f"{name_of_output(done)}/")
            if "checkpoints" not in key
        }
        yield FirstLight(
            namespace, job, cache, done, table, waited, second, second_cache_jobs, before, after, third, objects
        )


def name_of_output(state: dict[str, Any]) -> str:
    return state["spec"]["output"]["uri"].removeprefix(f"s3://{BUCKET}/")


def test_the_job_succeeds(first_light: FirstLight) -> None:
    assert first_light.done["status"]["phase"] == "Succeeded", first_light.done["status"]


def test_it_passes_through_preflight_cache_and_training(first_light: FirstLight) -> None:
    phases = [phase for phase in first_light.job.phases if phase != "Pending"]
    assert [phase for phase in phases if phase != "Queued"] == ["Preflight", "WaitingForCache", "Running", "Succeeded"]


def test_two_pods_wrote_the_cache(first_light: FirstLight) -> None:
    (job,) = [job for job in first_light.cache.jobs("cache") if job["metadata"]["name"].endswith("-1")][:1]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == 2
    assert job["status"]["succeeded"] == 2


def test_the_table_tells_phase_percent_rate_variance_and_l0(first_light: FirstLight) -> None:
    heading, row = first_light.table_while_running.splitlines()
    for column in ("PHASE", "PROGRESS%", "TOKENS/S", "EV", "L0"):
        assert column in heading
    assert "Running" in row or "Succeeded" in row
    assert "0." in row


def test_live_progress_was_in_the_status(first_light: FirstLight) -> None:
    running = [state["status"] for state in first_light.job.states if state.get("status", {}).get("phase") == "Running"]
    assert any(status.get("progress", {}).get("tokensPerSecond") for status in running)
    assert any(0 < status.get("progress", {}).get("percent", 0) <= 100 for status in running)


def test_kubectl_wait_returns(first_light: FirstLight) -> None:
    assert "condition met" in first_light.waited


def test_it_is_never_current_before_it_is_done(first_light: FirstLight) -> None:
    for state in first_light.job.states:
        assert is_current(state) == (Life.phase_of(state) == "Succeeded"), state["status"]


def test_the_result_has_figures_of_both_saes(first_light: FirstLight) -> None:
    status = first_light.done["status"]
    assert [sae["name"] for sae in status["saes"]] == [sae["name"] for sae in first_light.done["spec"]["saes"]]
    for sae, spec in zip(status["saes"], first_light.done["spec"]["saes"], strict=True):
        assert sae["phase"] == "Succeeded"
        assert 0 < sae["explainedVariance"] <= 1
        assert sae["l0"] <= spec["architecture"]["k"]
    assert status["summary"]["sae"] in {sae["name"] for sae in status["saes"]}


def test_the_output_has_the_documented_layout(first_light: FirstLight) -> None:
    prefix = name_of_output(first_light.done)
    names = {key.removeprefix(f"{prefix}/") for key in first_light.objects}
    for sae in first_light.done["spec"]["saes"]:
        assert {f"{sae['name']}/{file}" for file in SAE_FILES} <= names
    assert {"results.json", "metrics.jsonl", "report.html", "log.txt"} <= names


def test_an_sae_loads_from_the_folder_and_keeps_k(first_light: FirstLight, tmp_path: Path) -> None:
    prefix, spec = name_of_output(first_light.done), first_light.done["spec"]["saes"][0]
    for file in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / file).write_bytes(first_light.objects[f"{prefix}/{spec['name']}/{file}"])
    sae = SAE.load(str(tmp_path))
    features = sae.encode(torch.randn(4, sae.cfg.d_in))
    assert features.shape == (4, sae.cfg.d_sae)
    assert (features != 0).sum(dim=1).max() <= spec["architecture"]["k"]


def test_a_second_job_with_the_same_cache_starts_no_cache_job(first_light: FirstLight) -> None:
    assert Life.phase_of(first_light.second.look()) == "Succeeded", first_light.second.look()["status"]
    assert first_light.second_cache_jobs == 0


def test_more_tokens_extend_the_cache_and_leave_old_shards_untouched(first_light: FirstLight) -> None:
    assert Life.phase_of(first_light.third.look()) == "Succeeded", first_light.third.look()["status"]
    shards = {key: tag for key, tag in first_light.shards_before.items() if "/shards/" in key}
    assert shards
    assert {key: first_light.shards_after.get(key) for key in shards} == shards
    assert len([key for key in first_light.shards_after if "/shards/" in key]) > len(shards)
