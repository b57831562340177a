"""What is measured of the operator, part by part; each leaves the bed empty for the next one."""

from __future__ import annotations

import http.server
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from bench.operator_bed import GROUP, NAMESPACE, RESOURCES, Bed, OperatorProcess, Watch, settled, writes
from sae_operator.api.steps import PROGRESS_PORT
from tests.fake_kubelet import PLACEMENT, POD_IP, RESULTS, Behaviour, Ends, Runs, step_of
from tests.operator_world import cache_spec
from tests.testbed.waiting import wait_for

STEADY_PER_SECOND = 5.0
REST_SECONDS = 120.0
LIVE_SECONDS = 60.0
TRAINING_SECONDS = 3.0
# Lives that go on at once; more only wait for the API server.
UNFINISHED = 100
ENDED = ("Succeeded", "Failed")

Figures = dict[str, float]


def ends(pod: dict[str, Any]) -> Behaviour:
    """Every step ends at once, and well."""
    return Ends(message=RESULTS[step_of(pod)])


def trains_on(pod: dict[str, Any]) -> Behaviour:
    """The training goes on for ever."""
    return Runs() if step_of(pod) == "train" else ends(pod)


def steady(bed: Bed, count: int) -> Figures:
    """5 resources a second: from the API server's answer to the resource until a watch shows its Job."""
    with bed.operator() as operator:
        watch = Watch(bed.control_plane)
        watch.start()
        idle = operator.rss_mib()
        created: dict[str, float] = {}
        start = time.perf_counter()
        for number in range(count):
            time.sleep(max(0.0, start + number / STEADY_PER_SECOND - time.perf_counter()))
            name = f"steady-{number}"
            bed.create(name)
            created[name] = time.perf_counter()
        wait_for(lambda: created.keys() <= watch.seen.keys(), 60, what="all steady Jobs")
        delays = sorted(1000 * (watch.seen[name] - at) for name, at in created.items())
    p99 = delays[min(len(delays) - 1, round(0.99 * (len(delays) - 1)))]
    return {"steady_p50_ms": statistics.median(delays), "steady_p99_ms": p99, "rss_mib_idle": idle}


def burst(bed: Bed, count: int, key: str = "burst_1000_s", scale: int = 1000) -> Figures:
    """All at once: from the first request until a watch shows the last Job; CPU until then, and until writes end."""
    with bed.operator() as operator:
        return _burst(bed, operator, count, key, scale)


def _burst(bed: Bed, operator: OperatorProcess, count: int, key: str, scale: int) -> Figures:
    watch = Watch(bed.control_plane)
    watch.start()
    names = [f"burst-{number}" for number in range(count)]
    before, start = operator.cpu_seconds(), time.perf_counter()
    bed.create_all(names)
    wait_for(lambda: set(names) <= watch.seen.keys(), 600, what="all burst Jobs", interval=0.2)
    took = max(watch.seen[name] for name in names) - start
    cpu = 1000 * (operator.cpu_seconds() - before) / count
    settled(operator)
    return {
        key: took * scale / count,
        "cpu_ms_per_resource": cpu,
        "settled_cpu_ms_per_resource": 1000 * (operator.cpu_seconds() - before) / count,
        "rss_mib": operator.rss_mib(),
    }


def large(bed: Bed, count: int) -> Figures:
    """As many active at once as a cluster may have: time, memory; then the operator is started again."""
    with bed.operator() as operator:
        found = _burst(bed, operator, count, "burst_3000_s", 3000)
    asked = len(bed.asked())
    start = time.perf_counter()
    with bed.operator() as operator:
        quiet = settled(operator) - start
        memory = operator.rss_mib()
        restart_writes = sum(writes(bed.asked()[asked:]).values())
        unschedulable = _told_unschedulable(bed)
    return {
        "burst_3000_s": found["burst_3000_s"],
        "rss_mib_3000": found["rss_mib"],
        "restart_3000_s": quiet,
        "restart_rss_mib_3000": memory,
        "restart_writes": restart_writes,
        "unschedulable_3000_s": unschedulable,
    }


def _told_unschedulable(bed: Bed) -> float:
    """Seconds from a resource's creation, for whose first pod there is no node, until its status says so."""
    start = time.perf_counter()
    bed.create("nowhere", run={**PLACEMENT, "cpuSteps": {**PLACEMENT["cpuSteps"], "nodeSelector": {"no": "node"}}})

    def told() -> bool:
        found = json.loads(bed.api.request("GET", f"{RESOURCES}/nowhere")[1])
        conditions = (found.get("status") or {}).get("conditions") or []
        return any(condition.get("reason") == "Unschedulable" for condition in conditions)

    wait_for(told, 120, what="a pod without a node is told", interval=0.2)
    return time.perf_counter() - start


