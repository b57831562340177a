"""A node that is cut off, on a real API server with the controllers that watch over nodes and their pods."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.test_operator_life import except_for
from tests.fake_kubelet import PLACEMENT, FakeKubelet, Runs, step_of
from tests.operator_process import run_operator
from tests.operator_world import World, conditions, training_spec
from tests.testbed.control_plane import ControlPlane
from tests.testbed.waiting import wait_for

pytestmark = pytest.mark.timeout(300)

# Kubernetes' own is 5 minutes.
IMPATIENT = [
    *PLACEMENT["tolerations"],
    {
        "key": "node.kubernetes.io/unreachable",
        "operator": "Exists",
        "effect": "NoExecute",
        "tolerationSeconds": 1,
    },
]


def pods_of(world: World, step: str) -> list[dict[str, Any]]:
    return [pod for pod in world.list("Pod", ours=True) if step_of(pod) == step]


def test_running_is_not_told_of_a_pod_that_nobody_hears_of_and_its_loss_costs_no_retry(
    control_plane: ControlPlane, crds: list[str], namespace: str
) -> None:
    world = World(control_plane, namespace)
    run = {**PLACEMENT, "tolerations": IMPATIENT, "terminationGracePeriodSeconds": 1, "backoffLimit": 0}
    with FakeKubelet(control_plane) as kubelet, run_operator(control_plane.kubeconfig, namespace=namespace):
        kubelet.scripts[namespace] = except_for(train=Runs())
        world.create("SAETrainingJob", "first", training_spec({"uri": "s3://bucket/finished"}, run=run))
        world.wait_phase("SAETrainingJob", "first", "Running")
        (lost,) = pods_of(world, "train")
        kubelet.die()
        # The node controller waits for 40 s before it takes a node for lost.
        told = world.wait_condition("SAETrainingJob", "first", "NodeUnreachable", timeout=90)
        assert lost["metadata"]["name"] in told["message"]
        assert world.status("SAETrainingJob", "first")["phase"] == "Queued"
        # The pod, evicted, cannot be seen to end: nothing else is started beside it.
        wait_for(lambda: "deletionTimestamp" in pods_of(world, "train")[0]["metadata"], 60, what="the pod is evicted")
        assert [pod["metadata"]["uid"] for pod in pods_of(world, "train")] == [lost["metadata"]["uid"]]
    # It comes back, and ends what it was told to end.
    with FakeKubelet(control_plane), run_operator(control_plane.kubeconfig, namespace=namespace):
        found = world.wait_phase("SAETrainingJob", "first", "Succeeded", timeout=150)
    assert found["status"]["attempt"] == 1
    assert "NodeUnreachable" not in conditions(found)
    assert lost["metadata"]["uid"] not in {pod["metadata"]["uid"] for pod in pods_of(world, "train")}
