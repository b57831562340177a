"""The operator is killed at each of its API calls in a job's life, before it is sent and after it was answered.

Each kill happens in a namespace of its own, with an operator that serves it alone; a second operator then finishes the
life. Whatever the moment, the end is that of the undisturbed life: the same Jobs, each made once, and the same status.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from sae_operator.controller.faults import ENV_EXIT_AFTER_CALLS, EXIT_CODE
from tests.fake_kubelet import FakeKubelet
from tests.operator_process import OperatorProcess, start_operator
from tests.operator_world import World, conditions, training_spec
from tests.testbed.control_plane import ControlPlane
from tests.testbed.waiting import wait_for

# Lives that are led at the same time; more only wait for each other on two cores.
LIVES_AT_ONCE = 4
# Calls after the last that matters (a late event, the next look at pods) need not be reached in every life.
LIFE_SECONDS = 60.0


@contextmanager
def fresh_world(control_plane: ControlPlane) -> Iterator[World]:
    name = f"kill-{uuid.uuid4().hex[:10]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    assert control_plane.request("POST", "/api/v1/namespaces", manifest)[0] == 201
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    wait_for(lambda: control_plane.request("GET", account)[0] == 200, what=f"the service account of {name}")
    try:
        yield World(control_plane, name)
    finally:
        control_plane.request("DELETE", f"/api/v1/namespaces/{name}")


def operator_of(world: World, kill: str) -> OperatorProcess:
    return start_operator(
        world.control_plane.kubeconfig,
        namespace=world.namespace,
        poll_seconds=0.5,
        environment={ENV_EXIT_AFTER_CALLS: kill},
    )


def live(world: World, kill: str) -> tuple[OperatorProcess, dict[str, Any]]:
    """A job's life, with an operator that ends at call `kill` (`0`: never) and then another; the job at the end."""
    operator = operator_of(world, kill)
    world.create("SAETrainingJob", "job", training_spec())

    def over() -> bool:
        phase = (world.get("SAETrainingJob", "job") or {}).get("status", {}).get("phase")
        return operator.exit_code is not None or phase in ("Succeeded", "Failed")

    wait_for(over, LIFE_SECONDS, what=lambda: f"the end of a life killed at {kill}:\n{operator.tail()}")
    first = operator
    if operator.exit_code is not None:
        operator = operator_of(world, "0")
    try:
        job = world.wait_phase("SAETrainingJob", "job", "Succeeded", "Failed", timeout=LIFE_SECONDS)
    except TimeoutError as error:
        raise AssertionError(f"killed at {kill}: {error}\n{first.tail()}\n---\n{operator.tail()}") from error
    finally:
        operator.stop()
    return first, job


def signature(world: World, job: dict[str, Any]) -> dict[str, Any]:
    """What must be the same however often the operator died: all but times and UIDs."""
    found = {"job": job, "cache": world.get("ActivationCache", job["status"]["cacheName"]) or {}}
    uids = {resource["metadata"]["uid"][:8]: name for name, resource in found.items()}

    def neutral(name: str) -> str:
        for uid, kind in uids.items():
            name = name.replace(uid, kind)
        return name

    told = {}
    for name, resource in found.items():
        status = {key: value for key, value in resource["status"].items() if not key.endswith("Time")}
        status["progress"] = {key: value for key, value in status["progress"].items() if key != "updatedAt"}
        status["conditions"] = [
            {key: value for key, value in item.items() if key != "lastTransitionTime"} for item in status["conditions"]
        ]
        text = neutral(json.dumps(status, sort_keys=True)).replace(world.namespace, "NAMESPACE")
        told[name] = json.loads(text)
    # generateName would show as a second Job of a step; a second attempt as `-2`.
    told["jobs"] = sorted(neutral(name) for name in world.jobs())
    told["configMaps"] = sorted(neutral(found["metadata"]["name"]) for found in world.list("ConfigMap", ours=True))
    told["pods"] = sorted(
        found["metadata"]["labels"]["sae-operator.dev/step"] for found in world.list("Pod", ours=True)
    )
    return told


@pytest.fixture(scope="module")
def undisturbed(control_plane: ControlPlane, crds: list[str], kubelet: FakeKubelet) -> tuple[int, dict[str, Any]]:
    """Number of API calls in a life, and how it ends."""
    with fresh_world(control_plane) as world:
        operator, job = live(world, "0")
        calls = sum("API call" in line for line in operator.log.read_text().splitlines())
        assert job["status"]["phase"] == "Succeeded", conditions(job)
        return calls, signature(world, job)


@pytest.fixture(scope="module")
def kubelet(control_plane: ControlPlane) -> Iterator[FakeKubelet]:
    with FakeKubelet(control_plane) as running:
        yield running


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_at_any_api_call_changes_nothing(
    control_plane: ControlPlane, undisturbed: tuple[int, dict[str, Any]], moment: str
) -> None:
    calls, expected = undisturbed
    assert calls >= 8

    def one(number: int) -> tuple[int, bool, dict[str, Any]]:
        with fresh_world(control_plane) as world:
            operator, job = live(world, f"{number}:{moment}")
            return number, operator.exit_code == EXIT_CODE, signature(world, job)

    with ThreadPoolExecutor(LIVES_AT_ONCE) as pool:
        outcomes = list(pool.map(one, range(1, calls + 1)))
    different = {number: told for number, _, told in outcomes if told != expected}
    assert not different, f"{len(different)} of {calls} lives ended otherwise; expected {expected}, got {different}"
    killed = [number for number, was_killed, _ in outcomes if was_killed]
    # The order of calls is not the same in each life, and the last few may not be needed.
    assert len(killed) >= max(8, calls * 3 // 4), f"only {killed} of {calls} were reached"
