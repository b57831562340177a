"""Where the operator is measured: a real API server, Job controller and scheduler, and a node that runs nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.api_connection import ApiConnection
from tests.fake_kubelet import HEARTBEAT_SECONDS, NODE, PLACEMENT, Behaviour, FakeKubelet
from tests.testbed.control_plane import ControlPlane
from tests.testbed.waiting import wait_for

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE, OPERATOR = "bench", "sae-operator"
GROUP = f"/apis/sae-operator.dev/v1alpha1/namespaces/{NAMESPACE}"
RESOURCES = f"{GROUP}/saetrainingjobs"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
QUIET_SECONDS = 3.0
LOOK_SECONDS = 0.25
WRITES = frozenset({"create", "update", "patch", "delete"})
CREATORS = 8
# Nothing that is measured takes as long.
WATCH_SECONDS = 7200.0
# Of the manifests, what the operator's process needs that runs outside the cluster.
RIGHTS = frozenset({"ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"})


class BenchKubelet(FakeKubelet):
    """Learns of pods by a watch, so that thousands of ended ones cost nothing; pods of scripts that say None are left
    alone."""

    def _run(self) -> None:
        with ThreadPoolExecutor(4) as pool:
            while not self._stop.is_set():
                for event in _watch(self._api, "/api/v1/pods", f"fieldSelector=spec.nodeName%3D{NODE}"):
                    if self._stop.is_set():
                        return
                    if event["type"] in ("ADDED", "MODIFIED"):
                        pool.submit(self._take, event["object"])

    def _take(self, pod: dict[str, Any]) -> None:
        try:
            self._treat(pod)
        except (OSError, HTTPException, AssertionError) as error:
            self.failure = error

    def _treat(self, pod: dict[str, Any]) -> None:
        meta = pod["metadata"]
        if meta.get("deletionTimestamp"):
            self._remove(pod)
        elif pod["status"].get("phase") in ("Pending", "Running", None):
            script = self.scripts.get(meta["namespace"])
            behaviour = script(pod) if script is not None else None
            if behaviour is not None and self._applied.get(meta["uid"]) != behaviour:
                self._applied[meta["uid"]] = behaviour
                self._set_status(pod, behaviour)

    def finish(self, pod: dict[str, Any], behaviour: Behaviour) -> None:
        """The container does this now, whatever the script says."""
        self._applied[pod["metadata"]["uid"]] = behaviour
        self._set_status(pod, behaviour)

    def _remove(self, pod: dict[str, Any]) -> None:
        self._applied.pop(pod["metadata"]["uid"], None)
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        self._call("DELETE", f"{PODS}/{pod['metadata']['name']}", options)


class Beats(threading.Thread):
    """Keeps the node Ready."""

    def __init__(self, kubelet: FakeKubelet) -> None:
        super().__init__(daemon=True)
        self._kubelet = kubelet
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(HEARTBEAT_SECONDS):
            self._kubelet.beat()


class Watch(threading.Thread):
    """Notes when each resource's first Job was seen, by `time.perf_counter`, and the phase of each resource."""

    def __init__(self, control_plane: ControlPlane) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, float] = {}
        self.phases: dict[str, str] = {}
        self._api = ApiConnection(control_plane)
        self._resources = threading.Thread(target=self._watch_resources, daemon=True)

    def run(self) -> None:
        self._resources.start()
        for event in _watch(self._api, JOBS):
            owner = (event["object"]["metadata"].get("labels") or {}).get("sae-operator.dev/name")
            if event["type"] == "ADDED" and owner:
                self.seen.setdefault(owner, time.perf_counter())

    def _watch_resources(self) -> None:
        for event in _watch(self._api, RESOURCES):
            name = event["object"]["metadata"]["name"]
            if event["type"] == "DELETED":
                self.phases.pop(name, None)
            else:
                self.phases[name] = (event["object"].get("status") or {}).get("phase") or ""

    def count(self, *phases: str) -> int:
        return sum(phase in phases for phase in list(self.phases.values()))


@dataclass
class OperatorProcess:
    """The operator as its container runs it, with the rights of its ServiceAccount."""

    bed: Bed
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "sae_operator.cli", f"--kubeconfig={self.bed.kubeconfig}"]
        command += ["--job-image=none", f"--lease-namespace={OPERATOR}"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "MALLOC_ARENA_MAX": "2"},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for_work(self) -> None:
        wait_for(lambda: "Work begins" in self.log.read_text(), 120, what=lambda: self.log.read_text()[-3000:])

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float:
        return rss_mib(self.pid)

    def stop(self) -> list[str]:
        """Ends it; the errors that it logged while it worked."""
        lines = self.log.read_text().splitlines()
        # The storage of a new kind answers 429 for a moment, which kopf waits out.
        errors = [line for line in lines if " ERROR " in line and "(re)initializing" not in line]
        self.process.terminate()
        self.process.wait(30)
        return errors


