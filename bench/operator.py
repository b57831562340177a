"""How fast, and at what cost, the operator answers: real API server, Job controller and scheduler, one operator.

    python bench/operator.py [--quick]

Each resource is an SAETrainingJob that reads a finished cache, so that its first step (ConfigMap, Job, status, event)
is due at once. Its pod is bound to a node that runs nothing: the resource stays active. Figures:

    steady_p50_ms, steady_p99_ms   5 resources a second: from the API server's answer to the resource until a watch
                                   shows its Job
    burst_1000_s                   1,000 at once: from the first request until a watch shows the last Job
    cpu_ms_per_resource            CPU of the operator in the burst, until the last Job is made, by resource
    settled_cpu_ms_per_resource    the same until its writes have ended: pods listed, every status written
    rss_mib                        resident memory of the operator with the 1,000 active

`--quick` takes 40 and 200 resources and scales the burst's time; memory is what 200 need.
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import statistics
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from tests.api_connection import ApiConnection
from tests.fake_kubelet import HEARTBEAT_SECONDS, PLACEMENT, FakeKubelet
from tests.testbed.control_plane import ControlPlane
from tests.testbed.waiting import wait_for

ROOT = Path(sys.path[0])
NAMESPACE = "bench"
RESOURCES = f"/apis/sae-operator.dev/v1alpha1/namespaces/{NAMESPACE}/saetrainingjobs"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
STEADY_PER_SECOND = 5.0
SETTLE_SECONDS = 3.0


class JobWatch(threading.Thread):
    """Notes when each resource's first Job was seen, by `time.perf_counter`."""

    def __init__(self, control_plane: ControlPlane) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, float] = {}
        self._api = ApiConnection(control_plane)

    def run(self) -> None:
        stream = self._api.stream(f"{JOBS}?watch=true&resourceVersion=0&timeoutSeconds=3600")
        for line in stream:
            event = json.loads(line)
            owner = (event["object"]["metadata"].get("labels") or {}).get("sae-operator.dev/name")
            if event["type"] == "ADDED" and owner:
                self.seen.setdefault(owner, time.perf_counter())


class Beats(threading.Thread):
    """Keeps the node Ready."""

    def __init__(self, kubelet: FakeKubelet) -> None:
        super().__init__(daemon=True)
        self._kubelet = kubelet
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(HEARTBEAT_SECONDS):
            self._kubelet.beat()


def resource(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "SAETrainingJob",
        "metadata": {"name": name},
        "spec": {
            "activations": {"uri": "s3://bucket/cache"},
            "saes": [{"name": "k32", "architecture": {"type": "topk", "k": 32}, "dSae": 1024}],
            "output": {"uri": f"s3://bucket/{name}"},
            "run": PLACEMENT,
        },
    }


def create(api: ApiConnection, name: str) -> None:
    status, answer = api.request("POST", RESOURCES, resource(name))
    if status != 201:
        raise RuntimeError(f"{name}: {status} {answer.decode()[:500]}")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def steady(control_plane: ControlPlane, watch: JobWatch, count: int) -> list[float]:
    """Milliseconds from resource to Job, one by one."""
    api = ApiConnection(control_plane)
    created: dict[str, float] = {}
    start = time.perf_counter()
    for number in range(count):
        time.sleep(max(0.0, start + number / STEADY_PER_SECOND - time.perf_counter()))
        name = f"steady-{number}"
        create(api, name)
        created[name] = time.perf_counter()
    wait_for(lambda: created.keys() <= watch.seen.keys(), 60, what="all steady Jobs")
    return sorted(1000 * (watch.seen[name] - at) for name, at in created.items())


def burst(control_plane: ControlPlane, watch: JobWatch, count: int) -> float:
    """Seconds until the last of `count` Jobs."""
    api = ApiConnection(control_plane)
    names = {f"burst-{number}" for number in range(count)}
    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: create(api, name), sorted(names)))
    wait_for(lambda: names <= watch.seen.keys(), 300, what="all burst Jobs", interval=0.2)
    return max(watch.seen[name] for name in names) - start


def settled(pid: int) -> None:
    """Returns when the operator has been nearly idle for a while: its writes have ended."""
    before = cpu_seconds(pid)
    while True:
        time.sleep(SETTLE_SECONDS)
        now = cpu_seconds(pid)
        if now - before < 0.1 * SETTLE_SECONDS:
            return
        before = now


def start_operator(control_plane: ControlPlane, log: BinaryIO) -> subprocess.Popen[bytes]:
    """The operator as its container runs it."""
    command = [sys.executable, "-m", "sae_operator.cli", f"--kubeconfig={control_plane.kubeconfig}", "--job-image=none"]
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "MALLOC_ARENA_MAX": "2"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency and cost of the operator.")
    parser.add_argument("--quick", action="store_true", help="fewer resources")
    quick = parser.parse_args().quick
    steady_count, burst_count = (40, 200) if quick else (150, 1000)
    with tempfile.TemporaryDirectory() as folder, ControlPlane(Path(folder) / "control-plane") as control_plane:
        control_plane.kubectl("apply", "--server-side", "-f", str(ROOT / "manifests" / "crds"))
        control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd", "--all")
        control_plane.kubectl("create", "namespace", NAMESPACE)
        kubelet = FakeKubelet(control_plane)
        kubelet.register()
        beats = Beats(kubelet)
        beats.start()
        log = (Path(folder) / "operator.log").open("wb")
        operator = start_operator(control_plane, log)
        try:
            text = Path(log.name)
            wait_for(lambda: "Work begins" in text.read_text(), 60, what=lambda: text.read_text()[-3000:])
            watch = JobWatch(control_plane)
            watch.start()
            idle = rss_mib(operator.pid)
            delays = steady(control_plane, watch, steady_count)
            settled(operator.pid)
            before = cpu_seconds(operator.pid)
            took = burst(control_plane, watch, burst_count)
            cpu = 1000 * (cpu_seconds(operator.pid) - before) / burst_count
            settled(operator.pid)
            settled_cpu = 1000 * (cpu_seconds(operator.pid) - before) / burst_count
            memory = rss_mib(operator.pid)
            problems = [line for line in text.read_text().splitlines() if " ERROR " in line]
        finally:
            operator.terminate()
            operator.wait(30)
            beats.stop.set()
            log.close()
    if problems:
        raise SystemExit("\n".join(["the operator logged errors:", *problems[:10]]))
    p99 = delays[min(len(delays) - 1, round(0.99 * (len(delays) - 1)))]
    figures = {
        "steady_p50_ms": round(statistics.median(delays), 1),
        "steady_p99_ms": round(p99, 1),
        "burst_1000_s": round(took * 1000 / burst_count, 1),
        "cpu_ms_per_resource": round(cpu, 2),
        "settled_cpu_ms_per_resource": round(settled_cpu, 2),
        "rss_mib": round(memory, 1),
    }
    print(f"{'steady, 5/s, ' + str(steady_count) + ' resources':<40}{figures['steady_p50_ms']:>8} ms p50")
    print(f"{'':<40}{figures['steady_p99_ms']:>8} ms p99")
    print(f"{'burst of ' + str(burst_count):<40}{took:>8.1f} s")
    print(f"{'CPU of the operator by resource':<40}{figures['cpu_ms_per_resource']:>8} ms")
    print(f"{'memory, idle':<40}{idle:>8.1f} MiB")
    print(f"{'memory, ' + str(burst_count) + ' active':<40}{figures['rss_mib']:>8} MiB")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
