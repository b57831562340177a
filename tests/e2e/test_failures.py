"""What goes wrong ends in one clear message in the status and the right exit code, and nothing written is lost."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.lives import Life, conditions, user_namespace
from tests.operator_process import OperatorProcess
from tests.testbed.control_plane import ControlPlane, KubectlError
from tests.testbed.data import POD_DATA, data_directory
from tests.testbed.object_server import ObjectServer

BUCKET = "failures"
SECONDS = 300


def job(name: str) -> dict[str, Any]:
    """A job that succeeds: a tiny random model, two SAEs."""
    return {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "SAETrainingJob",
        "metadata": {"name": name},
        "spec": {
            "activations": {
                "cache": {
                    "model": {"name": f"{POD_DATA}/tiny-model", "dtype": "float32"},
                    "dataset": {"path": f"{POD_DATA}/tiny-text"},
                    "hooks": [{"name": "model.layers.1"}],
                    "contextSize": 16,
                    "tokens": 2000,
                    "storage": {"uri": f"s3://{BUCKET}/caches", "secretRef": {"name": "s3"}},
                    "run": {"backoffLimit": 1},
                }
            },
            "saes": [
                {"name": "first", "architecture": {"type": "topk", "k": 4}, "dSae": 64},
                {"name": "second", "architecture": {"type": "topk", "k": 8}, "dSae": 64},
            ],
            "training": {"tokens": 4000},
            "output": {"uri": f"s3://{BUCKET}/{name}", "secretRef": {"name": "s3"}},
            "run": {"backoffLimit": 3},
        },
    }


def cache_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"]["activations"]["cache"]


@dataclass
class User:
    """Someone who applies manifests in a namespace."""

    control_plane: ControlPlane
    namespace: str
    lives: dict[str, Life] = field(default_factory=dict)

    def apply(self, manifest: dict[str, Any]) -> Life:
        self.control_plane.kubectl("apply", "--namespace", self.namespace, "-f", "-", input=json.dumps(manifest))
        name = manifest["metadata"]["name"]
        self.lives[name] = Life(self.control_plane, self.namespace, "saetrainingjobs", name)
        return self.lives[name]

    def pods(self, life: Life) -> list[dict[str, Any]]:
        uid = life.look()["metadata"]["uid"]
        selector = f"sae-operator.dev/uid={uid}"
        return self.control_plane.get("pods", "--namespace", self.namespace, "-l", selector)["items"]


@pytest.fixture(scope="module")
def user(
    control_plane: ControlPlane,
    object_server: ObjectServer,
    operator: OperatorProcess,
    tiny_model_dir: Path,
    tiny_text_dir: Path,
) -> Iterator[User]:
    object_server.create_bucket(BUCKET)
    empty = data_directory() / "empty-text"
    empty.mkdir(exist_ok=True)
    (empty / "empty.jsonl").write_text('{"text": ""}\n')
    with user_namespace(control_plane, object_server) as namespace:
        wrong = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "else"}
        control_plane.apply(object_server.secret(namespace, "wrong") | {"stringData": wrong})
        yield User(control_plane, namespace)


@pytest.fixture(scope="module")
def finished(user: User) -> Life:
    """A job that ran to its end before anything goes wrong."""
    life = user.apply(job("good"))
    state = life.wait_for_phase("Succeeded", "Failed", seconds=SECONDS)
    assert Life.phase_of(state) == "Succeeded", state["status"]
    return life


def failed(user: User, manifest: dict[str, Any]) -> dict[str, Any]:
    """The resource, once it has failed; it is Stalled, and no GPU step of it has run."""
    life = user.apply(manifest)
    state = life.wait_for_phase("Failed", "Succeeded", seconds=SECONDS)
    assert Life.phase_of(state) == "Failed", state["status"]
    assert conditions(state)["Stalled"]["status"] == "True"
    assert conditions(state)["Ready"]["status"] == "False"
    return state


def told(state: dict[str, Any]) -> str:
    """Reason and message of the terminal condition, in one line."""
    stalled = conditions(state)["Stalled"]
    text = f"{stalled['reason']}: {stalled['message']}"
    assert "\n" not in text
    return text


def exit_codes(user: User, name: str) -> list[int]:
    pods = user.pods(user.lives[name])
    states = [status["state"] for pod in pods for status in pod["status"].get("containerStatuses", [])]
    return [state["terminated"]["exitCode"] for state in states if "terminated" in state]


def test_an_unknown_hook_is_told_with_the_nearest_names(user: User) -> None:
    manifest = job("hook")
    cache_of(manifest)["hooks"] = [{"name": "model.layer.1"}]
    text = told(failed(user, manifest))
    assert "HookNotFound" in text
    assert "hooks[0].name" in text
    assert "model.layers.1" in text
    assert exit_codes(user, "hook") == [2]


def test_a_context_beyond_the_models_limit_is_refused(user: User) -> None:
    manifest = job("context")
    cache_of(manifest)["contextSize"] = 100_000
    text = told(failed(user, manifest))
    assert "contextSize" in text
    assert exit_codes(user, "context") == [2]


def test_a_missing_bucket_is_named(user: User) -> None:
    manifest = job("bucket")
    manifest["spec"]["output"]["uri"] = "s3://no-such-bucket/out"
    text = told(failed(user, manifest))
    assert "BucketNotFound" in text
    assert "no-such-bucket" in text
    assert exit_codes(user, "bucket") == [2]


def test_wrong_credentials_are_told_without_showing_them(user: User) -> None:
    manifest = job("credentials")
    manifest["spec"]["output"]["secretRef"]["name"] = "wrong"
    state = failed(user, manifest)
    assert "CredentialsRefused" in told(state)
    assert "else" not in json.dumps(state["status"]).split('"')
    assert exit_codes(user, "credentials") == [2]


def test_an_unknown_field_is_refused_at_once(user: User) -> None:
    manifest = job("field")
    manifest["spec"]["training"]["learningrate"] = 1e-3
    with pytest.raises(KubectlError, match="learningrate"):
        user.apply(manifest)


def test_an_output_of_another_spec_is_refused_before_caching(user: User, finished: Life) -> None:
    manifest = job("taken")
    manifest["spec"]["output"] = copy.deepcopy(finished.look()["spec"]["output"])
    manifest["spec"]["saes"] = manifest["spec"]["saes"][:1]
    cache_of(manifest)["seed"] = 7  # another cache, which must not be made
    text = told(failed(user, manifest))
    assert "OutputTaken" in text
    assert "output.uri" in text
    assert exit_codes(user, "taken") == [2]
    caches = user.control_plane.get("activationcaches", "--namespace", user.namespace)["items"]
    assert all(cache["spec"]["seed"] == 0 for cache in caches)


def test_a_text_without_tokens_is_told(user: User) -> None:
    manifest = job("empty")
    cache_of(manifest)["dataset"] = {"path": f"{POD_DATA}/empty-text"}
    text = told(failed(user, manifest))
    assert "dataset.path" in text
    assert "has 0 tokens" in text


def test_a_corrupted_shard_stops_training_and_names_the_shard(
    user: User, finished: Life, object_server: ObjectServer
) -> None:
    state = finished.look()
    cache = Life(user.control_plane, user.namespace, "activationcaches", state["status"]["cacheName"])
    manifest_uri = cache.look()["status"]["manifestUri"]
    folder, s3 = manifest_uri.removesuffix("/manifest.json").removeprefix(f"s3://{BUCKET}/"), object_server.client()
    listed = s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{folder}/shards/")["Contents"]
    shard = next(entry["Key"] for entry in listed if entry["Key"].endswith(".safetensors"))
    original = s3.get_object(Bucket=BUCKET, Key=shard)["Body"].read()
    s3.put_object(Bucket=BUCKET, Key=shard, Body=original[:-4] + bytes(4))
    try:
        text = told(failed(user, job("corrupt")))
        assert "CorruptShard" in text
        assert shard.rsplit("/", 1)[1] in text
        assert 2 in exit_codes(user, "corrupt")
    finally:
        s3.put_object(Bucket=BUCKET, Key=shard, Body=original)


def test_one_sae_that_diverges_does_not_stop_the_other(user: User, finished: Life) -> None:
    manifest = job("diverges")
    manifest["spec"]["saes"][0] |= {"training": {"learningRate": 1e9}, "normalizeDecoder": False}
    state = user.apply(manifest).wait_for_phase("Succeeded", "Failed", seconds=SECONDS)
    assert Life.phase_of(state) == "Succeeded", state["status"]
    first, second = state["status"]["saes"]
    assert first["phase"] == "Failed"
    assert "learningRate" in first["message"]
    assert second["phase"] == "Succeeded"
    assert 0 < second["explainedVariance"] <= 1


def test_a_pod_that_is_killed_for_memory_twice_ends_with_the_limit_named(user: User, finished: Life) -> None:
    manifest = job("memory")
    manifest["spec"]["run"]["resources"] = {"limits": {"memory": "96Mi"}}
    text = told(failed(user, manifest))
    assert "OOMKilled" in text
    assert "96Mi" in text
    assert "run.resources.limits.memory" in text


def test_an_image_that_does_not_exist_is_told_while_the_job_waits(user: User) -> None:
    manifest = job("image")
    manifest["spec"]["run"]["image"] = "registry.invalid/no/such:image"
    life = user.apply(manifest)
    state = life.wait(
        "condition about the image",
        lambda state: any("no/such:image" in condition["message"] for condition in conditions(state).values()),
        SECONDS,
    )
    assert Life.phase_of(state) not in ("Running", "Succeeded", "Failed")
    user.control_plane.kubectl("delete", "--namespace", user.namespace, "saejob", "image", "--timeout=120s")
