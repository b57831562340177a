"""Pod settings on a real API server: a namespace that enforces PodSecurity `restricted` takes them all together."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fake_kubelet import LABEL, PLACEMENT, FakeKubelet, step_of
from tests.operator_process import run_operator
from tests.operator_world import World, conditions, training_spec
from tests.testbed.control_plane import ControlPlane
from tests.testbed.waiting import wait_for

pytestmark = pytest.mark.timeout(300)


def claim(name: str, namespace: str) -> list[dict[str, Any]]:
    """A PersistentVolumeClaim and the volume that it gets."""
    size = {"storage": "1Gi"}
    volume = {
        "capacity": size,
        "accessModes": ["ReadOnlyMany"],
        "storageClassName": "",
        "hostPath": {"path": f"/nowhere/{name}"},
        "claimRef": {"name": name, "namespace": namespace},
    }
    wanted = {"accessModes": ["ReadOnlyMany"], "storageClassName": "", "resources": {"requests": size}}
    return [
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"{name}-{namespace}"}, "spec": volume},
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "namespace": namespace},
            "spec": wanted,
        },
    ]


def test_pods_with_every_setting_are_let_in_and_have_them(
    control_plane: ControlPlane, crds: list[str], namespace: str
) -> None:
    world = World(control_plane, namespace)
    classes = [
        {
            "apiVersion": "node.k8s.io/v1",
            "kind": "RuntimeClass",
            "metadata": {"name": f"gpu-{namespace}"},
            "handler": "nvidia",
        },
        {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": f"high-{namespace}"},
            "value": 1000,
        },
    ]
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "trainer", "namespace": namespace}}
    control_plane.apply([*classes, *claim("models", namespace), account])
    term = {"matchExpressions": [{"key": LABEL, "operator": "In", "values": ["true"]}]}
    run = {
        "tolerations": PLACEMENT["tolerations"],
        "cpuSteps": PLACEMENT["cpuSteps"],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}},
        "resources": {"limits": {"nvidia.com/gpu": 2}},
        "runtimeClassName": f"gpu-{namespace}",
        "priorityClassName": f"high-{namespace}",
        "serviceAccountName": "trainer",
        "queueName": "gpus",
        "shmSize": "4Gi",
        "volumes": [
            {"claimName": "models", "mountPath": "/data/models", "readOnly": True},
            {"claimName": "models", "mountPath": "/mnt/models", "readOnly": True},
        ],
        "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
        "podLabels": {"team": "interp"},
        "podAnnotations": {"example.com/note": "every setting"},
    }
    with FakeKubelet(control_plane), run_operator(control_plane.kubeconfig, namespace=namespace):
        world.create("SAETrainingJob", "first", training_spec({"uri": "s3://bucket/finished"}, run=run))
        world.wait_phase("SAETrainingJob", "first", "Succeeded")
    pods = {step_of(pod): pod for pod in world.list("Pod", ours=True)}
    assert sorted(pods) == ["preflight", "train"]
    for step, pod in pods.items():
        spec, (container,) = pod["spec"], pod["spec"]["containers"]
        assert spec["priority"] == 1000
        assert spec["serviceAccountName"] == "trainer"
        assert not any("serviceAccountToken" in str(volume) for volume in spec["volumes"]), "no API credentials"
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert mounts["/data/models"]["readOnly"]
        assert pod["metadata"]["labels"]["team"] == "interp"
        assert ("affinity" in spec) == (step == "train")
        assert spec.get("runtimeClassName") == (f"gpu-{namespace}" if step == "train" else None)
        assert ("/dev/shm" in mounts) == (step == "train")
    for job in world.jobs().values():
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"


def unschedulable(found: dict[str, Any]) -> str:
    return conditions(found).get("Unschedulable", {}).get("message", "")


def test_a_claim_that_does_not_exist_is_told(control_plane: ControlPlane, crds: list[str], namespace: str) -> None:
    world = World(control_plane, namespace)
    run = {**PLACEMENT, "volumes": [{"claimName": "nowhere", "mountPath": "/data"}]}
    with FakeKubelet(control_plane), run_operator(control_plane.kubeconfig, namespace=namespace):
        world.create("SAETrainingJob", "first", training_spec({"uri": "s3://bucket/finished"}, run=run))
        missing = 'persistentvolumeclaim "nowhere" not found'
        # A scheduler that does not know of the node yet says that there is none.
        world.wait_resource("SAETrainingJob", "first", lambda found: missing in unschedulable(found))
        volume, wanted = claim("nowhere", namespace)
        control_plane.apply([volume, wanted])
        wait_for(
            lambda: control_plane.get("pvc", "nowhere", "-n", namespace)["status"]["phase"] == "Bound", what="a volume"
        )
        world.wait_phase("SAETrainingJob", "first", "Succeeded", timeout=120)
