"""The chart's release in real containers: the operator runs, trains, tells of what goes wrong, is checked and stops."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.containers.conftest import MODEL_IMAGE, RunHelm
from tests.e2e.lives import Life
from tests.testbed.control_plane import ControlPlane
from tests.testbed.images import OPERATOR_IMAGE
from tests.testbed.kubelet import KubeletNode
from tests.testbed.object_server import ObjectServer
from tests.testbed.paths import CHECKOUT
from tests.testbed.waiting import wait_for

CHART = CHECKOUT / "helm" / "sae-operator"
EXAMPLE = CHECKOUT / "examples" / "testbed" / "sae-job.yaml"
RELEASE = "sae-operator"
OPERATOR_NAMESPACE, TEAM = "sae-operator", "interpretability"
BUCKET = "saes"
SECONDS = 480


@dataclass(frozen=True)
class Release:
    """An installed chart, and the store as pods see it."""

    control_plane: ControlPlane
    endpoint: str
    run_helm: RunHelm
    options: tuple[str, ...]

    def operator_pod(self) -> dict[str, Any]:
        selector = f"app.kubernetes.io/name=sae-operator,app.kubernetes.io/instance={RELEASE}"
        (pod,) = self.control_plane.get("pods", "-n", OPERATOR_NAMESPACE, "-l", selector)["items"]
        return pod

    def apply(self, manifest: dict[str, Any]) -> Life:
        self.control_plane.kubectl("apply", "-n", TEAM, "-f", "-", input=json.dumps(manifest))
        return Life(self.control_plane, TEAM, "saetrainingjobs", manifest["metadata"]["name"])

    def pods(self, life: Life, step: str) -> list[dict[str, Any]]:
        selector = f"sae-operator.dev/uid={life.look()['metadata']['uid']},sae-operator.dev/step={step}"
        return self.control_plane.get("pods", "-n", TEAM, "-l", selector)["items"]


def restricted_namespace(name: str) -> dict[str, Any]:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def example(name: str | None = None) -> dict[str, Any]:
    manifest: dict[str, Any] = YAML(typ="safe").load(EXAMPLE.read_text())
    if name is not None:
        manifest["metadata"]["name"] = name
        manifest["spec"]["output"]["uri"] = f"s3://{BUCKET}/{name}"
    return manifest


@pytest.fixture(scope="module")
def release(
    control_plane: ControlPlane, machine: KubeletNode, object_server: ObjectServer, run_helm: RunHelm
) -> Iterator[Release]:
    object_server.create_bucket(BUCKET)
    endpoint = f"http://{machine.publish(int(object_server.endpoint.rpartition(':')[2]))}"
    control_plane.apply([restricted_namespace(OPERATOR_NAMESPACE), restricted_namespace(TEAM)])
    defaults = {"name": "sae-operator-defaults", "namespace": TEAM}
    control_plane.apply(
        [
            object_server.secret(OPERATOR_NAMESPACE),
            object_server.secret(TEAM),
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": defaults, "data": {"endpointUrl": endpoint}},
        ]
    )
    repository, _, tag = OPERATOR_IMAGE.partition(":")
    values = {
        "image.repository": repository,
        "image.tag": tag,
        "jobImage": MODEL_IMAGE,
        "doctor.store": f"s3://{BUCKET}/doctor",
        "doctor.endpointUrl": endpoint,
        "doctor.secretName": "s3",
    }
    settings = [argument for name, value in values.items() for argument in ("--set-string", f"{name}={value}")]
    options = (RELEASE, str(CHART), f"--namespace={OPERATOR_NAMESPACE}", *settings)
    done = run_helm("install", *options, "--wait", "--timeout=120s")
    assert done.returncode == 0, f"{done.stderr}\n{machine.log_tail()}"
    yield Release(control_plane, endpoint, run_helm, options)
    run_helm("uninstall", RELEASE, f"--namespace={OPERATOR_NAMESPACE}", "--wait", "--timeout=60s")


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    (status,) = pod["status"]["containerStatuses"]
    return status


def test_the_operator_is_ready_and_its_probes_pass(release: Release) -> None:
    pod = release.operator_pod()
    container = container_of(pod)
    assert container["ready"]
    assert container["restartCount"] == 0
    assert OPERATOR_IMAGE in container["image"]
    for port, path in (("8081", "healthz"), ("8082", "readyz"), ("8082", "metrics")):
        url = f"/api/v1/namespaces/{OPERATOR_NAMESPACE}/pods/{pod['metadata']['name']}:{port}/proxy/{path}"
        status, body = release.control_plane.request("GET", url)
        assert status == 200, body


@pytest.mark.timeout(2 * SECONDS)
def test_an_example_trains_to_its_end(release: Release, object_server: ObjectServer) -> None:
    manifest = example()
    # Progress is written every ten seconds: what lasts half a minute shows some.
    manifest["spec"]["training"]["tokens"] = 288_000
    life = release.apply(manifest)
    done = life.wait_for_phase("Succeeded", "Failed", seconds=SECONDS)
    assert done["status"]["phase"] == "Succeeded", done["status"]
    assert [sae["phase"] for sae in done["status"]["saes"]] == ["Succeeded", "Succeeded"]
    running = [state["status"] for state in life.states if Life.phase_of(state) == "Running"]
    told = [status.get("progress") for status in running]
    assert any(progress and progress["tokensPerSecond"] for progress in told), f"the operator reaches no pod: {told}"
    (pod,) = release.pods(life, "train")
    container = pod["spec"]["containers"][0]
    assert container["image"] == MODEL_IMAGE
    assert container["securityContext"]["readOnlyRootFilesystem"]
    name = done["metadata"]["name"]
    listed = object_server.client().list_objects_v2(Bucket=BUCKET, Prefix=f"{name}/")["Contents"]
    keys = {entry["Key"].removeprefix(f"{name}/") for entry in listed}
    assert {"k16/sae_weights.safetensors", "k16/cfg.json", "k32/cfg.json", "results.json", "report.html"} <= keys


@pytest.mark.timeout(2 * SECONDS)
def test_an_oom_kill_is_told_in_the_status(release: Release) -> None:
    manifest = example("too-little-memory")
    cache = manifest["spec"]["activations"]["cache"]
    # A cache of its own: the memory is the cache pods'.
    cache["tokens"] = 6000
    cache["contextSize"] = 32
    cache["parallelism"] = 1
    manifest["spec"]["training"]["tokens"] = 6000
    cache["run"] = {"backoffLimit": 0, "resources": {"limits": {"memory": "200Mi"}}}
    life = release.apply(manifest)

    def told(state: dict[str, Any]) -> bool:
        return "OOMKilled" in json.dumps(state.get("status", {})) or Life.phase_of(state) in ("Succeeded", "Failed")

    state = life.wait("an OOM kill is told", told, SECONDS)
    status = json.dumps(state["status"])
    assert "OOMKilled" in status or "memory" in status, state["status"]
    cache_life = Life(release.control_plane, TEAM, "activationcaches", state["status"]["cacheName"])
    failed = cache_life.wait("its end", lambda one: Life.phase_of(one) in ("Failed", "Ready"), SECONDS)
    assert failed["status"]["phase"] == "Failed", failed["status"]
    ended = json.dumps(failed["status"])
    assert "OOMKilled" in ended, ended
    assert "200Mi" in ended, ended
    assert "run.resources" in ended, "the field to change"
    pods = release.pods(cache_life, "cache")
    states = [container_of(pod)["state"]["terminated"] for pod in pods]
    assert {(one["exitCode"], one["reason"]) for one in states} == {(137, "OOMKilled")}


def test_an_image_that_cannot_be_pulled_is_told_in_the_status(release: Release) -> None:
    manifest = copy.deepcopy(example("no-such-image"))
    # Nothing listens there: as a registry that is down.
    manifest["spec"]["run"] = {"image": "localhost:1/team/sae-job:missing"}
    life = release.apply(manifest)

    def told(state: dict[str, Any]) -> bool:
        return "localhost:1/team/sae-job:missing" in json.dumps(state.get("status", {}))

    status = life.wait("the image is named", told, 120)["status"]
    text = json.dumps(status)
    assert "ImagePull" in text, status
    assert "connection refused" in text, status
    assert status["phase"] != "Failed", status
    release.control_plane.kubectl("delete", "saetrainingjob", "no-such-image", "-n", TEAM, "--timeout=60s")
    selector = "--field-selector=status.phase=Pending"
    wait_for(lambda: not release.control_plane.get("pods", "-n", TEAM, selector)["items"], 60, what="its pod is gone")


def test_helm_test_runs_the_doctor(release: Release) -> None:
    done = release.run_helm("test", RELEASE, f"--namespace={OPERATOR_NAMESPACE}", "--logs", "--timeout=120s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Phase:          Succeeded" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith(("✓", "✗"))]
    assert len(lines) >= 16, done.stdout
    assert any("racers for one object: one winner" in line for line in lines)
    assert any("own port: 10.244.77." in line for line in lines), "through the pods' network"


def test_helm_test_tells_what_is_wrong(release: Release) -> None:
    wrong = ("--set-string", "doctor.store=s3://no-such-bucket/doctor")
    done = release.run_helm("upgrade", *release.options, *wrong, "--wait", "--timeout=120s")
    assert done.returncode == 0, done.stderr
    done = release.run_helm("test", RELEASE, f"--namespace={OPERATOR_NAMESPACE}", "--logs", "--timeout=120s")
    assert done.returncode != 0
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("✗")]
    assert "bucket no-such-bucket" in line
    assert "create it" in line


def test_the_operator_never_failed_a_probe_once_it_was_ready(release: Release) -> None:
    pod = release.operator_pod()
    (ready,) = [one for one in pod["status"]["conditions"] if one["type"] == "Ready"]
    failed = release.control_plane.get("events", "-n", OPERATOR_NAMESPACE, "--field-selector=reason=Unhealthy")["items"]
    # It is not ready before it has listed everything.
    late = [one["message"] for one in failed if one["lastTimestamp"] > ready["lastTransitionTime"]]
    assert late == []
    assert not [one["message"] for one in failed if one["message"].startswith("Liveness")]
    container = container_of(pod)
    assert (container["restartCount"], container["lastState"]) == (0, {})


def test_it_stops_when_it_is_told_to(release: Release) -> None:
    name = release.operator_pod()["metadata"]["name"]
    seen: list[dict[str, Any]] = []
    release.control_plane.kubectl("delete", "pod", name, "-n", OPERATOR_NAMESPACE, "--wait=false")

    def ended() -> bool:
        status, body = release.control_plane.request("GET", f"/api/v1/namespaces/{OPERATOR_NAMESPACE}/pods/{name}")
        if status == 404:
            return True
        for one in json.loads(body)["status"]["containerStatuses"]:
            if "terminated" in one["state"]:
                seen.append(one["state"]["terminated"])
        return False

    wait_for(ended, 29, what="the pod is gone before it would be killed")
    assert all(one["exitCode"] == 0 for one in seen), seen
    wait_for(lambda: container_of(release.operator_pod())["ready"], 60, what="another one is ready")
