"""The life of one pod on this node: volumes, containers, status, and its end."""

from __future__ import annotations

import signal
import threading
import traceback
from pathlib import Path
from typing import Any, Protocol

from tests.testbed.node_agent.api import ApiClient
from tests.testbed.node_agent.container import Container, now
from tests.testbed.node_agent.description import describe
from tests.testbed.node_agent.environment import ConfigurationError
from tests.testbed.node_agent.hosts import Hosts
from tests.testbed.node_agent.pod_api import HOST_IP, PodApi
from tests.testbed.node_agent.settings import NodeSettings
from tests.testbed.node_agent.volumes import Volumes

GPU_RESOURCE = "nvidia.com/gpu"
_RETRY_SECONDS = 1.0
_PULL_BACKOFF_SECONDS = 10.0
_CRASH_BACKOFF_SECONDS = 1.0
_CRASH_BACKOFF_LIMIT = 60.0


class Node(Protocol):
    """What a pod needs of its node."""

    settings: NodeSettings
    api: ApiClient
    hosts: Hosts

    def next_pod_ip(self) -> str: ...
    def take_gpus(self, count: int) -> list[int]: ...
    def give_gpus(self, gpus: list[int]) -> None: ...
    def log(self, text: str) -> None: ...


class Pod(threading.Thread):
    """Runs one pod from binding to its end; `stop` and `delete` may be called from other threads."""

    def __init__(self, node: Node, manifest: dict[str, Any]) -> None:
        metadata = manifest["metadata"]
        super().__init__(name=f"{metadata['namespace']}/{metadata['name']}", daemon=True)
        self._node = node
        self._manifest = manifest
        self._spec: dict[str, Any] = manifest["spec"]
        self.namespace: str = metadata["namespace"]
        self.pod_name: str = metadata["name"]
        self.uid: str = metadata["uid"]
        self._api = PodApi(node.api, manifest, node.next_pod_ip())
        self._directory = Path(node.settings.directory) / "pods" / self.uid
        logs = Path(node.settings.directory) / "logs" / f"{self.namespace}_{self.pod_name}_{self.uid}"
        logs.mkdir(parents=True, exist_ok=True)
        self._changed = threading.Condition()
        self._init = [self._container(spec, logs) for spec in self._spec.get("initContainers", [])]
        self._main = [self._container(spec, logs) for spec in self._spec["containers"]]
        self._volumes = Volumes(
            manifest,
            self._directory / "volumes",
            Path(node.settings.directory) / "claims",
            read_data=self._api.read_data,
            field=self._api.field,
            token=self._api.token,
        )
        self._phase = "Pending"
        self._reason: str | None = None
        self._message: str | None = None
        self._start_time = now()
        self._stopping = threading.Event()
        self._grace_seconds = float(self._spec.get("terminationGracePeriodSeconds", 30))
        self._is_gone = False
        self._deletion: threading.Thread | None = None
        self._gpus: dict[str, list[int]] = {}

    def _container(self, spec: dict[str, Any], logs: Path) -> Container:
        directory = self._directory / "containers" / spec["name"]
        return Container(spec, directory, logs, self._notify)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # What other threads ask for

    def stop(self, grace_seconds: float, *, is_gone: bool = False) -> None:
        """End the containers: SIGTERM, SIGKILL after the grace period. `is_gone`: the API has no such pod any more."""
        self._grace_seconds = grace_seconds
        self._is_gone = self._is_gone or is_gone
        self._stopping.set()
        self._notify()

    def delete(self, grace_seconds: float) -> None:
        """A deletion timestamp appeared: end the pod, tell its last state, and remove it from the API."""
        if self._deletion is None:
            self._deletion = threading.Thread(target=self._end_and_remove, args=(grace_seconds,), daemon=True)
            self._deletion.start()

    def _end_and_remove(self, grace_seconds: float) -> None:
        self.stop(grace_seconds)
        if self.ident is not None:  # a pod that was found deleted already was never started
            self.join()
        self._api.remove()

    # Its status

    def _push_status(self) -> None:
        if self._is_gone:
            return
        ready = self._phase == "Running" and all("running" in one.state for one in self._main)
        if ready:
            why = {}
        elif self._phase in ("Succeeded", "Failed"):
            why = {"reason": "PodCompleted" if self._phase == "Succeeded" else "PodFailed"}
        else:
            why = {"reason": "ContainersNotReady"}
        initialized = all(one.state.get("terminated", {}).get("exitCode") == 0 for one in self._init)
        conditions = [
            {"type": "Initialized", "status": str(initialized)},
            {"type": "ContainersReady", "status": str(ready), **why},
            {"type": "Ready", "status": str(ready), **why},
        ]
        # Conditions are merged by type: PodScheduled and DisruptionTarget, which others set, are kept.
        status = {
            "phase": self._phase,
            "reason": self._reason,
            "message": self._message,
            "startTime": self._start_time,
            "hostIP": HOST_IP,
            "podIP": self._api.pod_ip,
            "podIPs": [{"ip": self._api.pod_ip}],
            "conditions": [{**condition, "lastTransitionTime": now()} for condition in conditions],
            "initContainerStatuses": [one.status() for one in self._init],
            "containerStatuses": [one.status() for one in self._main],
        }
        self._api.write_status(status)

    # The life of the pod

    def run(self) -> None:
        try:
            self._live()
        except Exception:  # noqa: BLE001 - a pod's failure must be told in its status and leave the node running
            self._node.log(f"{self.name}: {traceback.format_exc()}")
            self._phase, self._reason, self._message = "Failed", "NodeAgentError", traceback.format_exc()[-1000:]
            for container in (*self._init, *self._main):
                container.signal(signal.SIGKILL)
            self._push_status()
        finally:
            self._node.hosts.remove(self.uid)
            for gpus in self._gpus.values():
                self._node.give_gpus(gpus)
            self._volumes.remove()

    def _live(self) -> None:
        self._node.hosts.add(self._manifest, self._api.pod_ip)
        if (deadline := self._spec.get("activeDeadlineSeconds")) is not None:
            timer = threading.Timer(deadline, self._exceed_deadline)
            timer.daemon = True
            timer.start()
        self._push_status()
        succeeded = self._prepare_volumes()
        restart = self._spec.get("restartPolicy", "Always")
        for container in self._init:
            succeeded = succeeded and self._supervise(container, "Never" if restart == "Never" else "OnFailure")
        if succeeded and not self._stopping.is_set():
            succeeded = self._run_main(restart)
        self._phase = "Succeeded" if succeeded and self._reason is None else "Failed"
        self._push_status()

    def _exceed_deadline(self) -> None:
        if self.is_alive() and not self._stopping.is_set():
            self._reason = "DeadlineExceeded"
            self._message = "Pod was active on the node longer than the specified deadline"
            self.stop(self._grace_seconds)

    def _prepare_volumes(self) -> bool:
        told = ""
        while not self._stopping.is_set():
            try:
                self._volumes.prepare()
            except ConfigurationError as error:
                if str(error) != told:  # the kubelet tells it as an event; the container stays ContainerCreating
                    told = str(error)
                    self._api.warn("FailedMount", told)
                self._stopping.wait(_RETRY_SECONDS)
            else:
                return True
        return False

    def _run_main(self, restart: str) -> bool:
        ended_well: dict[str, bool] = {}

        def supervise(container: Container) -> None:
            ended_well[container.name] = self._supervise(container, restart)

        threads = [threading.Thread(target=supervise, args=(one,), daemon=True) for one in self._main]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return all(ended_well.get(one.name, False) for one in self._main)

    def _supervise(self, container: Container, restart: str) -> bool:
        """Run one container until it needs no restart; whether it ended with 0."""
        backoff = _CRASH_BACKOFF_SECONDS
        while self._start(container):
            if container in self._main:
                self._phase = "Running"
            self._push_status()
            self._wait_for_end(container)
            code = container.finish()
            if self._stopping.is_set() or restart == "Never" or (restart == "OnFailure" and code == 0):
                return code == 0
            self._push_status()
            container.restart_later()
            self._push_status()
            self._stopping.wait(backoff)
            backoff = min(2 * backoff, _CRASH_BACKOFF_LIMIT)
        return False

    def _start(self, container: Container) -> bool:
        """Start a container as soon as it can be; False when the pod is stopped before."""
        name = container.spec["image"]
        while not self._stopping.is_set():
            image = self._node.settings.images.get(name)
            if image is None:
                self._fail_pull(container, name)
                continue
            try:
                description = describe(
                    container,
                    self._manifest,
                    image,
                    self._api,
                    volumes=self._volumes.paths,
                    gpus=self._take_gpus(container),
                    hosts=self._node.hosts.path,
                )
            except ConfigurationError as error:
                if container.state.get("waiting", {}).get("message") != str(error):
                    container.wait_for("CreateContainerConfigError", str(error))
                    self._push_status()
                    self._api.warn("Failed", f"Error: {error}")
                self._stopping.wait(_RETRY_SECONDS)
                continue
            container.start(description, self.uid)
            return True
        return False

    def _take_gpus(self, container: Container) -> list[int]:
        """The container's GPUs, the same after a restart."""
        count = int(container.spec.get("resources", {}).get("limits", {}).get(GPU_RESOURCE, 0))
        if container.name not in self._gpus:
            self._gpus[container.name] = self._node.take_gpus(count)
        return self._gpus[container.name]

    def _fail_pull(self, container: Container, image: str) -> None:
        """There is no such image: ErrImagePull, then ImagePullBackOff until the next try."""
        problem = (
            f'failed to pull and unpack image "{image}": failed to resolve reference "{image}": {image}: not found'
        )
        container.wait_for("ErrImagePull", problem)
        self._push_status()
        self._api.warn("Failed", f'Failed to pull image "{image}": {problem}')
        self._stopping.wait(_RETRY_SECONDS)
        container.wait_for("ImagePullBackOff", f'Back-off pulling image "{image}": ErrImagePull: {problem}')
        self._push_status()
        self._stopping.wait(_PULL_BACKOFF_SECONDS)

    def _wait_for_end(self, container: Container) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not container.is_running or self._stopping.is_set())
        if not container.is_running:
            return
        container.signal(signal.SIGTERM)
        with self._changed:
            ended = self._changed.wait_for(lambda: not container.is_running, self._grace_seconds)
        if not ended:
            container.signal(signal.SIGKILL)
            with self._changed:
                self._changed.wait_for(lambda: not container.is_running)
