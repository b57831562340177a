"""Trainings under quotas: the operator beside the real Kueue controller, on a control plane of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sae_operator.api.manifest import read_yaml
from sae_operator.reconcile.projection import parse_time
from tests.api_connection import ApiConnection
from tests.fake_kubelet import LABEL, NODE, PLACEMENT, Behaviour, FakeKubelet, Runs, owner_of, step_of, succeed
from tests.operator_process import OperatorProcess, start_operator
from tests.operator_world import MERGE, PLURALS, World, cache_spec, conditions, training_spec
from tests.progress_server import progress_served
from tests.queueing import (
    GPU,
    HIGH,
    LOW,
    OPERATOR,
    QUEUE,
    QUEUE_LABEL,
    install_operator,
    queue_manifests,
)
from tests.testbed.control_plane import ControlPlane
from tests.testbed.kueue import Kueue
from tests.testbed.paths import CHECKOUT
from tests.testbed.waiting import wait_for

# A label that a ResourceFlavor adds to the pods' node selector.
POOL = {"example.com/pool": "reserved"}
# The same of examples/kueue.
GPU_PRODUCT = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
EXAMPLES = CHECKOUT / "examples" / "kueue"


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A cluster with our custom resources and the operator's rights; Kueue's webhooks would be in others' way."""
    with ControlPlane(tmp_path_factory.mktemp("queueing-control-plane")) as started:
        install_operator(started)
        yield started


@pytest.fixture(scope="module")
def kueue(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kueue]:
    with Kueue(control_plane, tmp_path_factory.mktemp("kueue")) as running:
        yield running


@pytest.fixture(scope="module")
def kubelet(control_plane: ControlPlane) -> Iterator[FakeKubelet]:
    with FakeKubelet(control_plane) as running:
        labels = {"metadata": {"labels": POOL | GPU_PRODUCT}}
        status, answer = control_plane.request("PATCH", f"/api/v1/nodes/{NODE}", labels, MERGE)
        assert status == 200, answer
        yield running


@pytest.fixture
def world(control_plane: ControlPlane, namespace: str, kueue: Kueue, kubelet: FakeKubelet) -> World:
    return World(control_plane, namespace)


@pytest.fixture
def operator(world: World) -> Iterator[OperatorProcess]:
    """It has the rights that its roles give, and no others."""
    kubeconfig = world.control_plane.kubeconfig_for_service_account(OPERATOR, OPERATOR)
    process = start_operator(kubeconfig, arguments=(f"--lease-namespace={OPERATOR}",))
    yield process
    if process.exit_code is None:
        assert process.stop() == 0, process.tail()


def set_up_queue(world: World, **options: Any) -> None:
    """A queue for the world's namespace; see `queue_manifests`."""
    world.control_plane.apply(queue_manifests(world.namespace, node_labels=POOL, **options))


def queued_training(**changes: Any) -> dict[str, Any]:
    """A training of one GPU that makes no cache; `run` in `changes` adds to the run settings."""
    source = {key: value for key, value in cache_spec().items() if key not in ("storage", "parallelism", "run")}
    run = {"queueName": QUEUE, "resources": {"limits": {GPU: 1}}, **PLACEMENT, **changes.pop("run", {})}
    return training_spec({"live": source}, run=run, **changes)


def training(name: str, behaviour: Callable[[], Behaviour] | Behaviour) -> Callable[[dict[str, Any]], Behaviour]:
    """A script: the training pods of one resource do this, all others succeed."""

    def script(pod: dict[str, Any]) -> Behaviour:
        if owner_of(pod) != name or step_of(pod) != "train":
            return succeed(pod)
        return behaviour() if callable(behaviour) else behaviour

    return script


def training_job(world: World, name: str) -> dict[str, Any]:
    """The one Job that trains a resource."""
    found = [job for job in world.jobs().values() if _is_of(job, name, "train")]
    assert len(found) == 1, [job["metadata"]["name"] for job in found]
    return found[0]


def training_pods(world: World, name: str) -> list[dict[str, Any]]:
    return [pod for pod in world.list("Pod", ours=True) if _is_of(pod, name, "train")]


def _is_of(child: dict[str, Any], name: str, step: str) -> bool:
    return owner_of(child) == name and step_of(child) == step


def wait_held(world: World, name: str) -> dict[str, Any]:
    """The training, once its status says that a queue holds the Job that trains; each earlier one is held a moment."""

    def is_held(found: dict[str, Any]) -> bool:
        status, ready = found["status"], conditions(found).get("Ready", {})
        held = status.get("phase") == "Queued" and "held by a queue" in ready.get("message", "")
        return held and "-train-" in status.get("jobName", "")

    return world.wait_resource("SAETrainingJob", name, is_held)


