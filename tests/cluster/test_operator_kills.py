"""The operator is killed at each of its API calls in a job's life, before it is sent and after it was answered.

A call is the n-th of its kind (the second Job that is made, the third status of the cache): their order among each
other, and how often pods are looked at, differ from life to life. Each kill happens in a namespace of its own, with an
operator that serves it alone; a second operator then finishes the life. Whatever the moment, the end is that of the
undisturbed life: the same Jobs, each made once, and the same status.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from sae_operator.controller.faults import ENV_EXIT_AT_CALL, EXIT_CODE, Call
from tests.fake_kubelet import FakeKubelet
from tests.operator_process import OperatorProcess, start_operator
from tests.operator_world import World, conditions, training_spec
from tests.testbed.control_plane import ControlPlane
from tests.testbed.waiting import wait_for

# Lives that are led at the same time; more only wait for each other on two cores.
LIVES_AT_ONCE = 4
LIFE_SECONDS = 120.0
# What every life makes, however its changes fall together: a ConfigMap and a Job for each of five steps; a status for
# each phase (the cache's are Preparing, Queued, Finalizing, Ready; the job's Preflight, WaitingForCache, Queued,
# Succeeded) and an event for each but Queued, and one that the cache was asked for; a look at the pods of each Job
# whose message counts.
NEEDED = {
    "GET discovery": 1,
    "GET activationcaches": 1,
    "GET saetrainingjobs": 1,
    "GET saesweeps": 1,
    "GET jobs": 1,
    "GET configmaps": 1,
    "GET pods": 4,
    "PATCH leases": 1,
    "PATCH activationcaches": 1,
    "PATCH activationcaches/status": 4,
    "PATCH saetrainingjobs/status": 4,
    "POST configmaps": 5,
    "POST jobs": 5,
    "POST events": 7,
}


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
        environment={ENV_EXIT_AT_CALL: kill},
    )


def live(world: World, kill: str) -> tuple[OperatorProcess, dict[str, Any]]:
    """A job's life, with an operator that ends at call `kill` and then another; the job at the end."""
    operator = operator_of(world, kill)
    world.create("SAETrainingJob", "job", training_spec())

    def over() -> bool:
        # The event that the job has succeeded is the last call.
        return operator.exit_code is not None or any(
            event["reason"] in ("Succeeded", "Failed") and event["involvedObject"]["kind"] == "SAETrainingJob"
            for event in world.list("Event")
        )

    wait_for(over, LIFE_SECONDS, what=lambda: f"the end of a life killed at {kill}:\n{operator.tail()}")
    first = operator
    if operator.exit_code is not None:
        operator = operator_of(world, "never")
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
def undisturbed(control_plane: ControlPlane, crds: list[str], kubelet: FakeKubelet) -> tuple[set[Call], dict[str, Any]]:
    """The API calls in a life, and how it ends."""
    with fresh_world(control_plane) as world:
        operator, job = live(world, "never")
        assert job["status"]["phase"] == "Succeeded", conditions(job)
        return set(operator.calls), signature(world, job)


def test_a_life_makes_the_calls_that_every_life_makes_and_no_other_kinds(
    undisturbed: tuple[set[Call], dict[str, Any]],
) -> None:
    counts = Counter(call.kind for call in undisturbed[0])
    assert set(counts) == set(NEEDED)
    assert {kind: count for kind, count in counts.items() if count < NEEDED[kind]} == {}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_at_any_api_call_changes_nothing(
    control_plane: ControlPlane, undisturbed: tuple[set[Call], dict[str, Any]], moment: str
) -> None:
    calls, expected = undisturbed

    def one(call: Call) -> tuple[bool, dict[str, Any]]:
        """Whether a life came to the call, and how it ended."""
        with fresh_world(control_plane) as world:
            operator, job = live(world, f"{call}:{moment}")
            return operator.exit_code == EXIT_CODE, signature(world, job)

    tried = sorted(calls)
    with ThreadPoolExecutor(LIVES_AT_ONCE) as pool:
        outcomes = dict(zip(tried, pool.map(one, tried), strict=True))
    different = {str(call): told for call, (_, told) in outcomes.items() if told != expected}
    assert not different, (
        f"{len(different)} of {len(calls)} lives ended otherwise; expected {expected}, got {different}"
    )
    missed = [call for call, (killed, _) in outcomes.items() if not killed]
    print(f"killed {moment} {len(tried) - len(missed)} of {len(tried)} calls; not reached: {[*map(str, missed)]}")
    # A call that the undisturbed life made beyond those need not be reached in each.
    assert [str(call) for call in missed if call.number <= NEEDED[call.kind]] == []