@dataclass
class Bed:
    """A control plane with the definitions, the operator's account, and a node; see `running`."""

    control_plane: ControlPlane
    kubelet: BenchKubelet
    folder: Path
    kubeconfig: Path
    problems: list[str] = field(default_factory=list)
    _operators: int = 0

    def __post_init__(self) -> None:
        self.api = ApiConnection(self.control_plane)

    @contextmanager
    def operator(self) -> Iterator[OperatorProcess]:
        """An operator that has begun to work."""
        self._operators += 1
        operator = OperatorProcess(self, self.folder / f"operator-{self._operators}.log")
        try:
            operator.wait_for_work()
            yield operator
        finally:
            self.problems += operator.stop()

    def create(self, name: str, activations: dict[str, Any] | None = None, run: dict[str, Any] | None = None) -> None:
        self.call("POST", RESOURCES, resource(name, activations, run), 201)

    def create_all(self, names: list[str], activations: dict[str, Any] | None = None) -> None:
        with ThreadPoolExecutor(CREATORS) as pool:
            list(pool.map(lambda name: self.create(name, activations), names))

    def delete_all(self, names: list[str]) -> None:
        options = {"propagationPolicy": "Background"}
        with ThreadPoolExecutor(CREATORS) as pool:
            list(pool.map(lambda name: self.call("DELETE", f"{RESOURCES}/{name}", options, 200), names))

    def call(self, method: str, path: str, body: Any, expected: int) -> bytes:
        status, answer = self.api.request(method, path, body)
        if status != expected:
            raise RuntimeError(f"{method} {path}: {status} {answer.decode()[:500]}")
        return answer

    def empty(self) -> None:
        """Nothing of an earlier part is left."""
        self.api.request("DELETE", RESOURCES, {"propagationPolicy": "Background"})
        self.api.request("DELETE", f"{GROUP}/activationcaches", {"propagationPolicy": "Background"})
        for path in (RESOURCES, JOBS, PODS, f"/api/v1/namespaces/{NAMESPACE}/configmaps"):
            wait_for(
                lambda path=path: self._count(path) <= 1, 600, what=lambda path=path: f"{path} is empty", interval=1
            )

    def _count(self, path: str) -> int:
        answer = json.loads(self.api.request("GET", f"{path}?limit=2")[1])
        return len(answer["items"])

    def asked(self) -> list[dict[str, Any]]:
        """All that the operator has asked of the API server so far, from the audit log."""
        return self.control_plane.audited(OPERATOR, OPERATOR)


def _watch(api: ApiConnection, path: str, selector: str = "") -> Iterator[dict[str, Any]]:
    """Events of a watch, from what is there on."""
    query = f"watch=true&resourceVersion=0&timeoutSeconds={WATCH_SECONDS:.0f}&{selector}"
    for line in api.stream(f"{path}?{query}", timeout=WATCH_SECONDS):
        yield json.loads(line)


def writes(events: list[dict[str, Any]]) -> Counter[str]:
    """Writes that were done, by verb and resource, but for the heartbeat."""
    counts: Counter[str] = Counter()
    for event in events:
        reference = event.get("objectRef") or {}
        done = event.get("responseStatus", {}).get("code", 0) < 300
        if event["verb"] in WRITES and done and reference.get("resource") != "leases":
            parts = [reference.get("resource", ""), reference.get("subresource", "")]
            counts[f"{event['verb']} {'/'.join(part for part in parts if part)}"] += 1
    return counts


def settled(operator: OperatorProcess) -> float:
    """Returns when the operator has been nearly idle for a while: its writes have ended; when that while began, by
    `time.perf_counter`."""
    before, began = operator.cpu_seconds(), time.perf_counter()
    while time.perf_counter() - began < QUIET_SECONDS:
        time.sleep(LOOK_SECONDS)
        now = operator.cpu_seconds()
        # The kernel counts in hundredths of a second.
        if now - before > 0.1 * LOOK_SECONDS:
            began = time.perf_counter()
        before = now
    return began


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def resource(name: str, activations: dict[str, Any] | None = None, run: dict[str, Any] | None = None) -> dict[str, Any]:
    """A training job on a finished cache, unless it is told to read something else."""
    return {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "SAETrainingJob",
        "metadata": {"name": name},
        "spec": {
            "activations": activations or {"uri": "s3://bucket/cache"},
            "saes": [{"name": "k32", "architecture": {"type": "topk", "k": 32}, "dSae": 1024}],
            "output": {"uri": f"s3://bucket/{name}"},
            "run": run or PLACEMENT,
        },
    }


@contextmanager
def running(folder: Path) -> Iterator[Bed]:
    """A bed that is ready for operators."""
    with ControlPlane(folder / "control-plane") as control_plane:
        control_plane.kubectl("apply", "--server-side", "-f", str(ROOT / "manifests" / "crds"))
        control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd", "--all")
        control_plane.kubectl("create", "namespace", NAMESPACE)
        control_plane.kubectl("create", "namespace", OPERATOR)
        rendered = control_plane.kubectl("kustomize", str(ROOT / "manifests"))
        rights = [found for found in YAML(typ="safe").load_all(rendered) if found["kind"] in RIGHTS]
        control_plane.kubectl("apply", "-f", "-", input="\n---\n".join(map(json.dumps, rights)))
        kubeconfig = control_plane.kubeconfig_for_service_account(OPERATOR, OPERATOR)
        kubelet = BenchKubelet(control_plane)
        with kubelet:
            beats = Beats(kubelet)
            beats.start()
            try:
                yield Bed(control_plane, kubelet, folder, kubeconfig)
            finally:
                beats.stop.set()
