"""The Node object and its lease: how the node tells that it is there."""

from __future__ import annotations

import datetime
import http.client
import os
import threading
from typing import Any

from tests.testbed.node_agent.api import MERGE_PATCH, STRATEGIC_MERGE_PATCH, ApiClient, ApiError
from tests.testbed.node_agent.container import now
from tests.testbed.node_agent.pod import GPU_RESOURCE
from tests.testbed.node_agent.pod_api import HOST_IP
from tests.testbed.node_agent.settings import NodeSettings

_HEARTBEAT_SECONDS = 5.0
_STATUS_EVERY = 6  # heartbeats
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


class Registration:
    """Registers the node, then renews its lease and status in a thread of its own."""

    def __init__(self, api: ApiClient, settings: NodeSettings, log_port: int) -> None:
        self._api = api
        self._settings = settings
        self._log_port = log_port
        self._since = now()

    def register(self) -> None:
        """Create the Node, or take over one of that name; raises `ApiError` when it is refused."""
        name = self._settings.name
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
        manifest = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {**labels, **self._settings.labels}},
            "status": self._status(),
        }
        try:
            self._api("POST", "/api/v1/nodes", manifest)
        except ApiError as error:
            if error.status != 409:
                raise
        self._renew_lease()
        self._update_status()
        threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True).start()

    def _status(self) -> dict[str, Any]:
        settings = self._settings
        capacity = {
            "cpu": str(settings.cpus),
            "memory": settings.memory,
            "pods": "110",
            "ephemeral-storage": "100Gi",
            **({GPU_RESOURCE: str(settings.gpus)} if settings.gpus else {}),
        }
        times = {"lastHeartbeatTime": now(), "lastTransitionTime": self._since}
        pressures = ("MemoryPressure", "DiskPressure", "PIDPressure")
        return {
            "capacity": capacity,
            "allocatable": capacity,
            "conditions": [
                {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "the agent runs", **times},
                *[{"type": one, "status": "False", "reason": "NotMeasured", **times} for one in pressures],
            ],
            "addresses": [
                {"type": "InternalIP", "address": HOST_IP},
                {"type": "Hostname", "address": settings.name},
            ],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._log_port}},
            "nodeInfo": {
                "kubeletVersion": "v1.35.4",
                "kubeProxyVersion": "",
                "osImage": "this machine",
                "containerRuntimeVersion": "testbed://1",
                "operatingSystem": "linux",
                "architecture": "amd64",
                "kernelVersion": os.uname().release,
                "machineID": settings.name,
                "systemUUID": settings.name,
                "bootID": settings.name,
            },
        }

    def _update_status(self) -> None:
        path = f"/api/v1/nodes/{self._settings.name}/status"
        self._api("PATCH", path, {"status": self._status()}, STRATEGIC_MERGE_PATCH)

    def _renew_lease(self) -> None:
        name = self._settings.name
        time = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": time}
        try:
            self._api("PATCH", f"{_LEASES}/{name}", {"spec": spec}, MERGE_PATCH)
        except ApiError as error:
            if error.status != 404:
                raise
            metadata = {"name": name, "namespace": "kube-node-lease"}
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
            self._api("POST", _LEASES, lease)

    def _keep_alive(self) -> None:
        pause = threading.Event()  # never set: the thread ends with the process
        beats = 0
        while not pause.wait(_HEARTBEAT_SECONDS):
            beats += 1
            try:
                self._renew_lease()
                if beats % _STATUS_EVERY == 0:
                    self._update_status()
            except (OSError, ApiError, http.client.HTTPException) as error:
                print(f"heartbeat: {error}", flush=True)  # the next one may succeed
