"""The operator as a process: it waits for its definitions, answers its probe, and stops at once."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_kubelet import PLACEMENT, FakeKubelet, Runs, step_of, succeed
from tests.operator_process import run_operator, start_operator
from tests.operator_world import World, training_spec
from tests.testbed.control_plane import ControlPlane
from tests.testbed.paths import CHECKOUT
from tests.testbed.processes import free_ports
from tests.testbed.waiting import wait_for


@pytest.fixture
def own_plane(tmp_path: Path) -> Iterator[ControlPlane]:
    """A control plane that has no definitions of ours yet."""
    with ControlPlane(tmp_path / "control-plane") as started:
        yield started


def test_it_waits_for_its_definitions_serves_all_namespaces_and_answers_its_probe(own_plane: ControlPlane) -> None:
    """As the ServiceAccount of the manifests, with its ClusterRole."""
    log_of_wait = "not installed yet"
    (port,) = free_ports(1)
    probe = f"http://127.0.0.1:{port}/healthz"
    for name in ("namespace", "service_account", "cluster_role", "role"):
        manifest = CHECKOUT / "manifests" / "operator" / f"{name}.yaml"
        own_plane.kubectl("apply", "--namespace=sae-operator", "-f", str(manifest))
    kubeconfig = own_plane.kubeconfig_for_service_account("sae-operator", "sae-operator")
    arguments = (f"--liveness={probe}", "--lease-namespace=sae-operator")
    with FakeKubelet(own_plane), run_operator(kubeconfig, arguments=arguments) as operator:
        wait_for(lambda: log_of_wait in operator.tail(), what="it says what it waits for")
        own_plane.kubectl("apply", "--server-side", "-f", str(CHECKOUT / "manifests" / "crds"))
        wait_for(lambda: "Work begins" in operator.tail(), what=lambda: f"work begins:\n{operator.tail()}")

        def figures() -> dict[str, float]:
            try:
                with urllib.request.urlopen(probe, timeout=10) as answer:
                    return next(iter(json.load(answer).values()))
            except OSError:
                return {}

        # kopf begins to serve it at its own pace.
        assert wait_for(figures, what="the probe answers")["oldest_key_seconds"] < 60
        world = World(own_plane, "default")
        world.create("SAETrainingJob", "first", training_spec())
        world.wait_phase("SAETrainingJob", "first", "Succeeded")
    asked = own_plane.audited("sae-operator", "sae-operator")
    assert asked
    assert not [event["requestURI"] for event in asked if event["responseStatus"]["code"] == 403]


def test_a_life_has_three_events_and_a_restart_adds_none(
    control_plane: ControlPlane, crds: list[str], namespace: str
) -> None:
    world = World(control_plane, namespace)
    with FakeKubelet(control_plane) as kubelet:
        kubelet.scripts[namespace] = lambda pod: Runs() if step_of(pod) == "train" else succeed(pod)
        with run_operator(control_plane.kubeconfig, namespace=namespace):
            world.create("SAETrainingJob", "job", training_spec({"uri": "s3://bucket/cache"}))
            world.wait_phase("SAETrainingJob", "job", "Running")
        with run_operator(control_plane.kubeconfig, namespace=namespace) as second:
            wait_for(lambda: "Work begins" in second.tail(), what=second.tail)
            kubelet.scripts[namespace] = succeed
            job = world.wait_phase("SAETrainingJob", "job", "Succeeded")

            def told() -> list[dict[str, Any]]:
                return [event for event in world.list("Event") if event["involvedObject"]["name"] == "job"]

            wait_for(lambda: len(told()) >= 3, what=lambda: f"events; there are {told()}")
    events = {event["reason"]: event for event in told()}
    assert sorted(events) == ["Preflight", "Running", "Succeeded"]
    assert len(told()) == 3
    for event in events.values():
        assert event["type"] == "Normal"
        assert event["count"] == 1
        assert event["reportingComponent"] == event["source"]["component"] == "sae-operator"
        assert event["involvedObject"] == {
            "apiVersion": "sae-operator.dev/v1alpha1",
            "kind": "SAETrainingJob",
            "namespace": namespace,
            "name": "job",
            "uid": job["metadata"]["uid"],
        }
    assert "report.html" in events["Succeeded"]["message"]
    described = control_plane.kubectl("describe", "saejob", "job", f"--namespace={namespace}")
    assert all(reason in described.partition("Events:")[2] for reason in events)


def test_it_stops_at_once(control_plane: ControlPlane, crds: list[str], namespace: str) -> None:
    operator = start_operator(control_plane.kubeconfig, namespace=namespace)
    wait_for(lambda: "Work begins" in operator.tail(), what=lambda: operator.tail())
    begun = time.monotonic()
    assert operator.stop() == 0
    assert time.monotonic() - begun < 4, "kopf waits five seconds for what does not end with it"


def test_it_stops_at_once_in_the_midst_of_work_and_loses_nothing(
    control_plane: ControlPlane, crds: list[str], namespace: str
) -> None:
    world = World(control_plane, namespace)
    with FakeKubelet(control_plane):
        first = start_operator(control_plane.kubeconfig, namespace=namespace)
        for number in range(12):
            spec = training_spec({"uri": "s3://bucket/cache"}, output={"uri": f"s3://bucket/{number}"})
            world.create("SAETrainingJob", f"job-{number}", spec)
        wait_for(lambda: len(world.jobs()) > 3, what=lambda: f"work:\n{first.tail()}")
        begun = time.monotonic()
        assert first.stop() == 0, first.tail()
        assert time.monotonic() - begun < 6
        assert "Traceback" not in first.log.read_text()
        with run_operator(control_plane.kubeconfig, namespace=namespace):
            for number in range(12):
                world.wait_phase("SAETrainingJob", f"job-{number}", "Succeeded", timeout=120)
    assert world.steps() == sorted(["preflight-1", "train-1"] * 12)


def test_metrics_and_readiness_follow_its_life(control_plane: ControlPlane, crds: list[str], namespace: str) -> None:
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"

    def ready() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"{address}/readyz", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    world = World(control_plane, namespace)
    arguments = (f"--metrics={address}/metrics", "--log-format=json")
    with (
        FakeKubelet(control_plane) as kubelet,
        run_operator(control_plane.kubeconfig, namespace=namespace, arguments=arguments) as operator,
    ):
        wait_for(lambda: ready() == (200, "ready\n"), what=lambda: f"readiness; it says {ready()}")
        kubelet.scripts[namespace] = lambda pod: Runs() if step_of(pod) == "train" else succeed(pod)
        run = {**PLACEMENT, "resources": {"limits": {"nvidia.com/gpu": 2}}}
        world.create("SAETrainingJob", "job", training_spec({"uri": "s3://bucket/cache"}, run=run))
        world.wait_phase("SAETrainingJob", "job", "Running")

        def metrics() -> dict[str, float]:
            with urllib.request.urlopen(f"{address}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] != "#"}

        gpus = f'sae_operator_gpu_seconds_total{{namespace="{namespace}"}}'
        wait_for(lambda: metrics().get(gpus, 0) > 2, what=lambda: f"GPU time in {metrics()}")
        # A pod's GPUs are counted when it is listed, and it is asked after that.
        polls = 'sae_operator_pod_polls_total{result="failed"}'
        wait_for(lambda: metrics().get(polls, 0) >= 1, what="a question that nobody answers")
        found = metrics()
        assert found['sae_operator_resources{kind="SAETrainingJob",phase="Running"}'] == 1
        assert found['sae_operator_jobs_active{kind="SAETrainingJob"}'] == 1
        assert found['sae_operator_api_requests_total{code="201",resource="jobs",verb="create"}'] == 2
        assert found['sae_operator_reconcile_seconds_count{kind="SAETrainingJob",result="ok"}'] >= 3
        assert found["sae_operator_breaker_open"] == 0
        kubelet.scripts[namespace] = succeed
        job = world.wait_phase("SAETrainingJob", "job", "Succeeded")
        # The status is written before it is told.
        wait_for(lambda: "Succeeded:" in operator.log.read_text(), what="the line about its end")
    # Whole lines: the operator has ended.
    lines = [json.loads(line) for line in operator.log.read_text().splitlines()]
    about = [line for line in lines if line.get("name") == "job"]
    assert {line["uid"] for line in about} == {job["metadata"]["uid"]}
    told = [line["message"].partition(":")[0] for line in about if line["level"] == "info"]
    assert told == list(dict.fromkeys(told)), "one line for each transition"
    assert {"Preflight", "Running", "Succeeded"} <= set(told)


def test_it_can_be_stopped_while_it_waits_for_its_definitions(own_plane: ControlPlane) -> None:
    operator = start_operator(own_plane.kubeconfig)
    wait_for(lambda: "not installed yet" in operator.tail(), what="it says what it waits for")
    begun = time.monotonic()
    assert operator.stop() == 0, operator.tail()
    assert time.monotonic() - begun < 2


def test_no_way_into_a_cluster_is_told_in_one_line(tmp_path: Path) -> None:
    operator = start_operator(tmp_path / "nothing", namespace="ns", log=tmp_path / "log")
    assert operator.wait() == 2
    assert "cannot read kubeconfig" in operator.tail()
    assert "Traceback" not in operator.tail()