def phases_of(world: World, created: dict[str, Any]) -> list[str]:
    """The phases that a training has shown since it was created, as a watch tells them: each once while it stays."""
    meta = created["metadata"]
    now = world.get("SAETrainingJob", meta["name"])
    assert now is not None
    path = PLURALS["SAETrainingJob"].format(world.namespace)
    selected = f"fieldSelector=metadata.name%3D{meta['name']}&resourceVersion={meta['resourceVersion']}"
    # Read up to what it is now: how much comes within a time, says how busy the machine is.
    api = ApiConnection(world.control_plane)
    answer = api.stream(f"{path}?watch=1&{selected}")
    assert answer.status == 200, answer.read()
    seen: list[str] = []
    for line in answer:
        event = json.loads(line)
        assert event["type"] == "MODIFIED", event
        phase = event["object"]["status"]["phase"]
        if seen[-1:] != [phase]:
            seen.append(phase)
        if event["object"]["metadata"]["resourceVersion"] == now["metadata"]["resourceVersion"]:
            return seen
    raise AssertionError(f"the watch ended early; it told {seen}")


def test_a_second_training_waits_for_the_quota_of_the_first(
    world: World, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    set_up_queue(world, gpus=1)
    kubelet.scripts[world.namespace] = training("first", Runs())
    world.create("SAETrainingJob", "first", queued_training())
    world.wait_phase("SAETrainingJob", "first", "Running")
    created = world.create("SAETrainingJob", "second", queued_training(output={"uri": "s3://bucket/second"}))
    wait_held(world, "second")
    assert training_job(world, "second")["spec"]["suspend"] is True
    assert training_pods(world, "second") == []
    assert world.status("SAETrainingJob", "first")["phase"] == "Running"
    kubelet.scripts[world.namespace] = succeed
    world.wait_phase("SAETrainingJob", "first", "Succeeded")
    world.wait_phase("SAETrainingJob", "second", "Succeeded")
    assert [phase for phase in phases_of(world, created) if phase != "Running"] == ["Preflight", "Queued", "Succeeded"]
    (pod,) = training_pods(world, "second")
    assert pod["spec"]["nodeSelector"] == {LABEL: "true", **POOL}, "the flavor's node selector is added to ours"


def test_priority_classes_reach_the_pods_and_the_queue(world: World, operator: OperatorProcess) -> None:
    set_up_queue(world)
    world.create("SAETrainingJob", "first", queued_training(run={"priorityClassName": HIGH}))
    world.wait_phase("SAETrainingJob", "first", "Succeeded")
    told = {step_of(pod): (pod["spec"]["priorityClassName"], pod["spec"]["priority"]) for pod in world.list("Pod")}
    assert told == {"preflight": (HIGH, 1000), "train": (HIGH, 1000)}
    workloads = world.control_plane.get("workloads", "--namespace", world.namespace)["items"]
    assert [workload["spec"]["priority"] for workload in workloads] == [1000, 1000]


def test_a_preempted_training_goes_on_from_its_checkpoint(
    world: World, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    set_up_queue(world, gpus=1, preempts=True)
    low = {"priorityClassName": LOW, "backoffLimit": 0}

    def has_checkpoint(found: dict[str, Any]) -> bool:
        return found["status"].get("checkpoint", {}).get("tokens") == 640

    kubelet.scripts[world.namespace] = training("low", Runs(checkpoint_tokens=640, lingers=True))
    with progress_served(tokens=640, checkpointTokens=640):
        created = world.create("SAETrainingJob", "low", queued_training(run=low))
        world.wait_resource("SAETrainingJob", "low", has_checkpoint)
    high = queued_training(run={"priorityClassName": HIGH}, output={"uri": "s3://bucket/high"})
    world.create("SAETrainingJob", "high", high)
    # Its pod still writes the checkpoint: neither is it running any more, nor has it ended.
    held = wait_held(world, "low")
    assert held["status"]["checkpoint"]["uri"] == "s3://bucket/out/checkpoints/640/"

    def is_asked_to_end() -> bool:
        (pod,) = training_pods(world, "low")
        assert pod["status"]["phase"] == "Running"
        return "deletionTimestamp" in pod["metadata"]

    # A Job says that it is suspended before its pods are asked to end.
    wait_for(is_asked_to_end, what="the pre-empted pod is asked to end")
    world.wait_phase("SAETrainingJob", "high", "Succeeded")
    assert len(training_pods(world, "low")) == 1, "no pod begins before the one that it replaces has ended"
    kubelet.scripts[world.namespace] = training("low", Runs(checkpoint_tokens=640))
    resumed = world.wait_phase("SAETrainingJob", "low", "Running")
    assert has_checkpoint(resumed)
    assert training_job(world, "low")["status"].get("failed", 0) == 0, "a pre-emption is no failed attempt"
    kubelet.scripts[world.namespace] = succeed
    job = world.wait_phase("SAETrainingJob", "low", "Succeeded")
    assert phases_of(world, created) == ["Preflight", "Queued", "Running", "Queued", "Running", "Succeeded"]
    assert job["status"]["attempt"] == 1
    assert world.steps() == ["preflight-1", "preflight-1", "train-1", "train-1"], "no Job was made twice"


def test_suspending_a_training_gives_its_quota_to_the_next(
    world: World, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    set_up_queue(world, gpus=1)
    kubelet.scripts[world.namespace] = lambda pod: Runs() if step_of(pod) == "train" else succeed(pod)
    for name in ("first", "second", "third"):
        world.create("SAETrainingJob", name, queued_training(output={"uri": f"s3://bucket/{name}"}))
        if name == "first":
            world.wait_phase("SAETrainingJob", name, "Running")
        else:
            wait_held(world, name)
    # One that a queue holds has nothing to end.
    world.patch("SAETrainingJob", "third", {"spec": {"suspend": True}})
    world.wait_phase("SAETrainingJob", "third", "Suspended")
    world.patch("SAETrainingJob", "first", {"spec": {"suspend": True}})
    world.wait_phase("SAETrainingJob", "first", "Suspended")
    world.wait_phase("SAETrainingJob", "second", "Running")
    world.patch("SAETrainingJob", "first", {"spec": {"suspend": False}})
    wait_held(world, "first")
    kubelet.scripts[world.namespace] = succeed
    for name in ("second", "first"):
        world.wait_phase("SAETrainingJob", name, "Succeeded")
    assert world.status("SAETrainingJob", "third")["phase"] == "Suspended"
    assert world.status("SAETrainingJob", "first")["attempt"] == 2


def test_pods_that_train_together_are_admitted_together(
    world: World, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    set_up_queue(world, gpus=1)
    kubelet.scripts[world.namespace] = training("first", Runs())
    world.create("SAETrainingJob", "first", queued_training(parallelism=2))
    wait_held(world, "first")
    assert training_pods(world, "first") == [], "one pod alone would hold a GPU and wait for the other"
    assert len(world.list("Service", ours=True)) == 1
    set_up_queue(world, gpus=2)
    world.wait_phase("SAETrainingJob", "first", "Running")
    wait_for(lambda: len(training_pods(world, "first")) == 2, what="both pods are there")
    kubelet.scripts[world.namespace] = succeed
    world.wait_phase("SAETrainingJob", "first", "Succeeded")


def test_the_namespace_names_a_queue_for_all(world: World, operator: OperatorProcess) -> None:
    set_up_queue(world, local_queue="shared")
    defaults = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"namespace": world.namespace, "name": "sae-operator-defaults"},
        "data": {"queueName": "shared"},
    }
    world.control_plane.apply(defaults)
    spec = training_spec()
    world.create("SAETrainingJob", "first", spec)
    world.wait_phase("SAETrainingJob", "first", "Succeeded")
    assert {job["metadata"]["labels"].get(QUEUE_LABEL) for job in world.jobs().values()} == {"shared"}
    workloads = world.control_plane.get("workloads", "--namespace", world.namespace)["items"]
    assert len(workloads) == len(world.jobs()) == 5


def test_time_in_a_queue_counts_for_no_deadline(world: World, operator: OperatorProcess, kubelet: FakeKubelet) -> None:
    set_up_queue(world, gpus=1)
    kubelet.scripts[world.namespace] = lambda pod: Runs() if step_of(pod) == "train" else succeed(pod)
    world.create("SAETrainingJob", "first", queued_training())
    world.wait_phase("SAETrainingJob", "first", "Running")
    # Long enough for Running to be told before, however busy the machine is.
    deadlines = {"activeDeadlineSeconds": 8, "startupDeadlineSeconds": 8}
    spec = queued_training(run=deadlines, output={"uri": "s3://bucket/second"})
    world.create("SAETrainingJob", "second", spec)
    wait_held(world, "second")
    made = parse_time(training_job(world, "second")["metadata"]["creationTimestamp"])
    assert made is not None
    wait_for(lambda: (datetime.now(UTC) - made).total_seconds() > 10, what="both deadlines would have passed")
    wait_held(world, "second")
    world.delete("SAETrainingJob", "first")
    world.wait_phase("SAETrainingJob", "second", "Running")
    failed = world.wait_phase("SAETrainingJob", "second", "Failed")
    assert conditions(failed)["Stalled"]["reason"] == "DeadlineExceeded"


def test_the_examples_send_gpu_pods_alone_to_the_gpu_nodes(world: World, operator: OperatorProcess) -> None:
    world.control_plane.kubectl("apply", "-f", EXAMPLES / "cluster.yaml")
    world.control_plane.kubectl("apply", "--namespace", world.namespace, "-f", EXAMPLES / "namespace.yaml")
    (job,) = read_yaml((EXAMPLES / "sae-job.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    world.create("SAETrainingJob", name, {**spec, "run": {**spec["run"], **PLACEMENT}})
    world.wait_phase("SAETrainingJob", name, "Succeeded")
    assert {job["metadata"]["labels"][QUEUE_LABEL] for job in world.jobs().values()} == {"saes"}
    pods = {step_of(pod): pod["spec"] for pod in world.list("Pod", ours=True)}
    assert pods["preflight"]["nodeSelector"] == {LABEL: "true"}
    assert pods["train"]["nodeSelector"] == {LABEL: "true", **GPU_PRODUCT}
    tolerated = {step: {item.get("key") for item in pod["tolerations"]} for step, pod in pods.items()}
    assert GPU not in tolerated["preflight"]
    assert GPU in tolerated["train"]
    assert {pod["priority"] for pod in pods.values()} == {100}


def test_a_queue_that_does_not_answer_delays_and_fails_nothing(
    world: World, operator: OperatorProcess, kueue: Kueue
) -> None:
    set_up_queue(world)
    kueue.stop()
    try:
        world.create("SAETrainingJob", "first", queued_training())

        def is_refused(found: dict[str, Any]) -> bool:
            return "an admission webhook does not answer" in conditions(found).get("Ready", {}).get("message", "")

        told = world.wait_resource("SAETrainingJob", "first", is_refused)
        assert told["status"]["phase"] != "Failed"
    finally:
        kueue.start()
    world.wait_phase("SAETrainingJob", "first", "Succeeded", timeout=120)
    assert world.steps() == ["preflight-1", "train-1"]


@pytest.fixture
def strict_kueue(kueue: Kueue, control_plane: ControlPlane, tmp_path: Path) -> Iterator[Kueue]:
    """Kueue that suspends Jobs without a queue as well; the other one is back afterwards."""
    kueue.stop()
    try:
        with Kueue(control_plane, tmp_path / "kueue", manages_all_jobs=True) as running:
            yield running
    finally:
        kueue.start()


def test_nobody_is_fought_over_a_job_that_names_no_queue(
    world: World, strict_kueue: Kueue, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    set_up_queue(world)
    kubelet.scripts[world.namespace] = training("first", Runs())
    spec = queued_training()
    del spec["run"]["queueName"]
    world.create("SAETrainingJob", "first", spec)

    def job_of(step: str) -> dict[str, Any] | None:
        return next((job for job in world.jobs().values() if _is_of(job, "first", step)), None)

    for step in ("preflight", "train"):
        job = wait_for(lambda step=step: job_of(step), what=f"the Job of step {step}")
        assert job is not None
        assert job["spec"]["suspend"] is True
        assert QUEUE_LABEL not in job["metadata"]["labels"]
        if step == "train":
            wait_held(world, "first")
        # What a platform engineer does, or a webhook.
        world.patch("Job", job["metadata"]["name"], {"metadata": {"labels": {QUEUE_LABEL: QUEUE}}})
    world.wait_phase("SAETrainingJob", "first", "Running")
    (pod,) = training_pods(world, "first")
    assert pod["spec"]["nodeSelector"] == {LABEL: "true", **POOL}
    assert training_job(world, "first")["spec"]["template"]["spec"]["nodeSelector"] == {LABEL: "true", **POOL}
    kubelet.scripts[world.namespace] = succeed
    world.wait_phase("SAETrainingJob", "first", "Succeeded")
    asked = [event for event in world.control_plane.audited(OPERATOR, OPERATOR) if _is_write(event, world.namespace)]
    assert [event["verb"] for event in asked] == ["create", "create"], "the operator makes Jobs and changes none"
    assert world.steps() == ["preflight-1", "train-1"]


def _is_write(event: dict[str, Any], namespace: str) -> bool:
    """Whether an event of the audit log is a write of a Job of the namespace."""
    about = event.get("objectRef", {})
    of_job = about.get("resource") == "jobs" and about.get("namespace") == namespace
    return of_job and event["verb"] not in ("get", "list", "watch")
