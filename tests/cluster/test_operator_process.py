"""The operator as a process: it waits for its definitions, answers its probe, and stops at once."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_kubelet import FakeKubelet
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
    log_of_wait = "not installed yet"
    (port,) = free_ports(1)
    probe = f"http://127.0.0.1:{port}/healthz"
    with FakeKubelet(own_plane), run_operator(own_plane.kubeconfig, arguments=(f"--liveness={probe}",)) as operator:
        wait_for(lambda: log_of_wait in operator.tail(), what="it says what it waits for")
        own_plane.kubectl("apply", "--server-side", "-f", str(CHECKOUT / "manifests" / "crds"))
        wait_for(lambda: "Work begins" in operator.tail(), what=lambda: f"work begins:\n{operator.tail()}")
        with urllib.request.urlopen(probe, timeout=10) as answer:
            figures = next(iter(json.load(answer).values()))
        assert figures["oldest_key_seconds"] < 60
        world = World(own_plane, "default")
        world.create("SAETrainingJob", "first", training_spec())
        world.wait_phase("SAETrainingJob", "first", "Succeeded")


def test_it_stops_at_once(control_plane: ControlPlane, crds: list[str], namespace: str) -> None:
    operator = start_operator(control_plane.kubeconfig, namespace=namespace)
    wait_for(lambda: "Work begins" in operator.tail(), what=lambda: operator.tail())
    begun = time.monotonic()
    assert operator.stop() == 0
    assert time.monotonic() - begun < 4, "kopf waits five seconds for what does not end with it"


def test_no_way_into_a_cluster_is_told_in_one_line(tmp_path: Path) -> None:
    operator = start_operator(tmp_path / "nothing", namespace="ns", log=tmp_path / "log")
    assert operator.wait() == 2
    assert "cannot read kubeconfig" in operator.tail()
    assert "Traceback" not in operator.tail()
