"""Which pods run on this node: follows the API server's list of pods bound to it."""

from __future__ import annotations

import http.client
import secrets
import threading
from pathlib import Path
from typing import Any

from tests.testbed.node_agent.api import ApiClient, ApiError
from tests.testbed.node_agent.container import now
from tests.testbed.node_agent.hosts import Hosts
from tests.testbed.node_agent.logs import serve_logs
from tests.testbed.node_agent.pod import Pod
from tests.testbed.node_agent.registration import Registration
from tests.testbed.node_agent.settings import NodeSettings

_RETRY_SECONDS = 0.5
# Pod addresses are 127.77.x.y with x and y in 1..250.
_ADDRESSES = 250 * 250


class Agent:
    """One node. `run` returns never: the agent is ended by a signal, and its containers end with it."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self.api = ApiClient(Path(settings.kubeconfig))
        self._pods: dict[str, Pod] = {}
        self.hosts = Hosts(Path(settings.directory) / "hosts")
        self._free_gpus = list(range(settings.gpus))
        self._lock = threading.Lock()
        # Agents of one machine share its loopback network: each starts somewhere else.
        self._next_address = secrets.randbelow(_ADDRESSES)

    # What pods need of their node

    def log(self, text: str) -> None:
        print(now(), text, flush=True)

    def next_pod_ip(self) -> str:
        with self._lock:
            self._next_address = (self._next_address + 1) % _ADDRESSES
            high, low = divmod(self._next_address, 250)
        return f"127.77.{high + 1}.{low + 1}"

    def take_gpus(self, count: int) -> list[int]:
        with self._lock:
            if len(self._free_gpus) < count:
                raise RuntimeError(f"the scheduler bound a pod with {count} GPUs, {len(self._free_gpus)} are free")
            taken, self._free_gpus = self._free_gpus[:count], self._free_gpus[count:]
        return taken

    def give_gpus(self, gpus: list[int]) -> None:
        with self._lock:
            self._free_gpus = sorted(self._free_gpus + gpus)

    # Following the pods

    def run(self) -> None:
        logs = Path(self.settings.directory) / "logs"
        port = serve_logs(
            logs,
            lambda uid: uid in self._pods and self._pods[uid].is_alive(),
            certificate=self.settings.serving_certificate,
            key=self.settings.serving_key,
            client_authority=self.settings.client_authority,
        )
        Registration(self.api, self.settings, port).register()
        self.log(f"node {self.settings.name} is registered")
        pause = threading.Event()  # never set
        while True:
            try:
                self._follow()
            except (OSError, ApiError, http.client.HTTPException, ValueError) as error:
                self.log(f"watch: {error}")
                pause.wait(_RETRY_SECONDS)

    def _follow(self) -> None:
        """List, then watch until the watch ends."""
        path = f"/api/v1/pods?fieldSelector=spec.nodeName%3D{self.settings.name}"
        listed = self.api("GET", path)
        for manifest in listed["items"]:
            self._see(manifest)
        for uid in set(self._pods) - {manifest["metadata"]["uid"] for manifest in listed["items"]}:
            self._forget(uid)
        for event in self.api.watch(path, listed["metadata"]["resourceVersion"]):
            if event["type"] == "ERROR":  # the version is too old: list again
                return
            if event["type"] == "DELETED":
                self._forget(event["object"]["metadata"]["uid"])
            elif event["type"] != "BOOKMARK":
                self._see(event["object"])

    def _see(self, manifest: dict[str, Any]) -> None:
        metadata = manifest["metadata"]
        is_deleted = "deletionTimestamp" in metadata
        pod = self._pods.get(metadata["uid"])
        if pod is None:
            if manifest["status"].get("phase") in ("Succeeded", "Failed") and not is_deleted:
                return
            pod = self._pods[metadata["uid"]] = Pod(self, manifest)
            if not is_deleted:
                pod.start()
        if is_deleted:
            pod.delete(float(metadata.get("deletionGracePeriodSeconds", 30)))

    def _forget(self, uid: str) -> None:
        pod = self._pods.pop(uid, None)
        if pod is not None and pod.is_alive():  # deleted by force: nobody waits for its end
            pod.stop(0.0, is_gone=True)
