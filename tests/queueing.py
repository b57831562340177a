"""A cluster for tests with queues: our resources and the operator's rights, and queues with quotas for a namespace."""

from __future__ import annotations

import json
from typing import Any

from ruamel.yaml import YAML

from tests.testbed.control_plane import ControlPlane
from tests.testbed.paths import CHECKOUT

API = "kueue.x-k8s.io/v1beta2"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
QUEUE = "team"
GPU = "nvidia.com/gpu"
# The operator's namespace and its ServiceAccount there.
OPERATOR = "sae-operator"
LOW, HIGH = "test-low", "test-high"


def install_operator(control_plane: ControlPlane) -> None:
    """Everything of `manifests` but the Deployment, and two PriorityClasses."""
    rendered = YAML(typ="safe").load_all(control_plane.kubectl("kustomize", CHECKOUT / "manifests"))
    items: list[dict[str, Any]] = [one for one in rendered if one["kind"] != "Deployment"]
    definitions = [one["metadata"]["name"] for one in items if one["kind"] == "CustomResourceDefinition"]
    for name, value in ((LOW, 10), (HIGH, 1000)):
        kind = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass"}
        # As examples/kueue has it: Kueue alone takes GPUs back.
        items.append({**kind, "metadata": {"name": name}, "value": value, "preemptionPolicy": "Never"})
    manifests = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    control_plane.kubectl("apply", "--server-side", "-f", "-", input=manifests)
    names = [f"crd/{name}" for name in definitions]
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=120s", *names)
    # The storage of a new kind answers 429 for a moment, which kubectl waits out.
    control_plane.kubectl("get", ",".join(definitions), "--all-namespaces")


def queue_manifests(
    namespace: str,
    *,
    gpus: int = 1,
    preempts: bool = False,
    local_queue: str = QUEUE,
    node_labels: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """A ClusterQueue of a namespace's own, with as many GPUs and with CPU and memory for all, and its LocalQueue.

    Args:
        preempts: a workload of higher priority takes back what one of lower priority has.
        node_labels: what the ResourceFlavor adds to the pods' node selector.
    """
    quotas = {"cpu": "1000", "memory": "1000Gi", GPU: str(gpus)}
    resources = [{"name": resource, "nominalQuota": quota} for resource, quota in quotas.items()]
    covered = {"coveredResources": list(quotas), "flavors": [{"name": namespace, "resources": resources}]}
    spec = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "resourceGroups": [covered],
        "preemption": {"withinClusterQueue": "LowerPriority" if preempts else "Never"},
    }
    flavor, queue = {"nodeLabels": node_labels or {}}, {"namespace": namespace, "name": local_queue}
    return [
        {"apiVersion": API, "kind": "ResourceFlavor", "metadata": {"name": namespace}, "spec": flavor},
        {"apiVersion": API, "kind": "ClusterQueue", "metadata": {"name": namespace}, "spec": spec},
        {"apiVersion": API, "kind": "LocalQueue", "metadata": queue, "spec": {"clusterQueue": namespace}},
    ]
