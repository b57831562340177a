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

pytestmark = pytest.mark.timeout(500)


def pods_of(world: World, step: str) -> list[dict[str, Any]]:
    return [pod for pod in world.list("Pod", ours=True) if step_of(pod) == step]


def uids_of(world: World, step: str) -> list[str]:
    return [pod["metadata"]["uid"] for pod in pods_of(world, step)]


def test_running_is_not_told_of_a_pod_that_nobody_hears_of_and_its_loss_costs_no_retry(
    control_plane: ControlPlane, crds: list[str], namespace: str
) -> None:
    world = World(control_plane, namespace)
    run = {**PLACEMENT, "backoffLimit": 0}
    with run_operator(control_plane.kubeconfig, namespace=namespace):
        with FakeKubelet(control_plane) as kubelet:
            kubelet.scripts[namespace] = except_for(train=Runs())
            world.create("SAETrainingJob", "first", training_spec({"uri": "s3://bucket/finished"}, run=run))
            world.wait_phase("SAETrainingJob", "first", "Running")
            (lost,) = pods_of(world, "train")
            kubelet.die()
            # The node controller waits for 40 s before it takes a node for lost.
            told = world.wait_condition("SAETrainingJob", "first", "NodeUnreachable", timeout=150)
            assert lost["metadata"]["name"] in told["message"]
            assert world.status("SAETrainingJob", "first")["phase"] == "Queued"
            assert uids_of(world, "train") == [lost["metadata"]["uid"]]
        # Its Node is deleted; the garbage collector of pods waits for another 40 s.
        world.wait_condition("SAETrainingJob", "first", "Unschedulable", timeout=150)
        # Another pod is made as soon as the lost one has failed, whose Job may still hold it then.
        wait_for(lambda: lost["metadata"]["uid"] not in uids_of(world, "train"), what="the lost pod is gone")
        with FakeKubelet(control_plane):
            found = world.wait_phase("SAETrainingJob", "first", "Succeeded", timeout=120)
    assert found["status"]["attempt"] == 1
    assert not {"NodeUnreachable", "Unschedulable"} & conditions(found).keys()
