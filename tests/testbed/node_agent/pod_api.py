"""One pod as its node reads and writes it through the API server."""

from __future__ import annotations

from typing import Any

from tests.testbed.node_agent.api import STRATEGIC_MERGE_PATCH, ApiClient, ApiError
from tests.testbed.node_agent.container import now
from tests.testbed.node_agent.environment import ConfigurationError, data_of, field_value

HOST_IP = "127.0.0.1"


class PodApi:
    """Status, events, and what the pod refers to: ConfigMaps, Secrets, its own fields, tokens."""

    def __init__(self, api: ApiClient, manifest: dict[str, Any], pod_ip: str) -> None:
        metadata = manifest["metadata"]
        self.api = api
        self.pod_ip = pod_ip
        self._manifest = manifest
        self._name: str = metadata["name"]
        self._namespace: str = metadata["namespace"]
        self._uid: str = metadata["uid"]
        self._folder = f"/api/v1/namespaces/{self._namespace}"
        self._path = f"{self._folder}/pods/{self._name}"

    def write_status(self, status: dict[str, Any]) -> None:
        """Merge a status; nothing when the pod has gone, or another of its name has come."""
        patch = {"metadata": {"uid": self._uid}, "status": status}
        try:
            self.api("PATCH", f"{self._path}/status", patch, STRATEGIC_MERGE_PATCH)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    def remove(self) -> None:
        """Delete the pod for good, once its containers have ended."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": 0,
            "preconditions": {"uid": self._uid},
        }
        try:
            self.api("DELETE", self._path, options)
        except ApiError as error:
            if error.status not in (404, 409):
                raise

    def warn(self, reason: str, message: str) -> None:
        """A Warning event of the pod, as the kubelet writes it."""
        pod = {"apiVersion": "v1", "kind": "Pod", "namespace": self._namespace, "name": self._name, "uid": self._uid}
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{self._name}.", "namespace": self._namespace},
            "involvedObject": pod,
            "type": "Warning",
            "reason": reason,
            "message": message,
            "source": {"component": "kubelet", "host": self._manifest["spec"]["nodeName"]},
            "firstTimestamp": now(),
            "lastTimestamp": now(),
            "count": 1,
        }
        try:
            self.api("POST", f"{self._folder}/events", event)
        except ApiError as error:
            if error.status not in (403, 404):  # the namespace is being deleted, or has gone
                raise

    def read_data(self, kind: str, name: str, optional: bool) -> dict[str, bytes] | None:
        """Data of a ConfigMap or Secret, as `environment.ReadData` says."""
        try:
            return data_of(self.api("GET", f"{self._folder}/{kind}/{name}"), kind)
        except ApiError as error:
            # The Node authorizer refuses what no pod of the node refers to yet: it learns of a new pod a little later.
            if error.status not in (403, 404):
                raise
            if optional and error.status == 404:
                return None
            told = f'{kind.removesuffix("s")} "{name}" not found' if error.status == 404 else error.message
            raise ConfigurationError(told) from error

    def field(self, path: str) -> str:
        """Value of a `fieldRef`."""
        return field_value(self._manifest, path, pod_ip=self.pod_ip, host_ip=HOST_IP)

    def token(self, source: dict[str, Any]) -> str:
        """A token of the pod's service account, bound to the pod."""
        account = self._manifest["spec"].get("serviceAccountName", "default")
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [source["audience"]] if source.get("audience") else None,
                "expirationSeconds": source.get("expirationSeconds", 3600),
                "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": self._name, "uid": self._uid},
            },
        }
        try:
            return self.api("POST", f"{self._folder}/serviceaccounts/{account}/token", request)["status"]["token"]
        except ApiError as error:
            raise ConfigurationError(error.message) from error
