"""A node without processes: it takes pods that are bound to it through their phases, as a test's script says.

Everything goes through the real API server: pods start, run, end with an exit code and a termination message, and go
away when they are deleted, as with a kubelet. Only pods that ask for it by node selector and toleration land here.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any

from tests.api_connection import ApiConnection
from tests.testbed.control_plane import ControlPlane
from tests.testbed.waiting import wait_for

NODE = "fake-node"
# Tests that run at the same time in several processes serve the progress of their pods apart from each other.
POD_IP = f"127.99.{os.environ.get('PYTEST_XDIST_WORKER', 'gw0').removeprefix('gw')}.1"
LABEL = "fake-kubelet"
# What a resource's `run` needs for its pods to land here.
PLACEMENT = {
    "nodeSelector": {LABEL: "true"},
    "tolerations": [{"key": LABEL, "operator": "Exists"}],
    "cpuSteps": {"nodeSelector": {LABEL: "true"}, "tolerations": [{"key": LABEL, "operator": "Exists"}]},
}
HEARTBEAT_SECONDS = 5.0


@dataclass(frozen=True)
class Ends:
    """The container ends."""

    exit_code: int = 0
    message: str = ""
    reason: str | None = None


@dataclass(frozen=True)
class Waits:
    """The container cannot start."""

    reason: str
    message: str


@dataclass(frozen=True)
class Runs:
    """The container runs until the script says something else, or the pod is deleted (then it ends with 143).

    Attributes:
        checkpoint_tokens: where the checkpoint is that it writes then; None where it writes none.
        lingers: it has been told to end, and still writes that checkpoint.
    """

    checkpoint_tokens: int | None = None
    lingers: bool = False


Behaviour = Ends | Waits | Runs
Script = Callable[[dict[str, Any]], Behaviour]


def step_of(pod: dict[str, Any]) -> str:
    return pod["metadata"]["labels"].get("sae-operator.dev/step", "")


def owner_of(pod: dict[str, Any]) -> str:
    """Name of the resource that the pod works for."""
    return pod["metadata"]["labels"].get("sae-operator.dev/name", "")


def result(step: str, **fields: Any) -> str:
    """A termination message as the steps write it."""
    return json.dumps({"step": step, "exitCode": 0, "reason": "Completed", "message": "", **fields})


HOOK = {"name": "model.layers.2", "dIn": 8, "meanNorm": 2.5}
RESULTS: dict[str, str] = {
    "preflight": result("preflight", plan={"bytes": 4096, "gpuSeconds": 1.0, "memoryBytes": 2**20}),
    "prepare": result("prepare", shardsTotal=4, shardsComplete=0, plan={"bytes": 4096, "memoryBytes": 2**20}),
    "cache": result("cache", shardsComplete=2),
    "finalize": result("finalize", shardsTotal=4, shardsComplete=4, tokens=1000, bytes=65536, hooks=[HOOK]),
    "train": result(
        "train",
        tokens=900,
        tokensPerSecond=450.0,
        saes=[
            {"name": "k2", "phase": "Succeeded", "explainedVariance": 0.81, "l0": 2.0, "mse": 0.1, "deadFraction": 0.0}
        ],
    ),
    "report": result("report"),
}


def succeed(pod: dict[str, Any]) -> Behaviour:
    """Every step ends at once with its usual result."""
    return Ends(message=RESULTS[step_of(pod)])


@dataclass
class FakeKubelet:
    """Runs in a thread between `start` and `stop`; `scripts` says what pods of a namespace do, `succeed` by default."""

    control_plane: ControlPlane
    scripts: dict[str, Script] = field(default_factory=dict)
    interval: float = 0.05
    # Pods that were started, in order: (namespace, name, step).
    started: list[tuple[str, str, str]] = field(default_factory=list)
    failure: BaseException | None = None

    def __post_init__(self) -> None:
        self._api = ApiConnection(self.control_plane)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake kubelet", daemon=True)
        # What each pod's status tells; None where it could not be written.
        self._applied: dict[str, Behaviour | None] = {}
        self._beat_at = 0.0

    def __enter__(self) -> FakeKubelet:
        self.register()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        # For as long as it takes: beside the next one it would end that one's pods, of whose scripts it knows nothing.
        self._thread.join()
        self._call("DELETE", f"/api/v1/nodes/{NODE}")
        if self.failure is not None:
            raise self.failure

    def die(self) -> None:
        """The node is cut off: its heartbeats cease, and its pods are told of as they were."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if time.monotonic() - self._beat_at > HEARTBEAT_SECONDS:
                    self.beat()
                self._sync()
                self._stop.wait(self.interval)
        except (OSError, HTTPException, AssertionError) as error:
            self.failure = error

    def _sync(self) -> None:
        status, body = self._api.request("GET", f"/api/v1/pods?fieldSelector=spec.nodeName%3D{NODE}")
        assert status == 200, body
        for pod in json.loads(body)["items"]:
            meta = pod["metadata"]
            if meta.get("deletionTimestamp"):
                self._remove(pod)
            elif pod["status"].get("phase") in ("Pending", "Running", None):
                behaviour = self.scripts.get(meta["namespace"], succeed)(pod)
                if self._applied.get(meta["uid"]) != behaviour:
                    if meta["uid"] not in self._applied:
                        self.started.append((meta["namespace"], meta["name"], step_of(pod)))
                    # One that met a conflict is written in the next round.
                    self._applied[meta["uid"]] = behaviour if self._set_status(pod, behaviour) else None

    def _set_status(self, pod: dict[str, Any], behaviour: Behaviour) -> bool:
        """Whether it was written."""
        container = {
            "name": pod["spec"]["containers"][0]["name"],
            "image": "fake",
            "imageID": "fake",
            "restartCount": 0,
        }
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        match behaviour:
            case Waits(reason, message):
                phase, state = "Pending", {"waiting": {"reason": reason, "message": message}}
            case Runs():
                phase, state = "Running", {"running": {"startedAt": now}}
            case Ends(exit_code, message, reason):
                phase = "Succeeded" if exit_code == 0 else "Failed"
                word = reason or ("Completed" if exit_code == 0 else "Error")
                ended = {"exitCode": exit_code, "reason": word, "message": message, "startedAt": now, "finishedAt": now}
                state = {"terminated": ended}
        ready = isinstance(behaviour, Runs)
        conditions = [
            {"type": "PodScheduled", "status": "True"},
            {"type": "Ready", "status": "True" if ready else "False"},
            {"type": "ContainersReady", "status": "True" if ready else "False"},
        ]
        patch = {
            "status": {
                "phase": phase,
                "startTime": now,
                "podIP": POD_IP,
                "podIPs": [{"ip": POD_IP}],
                "conditions": conditions,
                "containerStatuses": [{**container, "ready": ready, "started": ready, "state": state}],
            }
        }
        return self._call("PATCH", f"{_path(pod)}/status", patch, "application/strategic-merge-patch+json")

    def _remove(self, pod: dict[str, Any]) -> None:
        if pod["status"].get("phase") == "Running":
            last = self.scripts.get(pod["metadata"]["namespace"], succeed)(pod)
            if isinstance(last, Runs) and last.lingers:
                return
            tokens = last.checkpoint_tokens if isinstance(last, Runs) else None
            told = {} if tokens is None else {"checkpointTokens": tokens}
            self._set_status(pod, Ends(143, result(step_of(pod), exitCode=143, reason="Checkpointed", **told)))
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        self._call("DELETE", _path(pod), options)

    def register(self) -> None:
        """Makes the node, Ready and roomy; returns when pods are let on it."""
        self._call(
            "POST",
            "/api/v1/nodes",
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": NODE, "labels": {LABEL: "true"}},
                "spec": {"taints": [{"key": LABEL, "effect": "NoSchedule"}]},
            },
        )
        self.beat()

        def takes_pods() -> bool:
            status, body = self._api.request("GET", f"/api/v1/nodes/{NODE}")
            assert status == 200, body
            return [taint["key"] for taint in json.loads(body)["spec"]["taints"]] == [LABEL]

        # The API server taints a new node, until the node controller has seen that it is Ready.
        wait_for(takes_pods, what="the node's taint for not being ready is taken away")

    def beat(self) -> None:
        """Keeps the node Ready for another while."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        room = {
            "cpu": "100000",
            "memory": "100000Gi",
            "pods": "10000",
            "nvidia.com/gpu": "1000",
            "ephemeral-storage": "100000Gi",
        }
        ready = {"type": "Ready", "status": "True", "reason": "Fake", "lastHeartbeatTime": now}
        patch = {"status": {"capacity": room, "allocatable": room, "conditions": [ready]}}
        self._call("PATCH", f"/api/v1/nodes/{NODE}/status", patch, "application/strategic-merge-patch+json")
        self._beat_at = time.monotonic()

    def _call(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> bool:
        status, answer = self._api.request(method, path, body, content_type)
        # Gone, or there already: another one was faster, which is what the real one meets, too.
        assert status < 300 or status in (404, 409), (method, path, status, answer)
        return status < 300


def _path(pod: dict[str, Any]) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
