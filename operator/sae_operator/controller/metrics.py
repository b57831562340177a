"""Prometheus metrics of the operator. No label names a single resource, so that their number stays small."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

PREFIX = "sae_operator"
RECONCILE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0)
API_BUCKETS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0)
VERBS = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}
# Code of a call that got no answer.
NO_ANSWER = "none"
# One lost connection starts a watch per kind and namespace over: they count as one.
RELIST_BURST_SECONDS = 2.0
# A pod that was seen this long ago may not have worked since: a machine that slept, say.
LONGEST_STEP_SECONDS = 120.0


class Observed(Protocol):
    """What gauges show of the operator at the moment of a scrape."""

    def queue_depth(self) -> int: ...

    def oldest_key_seconds(self) -> float: ...

    def heartbeat_age_seconds(self) -> float: ...

    def breaker_open(self) -> bool: ...

    def ready(self) -> bool: ...

    def phases(self) -> Mapping[tuple[str, str], int]: ...

    def active_jobs(self) -> Mapping[str, int]: ...


class Metrics:
    """All metrics of one operator, in a registry of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry = CollectorRegistry()
        self._clock = clock
        self._relisted_at = float("-inf")
        self._seen_at: float | None = None
        ProcessCollector(registry=registry)
        self._reconciles = Histogram(
            f"{PREFIX}_reconcile_seconds",
            "Time of one look at a resource, its API calls included. result: ok; refused (the API server took no"
            " object); unavailable (the API server was away); error.",
            ("kind", "result"),
            buckets=RECONCILE_BUCKETS,
            registry=registry,
        )
        self._calls = Counter(
            f"{PREFIX}_api_requests",
            "Calls to the API server, watches left out. code: HTTP status, or none where no answer came.",
            ("verb", "resource", "code"),
            registry=registry,
        )
        self._latency = Histogram(
            f"{PREFIX}_api_request_seconds",
            "Time until a call to the API server was answered.",
            ("verb",),
            buckets=API_BUCKETS,
            registry=registry,
        )
        self._polls = Counter(
            f"{PREFIX}_pod_polls",
            "Questions to pods how far they are. result: ok, failed (see the condition ProgressUnreachable).",
            ("result",),
            registry=registry,
        )
        self._relists = Counter(
            f"{PREFIX}_watch_relists", "Times that watches started over after the first listing.", registry=registry
        )
        self._gpu_seconds = Counter(
            f"{PREFIX}_gpu_seconds",
            "GPU time of running pods, as seen by this process: GPUs that they hold times the time between two looks.",
            ("namespace",),
            registry=registry,
        )
        build = Gauge(f"{PREFIX}_build_info", "Version of the operator; always 1.", ("version",), registry=registry)
        build.labels(version("sae-operator")).set(1)
        # What is looked up at each call: of a label set, its child.
        self._call_children: dict[tuple[str, str, str], Any] = {}
        self._latency_children: dict[str, Any] = {}
        self._reconcile_children: dict[tuple[str, str], Any] = {}

    def show(self, observed: Observed) -> None:
        """Adds the gauges that are read at each scrape."""
        self.registry.register(_Gauges(observed))

    def reconciled(self, kind: str, result: str, seconds: float) -> None:
        child = self._reconcile_children.get((kind, result))
        if child is None:
            child = self._reconcile_children[kind, result] = self._reconciles.labels(kind, result)
        child.observe(seconds)

    def called(self, method: str, path: str, code: int | None, seconds: float) -> None:
        """A call was answered with an HTTP status, or (None) not at all."""
        verb, resource = endpoint_of(method, path)
        index = (verb, resource, NO_ANSWER if code is None else str(code))
        child = self._call_children.get(index)
        if child is None:
            child = self._call_children[index] = self._calls.labels(*index)
        child.inc()
        latency = self._latency_children.get(verb)
        if latency is None:
            latency = self._latency_children[verb] = self._latency.labels(verb)
        latency.observe(seconds)

    def polled(self, result: str) -> None:
        self._polls.labels(result).inc()

    def relisted(self) -> None:
        """A watch lists what there is, not for the first time."""
        now = self._clock()
        if now - self._relisted_at > RELIST_BURST_SECONDS:
            self._relists.inc()
        self._relisted_at = now

    def saw_gpus(self, gpus: Mapping[str, int]) -> None:
        """GPUs that running pods hold now, by namespace: they have held them since the last look."""
        now = self._clock()
        since, self._seen_at = self._seen_at, now
        if since is None:
            return
        for namespace, count in gpus.items():
            self._gpu_seconds.labels(namespace).inc(count * min(now - since, LONGEST_STEP_SECONDS))


class _Gauges(Collector):
    """Gauges that cost nothing until somebody looks."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterable[GaugeMetricFamily]:
        seen = self._observed
        yield _gauge("queue_depth", "Resources that wait to be looked at, or are.", seen.queue_depth())
        yield _gauge("queue_oldest_key_seconds", "How long the oldest of them has waited.", seen.oldest_key_seconds())
        yield _gauge(
            "heartbeat_age_seconds",
            "Time since a renewal of the Lease came back through the watch.",
            seen.heartbeat_age_seconds(),
        )
        yield _gauge("breaker_open", "1 while the API server is away.", int(seen.breaker_open()))
        yield _gauge("ready", "1 when everything is listed and the API server answers.", int(seen.ready()))
        resources = _gauge("resources", "Resources by kind and phase.", labels=("kind", "phase"))
        for labels, count in seen.phases().items():
            resources.add_metric(labels, count)
        yield resources
        jobs = _gauge("jobs_active", "Jobs with a pod that is pending or running, by kind.", labels=("kind",))
        for kind, count in seen.active_jobs().items():
            jobs.add_metric((kind,), count)
        yield jobs


def _gauge(
    name: str, documentation: str, value: float | None = None, *, labels: tuple[str, ...] | None = None
) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}_{name}", documentation, value=value, labels=labels)


def endpoint_of(method: str, path: str) -> tuple[str, str]:
    """Verb and resource of a call, as RBAC names them: `patch`, `saetrainingjobs/status`. Paths without a resource are
    discovery."""
    parts = path.strip("/").split("/")
    below = parts[2 if parts[0] == "api" else 3 :]
    if below[:1] == ["namespaces"] and len(below) > 2:
        below = below[2:]
    resource = "/".join((*below[:1], *below[2:])) or "discovery"
    if method == "GET":
        return ("list" if len(below) == 1 else "get"), resource
    return VERBS.get(method, method.lower()), resource


def gpus_of(pod: Mapping[str, Any]) -> int:
    """GPUs that a pod's containers hold, slices of shared ones (MIG) counted as one each."""
    total = 0
    for container in (pod.get("spec") or {}).get("containers") or ():
        for name, count in ((container.get("resources") or {}).get("limits") or {}).items():
            # Kubernetes writes whole numbers of a thousand and more as "1k", which no pod has of GPUs.
            if (name.endswith("/gpu") or "/mig-" in name) and str(count).isdecimal():
                total += int(count)
    return total
