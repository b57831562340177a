"""The chart: it says what the kustomize base says, refuses wrong values, and installs an operator that works."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.fake_kubelet import FakeKubelet
from tests.operator_world import World, training_spec
from tests.testbed.control_plane import ControlPlane
from tests.testbed.node import OPERATOR_IMAGE, Node
from tests.testbed.paths import CHECKOUT
from tests.testbed.waiting import wait_for

CHART = CHECKOUT / "helm" / "sae-operator"
# Helm built by hand takes an old version of Kubernetes for granted.
KUBERNETES = "--kube-version=1.35.4"
IMAGE = OPERATOR_IMAGE.split(":")


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in YAML(typ="safe").load_all(text) if document]


@pytest.fixture
def run_helm(helm: Path, control_plane: ControlPlane) -> Any:
    def run(*arguments: str) -> str:
        environment = {**os.environ, "KUBECONFIG": str(control_plane.kubeconfig)}
        command = [str(helm), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise RuntimeError(done.stderr + done.stdout)
        return done.stdout

    return run


@pytest.fixture
def render(run_helm: Any) -> Any:
    def rendered(*values: str) -> list[dict[str, Any]]:
        settings = [argument for value in values for argument in ("--set", value)]
        command = ("template", "sae-operator", str(CHART), KUBERNETES, "--namespace=sae-operator", *settings)
        return documents(run_helm(*command))

    return rendered


def only(found: list[dict[str, Any]], kind: str, name: str = "sae-operator") -> dict[str, Any]:
    (one,) = [item for item in found if item["kind"] == kind and item["metadata"]["name"] == name]
    return one


def test_the_chart_passes_helm_lint(run_helm: Any) -> None:
    assert "0 chart(s) failed" in run_helm("lint", str(CHART), "--strict")


def test_the_definitions_are_those_of_the_manifests_and_are_kept(render: Any) -> None:
    generated = {}
    for path in sorted((CHECKOUT / "manifests" / "crds").glob("*.yaml")):
        for document in documents(path.read_text()):
            generated[document["metadata"]["name"]] = document
    found = {item["metadata"]["name"]: item for item in render() if item["kind"] == "CustomResourceDefinition"}
    assert found.keys() == generated.keys()
    for name, definition in found.items():
        assert definition["spec"] == generated[name]["spec"]
        assert definition["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert not [item for item in render("crds.install=false") if item["kind"] == "CustomResourceDefinition"]


def test_chart_and_kustomize_base_say_the_same(render: Any, control_plane: ControlPlane) -> None:
    base = documents(control_plane.kubectl("kustomize", str(CHECKOUT / "manifests")))
    chart = render()
    assert only(chart, "ClusterRole")["rules"] == only(base, "ClusterRole")["rules"]
    heartbeat = "sae-operator-heartbeat"
    assert only(chart, "Role", heartbeat)["rules"] == only(base, "Role", heartbeat)["rules"]
    of_chart, of_base = (only(found, "Deployment")["spec"] for found in (chart, base))
    for spec in (of_chart, of_base):
        spec["selector"]["matchLabels"].pop("app.kubernetes.io/instance", None)
        spec["template"]["metadata"]["labels"].pop("app.kubernetes.io/instance", None)
    assert of_chart == of_base


def test_rights_are_listed_one_by_one_and_no_secret_is_read(render: Any) -> None:
    for values in ((), ("watchNamespace=team",)):
        roles = [item for item in render(*values) if item["kind"] in ("Role", "ClusterRole")]
        assert roles
        for rule in (rule for role in roles for rule in role["rules"]):
            words = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "*" not in words
            assert not {"secrets", "pods/exec", "escalate", "impersonate", "bind"} & set(words)


def test_a_served_namespace_needs_no_cluster_wide_rights(render: Any) -> None:
    found = render("watchNamespace=team")
    assert not [item for item in found if item["kind"].startswith("ClusterRole")]
    assert only(found, "Role")["metadata"]["namespace"] == "team"
    arguments = only(found, "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "--namespace=team" in arguments


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("replicaCount=2", "replicaCount"),
        ("watchNamespace=Not_A_Name", "watchNamespace"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("logFormat=xml", "logFormat"),
    ],
)
def test_wrong_values_are_refused(render: Any, value: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        render(value)


@pytest.fixture
def kubelet(control_plane: ControlPlane) -> Iterator[FakeKubelet]:
    with FakeKubelet(control_plane) as running:
        yield running


def test_an_installed_operator_works_with_the_rights_it_is_given(
    run_helm: Any, control_plane: ControlPlane, namespace: str, node: Node, kubelet: FakeKubelet
) -> None:
    release = f"sae-operator-{namespace}"
    values = {
        "image": {"repository": IMAGE[0], "tag": IMAGE[1], "pullPolicy": "Never"},
        "watchNamespace": namespace,
        "logFormat": "text",
        "extraArgs": ["--poll-seconds=1", "--verbose"],
        # Definitions belong to the cluster, whose other tests need them after this one.
        "crds": {"install": False},
    }
    control_plane.kubectl("apply", "--server-side", "-f", str(CHECKOUT / "manifests" / "crds"))
    world = World(control_plane, namespace)
    settings = [argument for key, value in values.items() for argument in ("--set-json", f"{key}={json.dumps(value)}")]
    run_helm("install", release, str(CHART), f"--namespace={namespace}", "--wait", "--timeout=60s", *settings)
    try:
        pod = next(pod for pod in world.list("Pod") if pod["metadata"]["name"].startswith(release))

        def log() -> str:
            return control_plane.kubectl("logs", pod["metadata"]["name"], f"--namespace={namespace}")

        wait_for(lambda: "Work begins" in log(), 60, what=lambda: f"the operator begins:\n{log()}", interval=0.5)
        world.create("SAETrainingJob", "first", training_spec())
        world.wait_phase("SAETrainingJob", "first", "Succeeded", "Failed")
        assert world.status("SAETrainingJob", "first")["phase"] == "Succeeded"
        wait_for(lambda: world.get("Lease", "sae-operator"), what="the heartbeat")
        assert "forbidden" not in log().lower()
    finally:
        run_helm("uninstall", release, f"--namespace={namespace}", "--wait", "--timeout=60s")
    assert world.get("SAETrainingJob", "first") is not None, "resources stay"
