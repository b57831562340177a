"""A cache that a second job extends by a hook, and a job without a cache, on real parts; the text lies in a bucket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job import SAE
from tests.e2e.lives import Life, user_namespace
from tests.operator_process import OperatorProcess
from tests.testbed.control_plane import ControlPlane
from tests.testbed.data import POD_DATA
from tests.testbed.object_server import ObjectServer
from tests.tiny_model import WIDTH

BUCKET = "extensions"
SECONDS = 300
A, B = "model.layers.1", "model.layers.0"
SECRET = {"secretRef": {"name": "s3"}}


def source(*hooks: str) -> dict[str, Any]:
    """A tiny random model, and text whose bucket is opened with the namespace's endpoint."""
    return {
        "model": {"name": f"{POD_DATA}/tiny-model", "dtype": "float32"},
        "dataset": {"path": f"s3://{BUCKET}/text/", "store": SECRET},
        "hooks": [{"name": hook} for hook in hooks],
        "contextSize": 16,
        "tokens": 2000,
    }


def cached(*hooks: str) -> dict[str, Any]:
    # A row is 32 float32 numbers and 12 bytes: three shards, the last one partial.
    return {
        "cache": source(*hooks)
        | {"storage": {"uri": f"s3://{BUCKET}/caches", "dtype": "float32", "shardBytes": 2**17, **SECRET}}
    }


def job(name: str, hook: str, activations: dict[str, Any]) -> dict[str, Any]:
    sae = {"name": "sae", "hook": hook, "architecture": {"type": "topk", "k": 4}, "dSae": 64}
    output = {"uri": f"s3://{BUCKET}/{name}", **SECRET}
    spec = {"activations": activations, "saes": [sae], "training": {"tokens": 4000}, "output": output}
    return {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "SAETrainingJob",
        "metadata": {"name": name},
        "spec": spec,
    }


@dataclass(frozen=True)
class Extensions:
    """What three jobs left: on hook A, on hook B of the same cache, and on hook A of a live source.

    Attributes:
        before, after: ETags of the cache's objects before and after the second job.
        caches: the namespace's ActivationCaches at the end.
    """

    first: Life
    second: Life
    live: Life
    before: dict[str, str]
    after: dict[str, str]
    caches: list[dict[str, Any]]


@pytest.fixture(scope="module")
def s3(object_server: ObjectServer) -> Any:
    return object_server.client()


def etags(s3: Any, prefix: str) -> dict[str, str]:
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {entry["Key"].removeprefix(prefix): entry["ETag"] for page in pages for entry in page.get("Contents", [])}


@pytest.fixture(scope="module")
def extensions(
    control_plane: ControlPlane,
    object_server: ObjectServer,
    operator: OperatorProcess,
    tiny_model_dir: Path,
    tiny_text_dir: Path,
    s3: Any,
) -> Iterator[Extensions]:
    object_server.create_bucket(BUCKET)
    for path in tiny_text_dir.glob("*.jsonl"):
        s3.upload_file(str(path), BUCKET, f"text/{path.name}")
    with user_namespace(control_plane, object_server) as namespace:

        def start(manifest: dict[str, Any]) -> Life:
            control_plane.kubectl("apply", "--namespace", namespace, "-f", "-", input=json.dumps(manifest))
            return Life(control_plane, namespace, "saetrainingjobs", manifest["metadata"]["name"])

        first, live = start(job("first", A, cached(A))), start(job("live", A, {"live": source(A)}))
        for life in (first, live):
            life.wait_for_phase("Succeeded", "Failed", seconds=SECONDS)
        prefix = f"caches/{namespace}/"
        before = etags(s3, prefix)
        second = start(job("second", B, cached(A, B)))
        second.wait_for_phase("Succeeded", "Failed", seconds=SECONDS)
        caches = control_plane.get("activationcaches", "-n", namespace)["items"]
        yield Extensions(first, second, live, before, etags(s3, prefix), caches)


def load_sae(s3: Any, name: str, folder: Path) -> SAE:
    for file in ("cfg.json", "sae_weights.safetensors"):
        (folder / file).write_bytes(s3.get_object(Bucket=BUCKET, Key=f"{name}/sae/{file}")["Body"].read())
    return SAE.load(str(folder))


@pytest.mark.parametrize("name", ["first", "second", "live"])
def test_each_job_succeeds(extensions: Extensions, name: str) -> None:
    state = getattr(extensions, name).look()
    assert Life.phase_of(state) == "Succeeded", state["status"]
    assert 0 < state["status"]["saes"][0]["explainedVariance"] <= 1


def test_both_hooks_are_in_one_cache(extensions: Extensions) -> None:
    (cache,) = extensions.caches
    assert extensions.first.look()["status"]["cacheName"] == cache["metadata"]["name"]
    assert extensions.second.look()["status"]["cacheName"] == cache["metadata"]["name"]
    assert [hook["name"] for hook in cache["spec"]["hooks"]] == [A, B]
    facts = [(hook["name"], hook["dIn"]) for hook in cache["status"]["hooks"]]
    assert facts == [(A, WIDTH), (B, WIDTH)]
    assert cache["status"]["tokens"] == 2000


def test_the_extension_leaves_shards_and_contexts_untouched(extensions: Extensions) -> None:
    changed = {key for key, tag in extensions.before.items() if extensions.after.get(key) != tag}
    assert {key.split("/", 1)[1] for key in changed} <= {"manifest.json", "tokens/index.json"}
    shards = {key for key in extensions.before if "/shards/" in key}
    added = {key for key in extensions.after if "/shards/" in key} - shards
    assert len(shards) == len(added) == 6
    assert all(".g1." in key for key in added)


def test_the_second_sae_is_of_the_hook_that_was_added(extensions: Extensions, s3: Any, tmp_path: Path) -> None:
    sae = load_sae(s3, "second", tmp_path)
    assert sae.encode(torch.randn(4, WIDTH)).shape == (4, 64)
    assert json.loads((tmp_path / "cfg.json").read_text())["hook_name"] == B


def test_a_live_job_stores_contexts_and_no_activations(extensions: Extensions, s3: Any, tmp_path: Path) -> None:
    assert "cacheName" not in extensions.live.look()["status"]
    steps = {job["metadata"]["labels"]["sae-operator.dev/step"] for job in extensions.live.jobs()}
    assert steps == {"preflight", "train"}
    below = etags(s3, "live/activations/")
    assert "tokens/index.json" in below
    assert not [key for key in below if "shards" in key]
    assert load_sae(s3, "live", tmp_path).cfg.d_in == WIDTH
