"""The chart: it says what the kustomize base says, refuses wrong values, and installs an operator that works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from ruamel.yaml import YAML

from sae_operator import cli
from sae_operator.api.steps import PROGRESS_PORT
from sae_operator.controller.app import Operator, Options
from sae_operator.controller.client import ApiClient
from sae_operator.reconcile.names import labels
from sae_operator.reconcile.observed import Metadata
from tests.fake_kubelet import PLACEMENT, FakeKubelet
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


def is_hook(item: dict[str, Any]) -> bool:
    """Made by `helm test` alone."""
    return "helm.sh/hook" in (item["metadata"].get("annotations") or {})


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


def without_helms_labels(value: Any) -> Any:
    if isinstance(value, dict):
        helms = (
            "app.kubernetes.io/instance",
            "app.kubernetes.io/version",
            "app.kubernetes.io/managed-by",
            "helm.sh/chart",
        )
        return {key: without_helms_labels(inner) for key, inner in value.items() if key not in helms}
    return [without_helms_labels(item) for item in value] if isinstance(value, list) else value


def test_chart_and_kustomize_base_say_the_same(render: Any, control_plane: ControlPlane) -> None:
    base = documents(control_plane.kubectl("kustomize", str(CHECKOUT / "manifests")))
    said = [
        {
            # Definitions are compared above.
            (item["kind"], item["metadata"]["name"]): item["kind"] == "CustomResourceDefinition"
            or without_helms_labels(item)
            for item in found
            # The base makes its namespace, which Helm is told.
            if item["kind"] != "Namespace" and not is_hook(item)
        }
        for found in (render(), base)
    ]
    assert said[0].keys() == said[1].keys()
    for name in said[0]:
        assert said[0][name] == said[1][name], name


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
        ("metrics.serviceMonitor.every=5s", "every"),
        ("metrics.podMonitor.interval=often", "interval"),
        ("networkPolicy.jobNamespaces={Team_A}", "jobNamespaces"),
        ("networkPolicy.apiServerPorts={0}", "apiServerPorts"),
        ("allowedImages={a b}", "allowedImages"),
        ("allowTrustRemoteCode=maybe", "allowTrustRemoteCode"),
        ("resources.limit.cpu=1", "limit"),
        ("cacheGc.enabled=true", "uri"),
        ("rbac.aggregated=true", "aggregated"),
    ],
)
def test_wrong_values_are_refused(render: Any, value: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        render(value)


EVERYTHING = (
    "networkPolicy.enabled=true",
    "networkPolicy.jobNamespaces={team-a,team-b}",
    "networkPolicy.scrapeFrom.monitoring=yes",
    "metrics.serviceMonitor.enabled=true",
    "metrics.podMonitor.enabled=true",
    "metrics.prometheusRule.enabled=true",
    "metrics.dashboard.enabled=true",
    "cacheGc.enabled=true",
    "cacheGc.uri=s3://saes/caches",
    "cacheGc.secretName=s3",
    "cacheGc.delete=true",
    "allowedImages={ghcr.io/team/*}",
    "allowedServiceAccounts={sae-*}",
    "allowedEnv={HF_*,TEAM_*}",
    "allowTrustRemoteCode=true",
)


def strings_of(value: Any, keys: frozenset[str]) -> Iterator[Any]:
    """Values of these keys, wherever they stand, and all of labels and arguments."""
    if isinstance(value, list):
        for item in value:
            yield from strings_of(item, keys)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in keys:
                yield inner
            elif key in ("labels", "matchLabels"):
                yield from inner.values()
            elif key in ("args", "matchNames"):
                yield from inner
            else:
                yield from strings_of(inner, keys)


def test_names_that_yaml_takes_for_something_else_stay_names(run_helm: Any) -> None:
    names = {
        "watchNamespace": "1e3",
        "jobImage": "7",
        "priorityClassName": "100",
        "imagePullSecrets": [{"name": "1"}],
        "serviceAccount": {"create": False, "name": "0"},
        "networkPolicy": {"enabled": True, "jobNamespaces": ["on", "0x1"]},
        "metrics": {
            kind: {"enabled": True} for kind in ("serviceMonitor", "podMonitor", "prometheusRule", "dashboard")
        },
        "cacheGc": {
            "enabled": True,
            "uri": "s3://saes/a #b",
            "namespace": "5",
            "secretName": "6",
            "serviceAccountName": "7",
        },
        "doctor": {"store": "s3://saes/a #b", "region": "a: b", "secretName": "null", "runtimeClassName": "true"},
    }
    settings = [argument for key, value in names.items() for argument in ("--set-json", f"{key}={json.dumps(value)}")]
    text = run_helm("template", "8", str(CHART), KUBERNETES, "--namespace=9", "--set=crds.install=false", *settings)
    found = documents(text)
    keys = frozenset(
        ("name", "namespace", "image", "priorityClassName", "serviceAccountName", "runtimeClassName", "secretName")
    )
    assert all(isinstance(value, str) for value in strings_of(found, keys))
    told = set(strings_of(found, keys))
    assert {"1e3", "7", "100", "1", "0", "on", "0x1", "5", "6", "null", "true", "8", "9"} <= told
    assert {"--namespace=1e3", "--store=s3://saes/a #b", "--region=a: b", "s3://saes/a #b"} <= told


def test_labels_of_a_user_leave_the_selector_its_own(render: Any) -> None:
    name = r"podLabels.app\.kubernetes\.io/name=theirs"
    for values in ((name,), (name, "podLabels.team=a")):
        spec = only(render("crds.install=false", *values), "Deployment")["spec"]
        found = spec["template"]["metadata"]["labels"]
        assert spec["selector"]["matchLabels"].items() <= found.items()
        assert found.get("team") == ("a" if len(values) > 1 else None)


def test_names_stay_within_their_limits(run_helm: Any) -> None:
    release = "r" * 53
    settings = [argument for value in EVERYTHING for argument in ("--set", value)]
    for item in documents(run_helm("template", release, str(CHART), KUBERNETES, *settings)):
        if item["kind"] != "CustomResourceDefinition":
            # The Job controller adds 11 characters to a CronJob's name.
            assert len(item["metadata"]["name"]) <= (52 if item["kind"] == "CronJob" else 63)


def test_every_value_is_in_the_schema_and_the_schema_knows_no_other(render: Any) -> None:
    values = YAML(typ="safe").load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(value: Any, found: dict[str, Any], path: str) -> None:
        if not isinstance(value, dict) or "properties" not in found:
            return
        known = set(found["properties"]) - ({"global"} if path == "" else set())
        assert found["additionalProperties"] is False, path
        if value:
            assert set(value) <= known, path
        if path not in (".resources", ".affinity"):
            assert set(value) == known, path
        for key, inner in value.items():
            compare(inner, found["properties"][key], f"{path}.{key}")

    compare(values, schema, "")


def test_by_default_nothing_is_made_that_needs_another_operator(render: Any) -> None:
    groups = {item["apiVersion"].split("/")[0] for item in render()}
    assert groups == {"v1", "apps", "rbac.authorization.k8s.io", "apiextensions.k8s.io"}


def test_everything_that_can_be_switched_on_is_taken_by_the_api_server(
    render: Any, control_plane: ControlPlane, namespace: str
) -> None:
    found = render("crds.install=false", *EVERYTHING)
    theirs = [item for item in found if item["apiVersion"].startswith("monitoring.coreos.com")]
    assert sorted(item["kind"] for item in theirs) == ["PodMonitor", "PrometheusRule", "ServiceMonitor"]
    rest = [item for item in found if item not in theirs]
    for item in rest:
        if "namespace" in item["metadata"]:
            item["metadata"]["namespace"] = namespace
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": rest})
    told = control_plane.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", input=text)
    assert told.count("(server dry run)") == len(rest)


def test_settings_of_what_is_allowed_reach_the_operator(render: Any) -> None:
    found = render("crds.install=false", *EVERYTHING)
    arguments = only(found, "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"]
    given = cli.parser().parse_args(arguments)
    assert given.allowed_image == ["ghcr.io/team/*"]
    assert given.allowed_service_account == ["sae-*"]
    assert given.allowed_env == ["HF_*", "TEAM_*"]
    assert given.allow_trust_remote_code


def test_the_cron_job_runs_a_command_that_exists(render: Any) -> None:
    job = only(render(*EVERYTHING), "CronJob", "sae-operator-cache-gc")["spec"]["jobTemplate"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["sae-job"]
    done = subprocess.run(
        [Path(sys.executable).with_name("sae-job"), *container["args"], "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "--unused-for" in done.stdout


def test_monitors_name_ports_and_labels_that_pods_have(render: Any) -> None:
    found = render(*EVERYTHING)
    service = only(found, "Service", "sae-operator-metrics")
    (endpoint,) = only(found, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    container = only(found, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["metrics"] == service["spec"]["ports"][0]["port"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    metadata = Metadata(name="a", namespace="b", uid="c", generation=1)
    monitor = only(found, "PodMonitor", "sae-operator-jobs")["spec"]
    of_pods = labels("SAETrainingJob", metadata, "train")
    assert monitor["selector"]["matchLabels"].items() <= of_pods.items()
    assert set(monitor["podTargetLabels"]) <= set(of_pods)
    assert monitor["podMetricsEndpoints"][0]["port"] == "progress"
    policy = only(found, "NetworkPolicy")["spec"]
    assert policy["egress"][-1]["ports"] == [{"port": PROGRESS_PORT}]


def test_alerts_and_dashboard_ask_for_metrics_that_there_are(render: Any) -> None:
    found = render(*EVERYTHING)
    rules = only(found, "PrometheusRule")["spec"]["groups"][0]["rules"]
    board = json.loads(only(found, "ConfigMap", "sae-operator-dashboard")["data"]["sae-operator.json"])
    asked = [rule["expr"] for rule in rules]
    asked += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    options = Options(job_image="x", namespace="team")
    operator = Operator(options, client=ApiClient(lambda: pytest.fail("no call is made")))
    there = {family.name for family in operator.metrics.registry.collect()}
    suffixes = ("_total", "_bucket", "_count", "_sum")
    for expression in asked:
        for name in re.findall(r"\b(?:sae_operator|process)_[a-z_]+", expression):
            plain = next((name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)), name)
            assert plain in there, expression
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in rules)


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
    run_helm("install", release, str(CHART), f"--namespace={namespace}", "--wait", "--timeout=120s", *settings)
    try:
        pod = next(pod for pod in world.list("Pod") if pod["metadata"]["name"].startswith(release))

        def log() -> str:
            return control_plane.kubectl("logs", pod["metadata"]["name"], f"--namespace={namespace}")

        wait_for(lambda: "Work begins" in log(), what=lambda: f"the operator begins:\n{log()}", interval=0.5)
        world.create("SAETrainingJob", "first", training_spec())
        world.wait_phase("SAETrainingJob", "first", "Succeeded", "Failed")
        assert world.status("SAETrainingJob", "first")["phase"] == "Succeeded"
        wait_for(lambda: world.get("Lease", "sae-operator"), what="the heartbeat")
        assert "forbidden" not in log().lower()

        def metrics() -> str:
            with urlopen(f"http://{pod['status']['podIP']}:8082/metrics", timeout=10) as answer:
                return answer.read().decode()

        # The operator hears of its own write after the API server has taken it.
        ended = 'sae_operator_resources{kind="SAETrainingJob",phase="Succeeded"} 1.0'
        wait_for(lambda: ended in metrics(), what=metrics)
        assert "sae_operator_ready 1.0" in metrics()
        # An upgrade narrows what is allowed: what is finished stays, what is new is held to it.
        upgraded = ("upgrade", release, str(CHART), f"--namespace={namespace}", "--wait", "--timeout=120s")
        run_helm(*upgraded, "--reuse-values", "--set", "allowedImages={ghcr.io/team/*}")
        world.create("SAETrainingJob", "second", training_spec(run={**PLACEMENT, "image": "docker.io/other:1"}))
        told = world.wait_condition("SAETrainingJob", "second", "Stalled", timeout=120)
        assert told["reason"] == "NotAllowed"
        assert told["message"].startswith('spec.run.image: the operator does not allow image "docker.io/other:1"')
        assert world.status("SAETrainingJob", "first")["phase"] == "Succeeded"
    finally:
        run_helm("uninstall", release, f"--namespace={namespace}", "--wait", "--timeout=120s")
    assert world.get("SAETrainingJob", "first") is not None, "resources stay"