def life(bed: Bed, count: int) -> Figures:
    """Whole lives on a cache that is Ready, one by one: what the operator writes in each."""

    def script(pod: dict[str, Any]) -> Behaviour:
        if step_of(pod) != "train":
            return ends(pod)
        name = pod["metadata"]["name"]
        if name not in begun:
            begun.add(name)
            threading.Timer(TRAINING_SECONDS, bed.kubelet.finish, (pod, ends(pod))).start()
        return Runs()

    begun: set[str] = set()
    bed.kubelet.scripts[NAMESPACE] = script
    manifest = {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "ActivationCache",
        "metadata": {"name": "ready"},
        "spec": cache_spec(),
    }
    with bed.operator() as operator:
        watch = Watch(bed.control_plane)
        watch.start()
        bed.call("POST", f"{GROUP}/activationcaches", manifest, 201)

        def ready() -> bool:
            answer = bed.api.request("GET", f"{GROUP}/activationcaches/ready")[1]
            return (json.loads(answer).get("status") or {}).get("phase") == "Ready"

        wait_for(ready, 60, what="the cache is Ready")
        settled(operator)
        asked = len(bed.asked())
        for number in range(count):
            bed.create(f"life-{number}", {"cacheRef": {"name": "ready"}})
            wait_for(lambda: watch.count(*ENDED) == number + 1, 60, what="a life")  # noqa: B023
        settled(operator)
        done = writes(bed.asked()[asked:])
    events = sum(number for call, number in done.items() if call.endswith("events"))
    failed = watch.count("Failed")
    if failed:
        raise RuntimeError(f"{failed} lives failed")
    print(f"writes of {count} lives: {dict(sorted(done.items()))}")
    return {"writes_per_life": (sum(done.values()) - events) / count, "events_per_life": events / count}


def rest(bed: Bed, count: int, seconds: float = REST_SECONDS) -> Figures:
    """Writes within two minutes when all have finished; and what a restart then writes."""
    bed.kubelet.scripts[NAMESPACE] = ends
    with bed.operator() as operator:
        watch = Watch(bed.control_plane)
        watch.start()
        began = time.perf_counter()
        _lead(bed, watch, [f"rest-{number}" for number in range(count)], keep=True)
        took = time.perf_counter() - began
        settled(operator)
        memory = operator.rss_mib()
        asked = len(bed.asked())
        time.sleep(seconds)
        done = writes(bed.asked()[asked:])
    asked = len(bed.asked())
    with bed.operator() as operator:
        settled(operator)
    return {
        "rest_writes": sum(done.values()),
        "rest_restart_writes": sum(writes(bed.asked()[asked:]).values()),
        "rss_mib_3000_finished": memory,
        "lives_per_second": count / took,
    }


def slope(bed: Bed, count: int) -> Figures:
    """Memory of the operator over lives whose resources are deleted when they have ended."""
    bed.kubelet.scripts[NAMESPACE] = ends
    samples: list[tuple[float, float]] = []
    with bed.operator() as operator:
        watch = Watch(bed.control_plane)
        watch.start()
        wave = max(1, min(UNFINISHED, count // 10))
        for first in range(0, count, wave):
            names = [f"slope-{number}" for number in range(first, min(first + wave, count))]
            _lead(bed, watch, names, keep=False)
            samples.append((first + wave, operator.rss_mib()))
        print("memory by lives:", "  ".join(f"{int(lives)}: {mib:.1f}" for lives, mib in samples))
    # What is imported and allocated at first is no slope.
    later = samples[len(samples) // 2 :]
    value = statistics.linear_regression(*zip(*later, strict=True)).slope if len(later) > 1 else 0.0
    return {"rss_kib_per_life": 1024 * value, "rss_mib_after_lives": samples[-1][1]}


def _lead(bed: Bed, watch: Watch, names: list[str], *, keep: bool) -> None:
    """Lives, so many at once; each resource is deleted in the end unless it is kept."""
    for first in range(0, len(names), UNFINISHED):
        some = names[first : first + UNFINISHED]
        bed.create_all(some)
        wait_for(
            lambda some=some: all(watch.phases.get(name) in ENDED for name in some), 300, what="lives", interval=0.1
        )
        failed = [name for name in some if watch.phases[name] == "Failed"]
        if failed:
            raise RuntimeError(f"{failed} failed")
        if not keep:
            bed.delete_all(some)
            wait_for(lambda some=some: not any(name in watch.phases for name in some), 60, what="deletions")


def live(bed: Bed, count: int, seconds: float = LIVE_SECONDS) -> Figures:
    """Status patches while so many trainings tell their progress, all of them another one at each look."""
    bed.kubelet.scripts[NAMESPACE] = trains_on
    with _progress_served(), bed.operator() as operator:
        watch = Watch(bed.control_plane)
        watch.start()
        bed.create_all([f"live-{number}" for number in range(count)])
        wait_for(lambda: watch.count("Running") == count, 600, what="all are Running", interval=0.5)
        # The first figures of each are written at once.
        time.sleep(30)
        asked, cpu, began = len(bed.asked()), operator.cpu_seconds(), time.perf_counter()
        time.sleep(seconds)
        took = time.perf_counter() - began
        done = writes(bed.asked()[asked:])
        cpu = operator.cpu_seconds() - cpu
        told = json.loads(bed.api.request("GET", f"{RESOURCES}?limit=500")[1])["items"]
        ages = [
            (datetime.now(UTC) - datetime.fromisoformat(item["status"]["progress"]["updatedAt"])).total_seconds()
            for item in told
        ]
    return {
        "patches_per_second_500": sum(number for call, number in done.items() if call.endswith("/status")) / took,
        "progress_age_500_s": max(ages),
        "cpu_share_500": cpu / took,
    }


@contextmanager
def _progress_served() -> Iterator[None]:
    """All pods answer that they are further than when they were asked last."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            now = datetime.now(UTC)
            told = {
                "step": "train",
                "tokens": int(now.timestamp() * 1000) % 10**9,
                "totalTokens": 10**9,
                "tokensPerSecond": 1000.0,
                "updatedAt": now.isoformat(timespec="seconds"),
            }
            body = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            # An operator that is over hangs up.
            with suppress(BrokenPipeError):
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer((POD_IP, PROGRESS_PORT), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
