"""What the tests of the operator say and see: resources in one namespace of a real API server."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.api_connection import ApiConnection
from tests.fake_kubelet import PLACEMENT
from tests.testbed.control_plane import ControlPlane
from tests.testbed.waiting import wait_for

API = "/apis/sae-operator.dev/v1alpha1"
PLURALS = {
    "SAETrainingJob": f"{API}/namespaces/{{}}/saetrainingjobs",
    "ActivationCache": f"{API}/namespaces/{{}}/activationcaches",
    "SAESweep": f"{API}/namespaces/{{}}/saesweeps",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "Pod": "/api/v1/namespaces/{}/pods",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Service": "/api/v1/namespaces/{}/services",
    "Event": "/api/v1/namespaces/{}/events",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
    "ResourceQuota": "/api/v1/namespaces/{}/resourcequotas",
}
MERGE = "application/merge-patch+json"
OURS = "labelSelector=app.kubernetes.io/managed-by%3Dsae-operator"


def cache_spec(**changes: Any) -> dict[str, Any]:
    """A small ActivationCache spec whose pods land on the fake node."""
    return {
        "model": {"name": "tiny"},
        "dataset": {"path": "text"},
        "hooks": [{"name": "model.layers.2"}],
        "contextSize": 16,
        "tokens": 1000,
        "storage": {"uri": "s3://bucket/caches"},
        "parallelism": 2,
        "run": dict(PLACEMENT),
        **changes,
    }


def training_spec(activations: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A small SAETrainingJob spec, by default with an inline cache."""
    return {
        "activations": activations or {"cache": cache_spec()},
        "saes": [{"name": "k2", "architecture": {"type": "topk", "k": 2}, "dSae": 16}],
        "output": {"uri": "s3://bucket/out"},
        "run": dict(PLACEMENT),
        **changes,
    }


@dataclass
class World:
    """One namespace, seen as its administrator sees it."""

    control_plane: ControlPlane
    namespace: str

    def __post_init__(self) -> None:
        self._api = ApiConnection(self.control_plane)

    def create(self, kind: str, name: str, spec: dict[str, Any], *, api_version: str | None = None) -> dict[str, Any]:
        manifest = {
            "apiVersion": api_version or "sae-operator.dev/v1alpha1",
            "kind": kind,
            "metadata": {"name": name},
            "spec": spec,
        }
        return self._call("POST", PLURALS[kind].format(self.namespace), manifest)

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """The object; None when it does not exist."""
        status, body = self._api.request("GET", f"{PLURALS[kind].format(self.namespace)}/{name}")
        assert status in (200, 404), body
        return json.loads(body) if status == 200 else None

    def list(self, kind: str, *, ours: bool = False) -> list[dict[str, Any]]:
        query = f"?{OURS}" if ours else ""
        return self._call("GET", PLURALS[kind].format(self.namespace) + query)["items"]

    def patch(self, kind: str, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        path = f"{PLURALS[kind].format(self.namespace)}/{name}"
        return self._call("PATCH", path, patch, MERGE)

    def delete(self, kind: str, name: str) -> None:
        options = {"propagationPolicy": "Background"}
        self._call("DELETE", f"{PLURALS[kind].format(self.namespace)}/{name}", options)

    def status(self, kind: str, name: str) -> dict[str, Any]:
        found = self.get(kind, name)
        assert found is not None, f"{kind} {name} is gone"
        return found.get("status") or {}

    def wait_phase(self, kind: str, name: str, *phases: str, timeout: float = 90.0) -> dict[str, Any]:
        """The resource, once its phase is one of these and its status is about its current spec."""
        return self.wait_resource(
            kind, name, lambda found: (found.get("status") or {}).get("phase") in phases, timeout=timeout
        )

    def wait_resource(
        self, kind: str, name: str, holds: Callable[[dict[str, Any]], bool], *, timeout: float = 90.0
    ) -> dict[str, Any]:
        last: dict[str, Any] = {}

        def seen() -> dict[str, Any] | None:
            found = self.get(kind, name)
            last.clear()
            last.update(found or {})
            current = found and found.get("status", {}).get("observedGeneration") == found["metadata"]["generation"]
            return found if found and current and holds(found) else None

        found = wait_for(seen, timeout, what=lambda: f"{kind} {name}; it is {json.dumps(last.get('status'), indent=1)}")
        assert found is not None
        return found

    def wait_condition(
        self, kind: str, name: str, condition: str, status: str = "True", timeout: float = 90.0
    ) -> dict[str, Any]:
        """The condition, once it has this status."""

        def holds(found: dict[str, Any]) -> bool:
            return conditions(found).get(condition, {}).get("status") == status

        return conditions(self.wait_resource(kind, name, holds, timeout=timeout))[condition]

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Our Jobs by name."""
        return {job["metadata"]["name"]: job for job in self.list("Job", ours=True)}

    def steps(self) -> list[str]:
        """`<step>-<attempt>` of all our Jobs, sorted."""
        return sorted("-".join(name.rsplit("-", 2)[1:]) for name in self.jobs())

    def _call(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> dict[str, Any]:
        status, answer = self._api.request(method, path, body, content_type)
        assert status < 300, (method, path, status, answer.decode())
        return json.loads(answer)


def conditions(resource: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Conditions by type."""
    return {item["type"]: item for item in (resource.get("status") or {}).get("conditions") or []}
