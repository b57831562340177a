"""Training over several pods, by an operator that may do no more than its manifests say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_kubelet import FakeKubelet, Runs, step_of, succeed
from tests.operator_process import OperatorProcess, start_operator
from tests.operator_world import World, training_spec
from tests.testbed.paths import CHECKOUT
from tests.testbed.waiting import wait_for

NAMESPACE = "sae-operator"
PODS = 3


@pytest.fixture
def operator(world: World) -> Iterator[OperatorProcess]:
    plane = world.control_plane
    for name in ("namespace", "service_account", "cluster_role"):
        path = CHECKOUT / "manifests" / "operator" / f"{name}.yaml"
        plane.kubectl("apply", "--namespace", NAMESPACE, "-f", str(path))
    process = start_operator(
        plane.kubeconfig_for_service_account(NAMESPACE, "sae-operator"), namespace=world.namespace, poll_seconds=0.5
    )
    yield process
    if process.exit_code is None:
        assert process.stop() == 0, process.tail()


def test_pods_that_train_together_have_a_job_and_names(
    world: World, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    kubelet.scripts[world.namespace] = lambda pod: Runs() if step_of(pod) == "train" else succeed(pod)
    # A name that begins with a digit is one that a Service may not have.
    world.create("SAETrainingJob", "4-layers", training_spec({"uri": "s3://bucket/cache"}, parallelism=PODS))
    world.wait_phase("SAETrainingJob", "4-layers", "Running", "Failed")
    wait_for(
        lambda: sum(step_of(pod) == "train" for pod in world.list("Pod", ours=True)) == PODS,
        what=lambda: f"{PODS} pods:\n{operator.tail()}",
    )
    (job,) = [job for job in world.list("Job", ours=True) if "-train-" in job["metadata"]["name"]]
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (PODS, PODS)
    (service,) = world.list("Service", ours=True)
    pods = [pod for pod in world.list("Pod", ours=True) if step_of(pod) == "train"]
    selector = service["spec"]["selector"].items()
    for pod in pods:
        assert selector <= pod["metadata"]["labels"].items()
        assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    hosts = {f"{pod['spec']['hostname']}.{pod['spec']['subdomain']}" for pod in pods}
    assert len(hosts) == PODS
    env = {variable["name"]: variable.get("value") for variable in pods[0]["spec"]["containers"][0]["env"]}
    host, _, port = env["SAE_JOB_RENDEZVOUS"].rpartition(":")
    assert host in hosts
    assert int(port) == service["spec"]["ports"][0]["port"]
    kubelet.scripts.pop(world.namespace)
    status = world.wait_phase("SAETrainingJob", "4-layers", "Succeeded", "Failed")["status"]
    assert status["phase"] == "Succeeded"
    assert status["summary"]["sae"] == "k2"
