"""Metrics of the operator: what they count, what they are called, and that they cost next to nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sae_operator.controller.metrics import Metrics, endpoint_of, gpus_of

API = "/apis/sae-operator.dev/v1alpha1/namespaces/lab/saetrainingjobs"


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


class Shown:
    """An operator with something to show."""

    def queue_depth(self) -> int:
        return 3

    def oldest_key_seconds(self) -> float:
        return 1.5

    def heartbeat_age_seconds(self) -> float:
        return 12.0

    def breaker_open(self) -> bool:
        return True

    def ready(self) -> bool:
        return False

    def phases(self) -> Mapping[tuple[str, str], int]:
        return {("SAETrainingJob", "Running"): 2, ("ActivationCache", "Ready"): 5}

    def active_jobs(self) -> Mapping[str, int]:
        return {"SAETrainingJob": 2}


def values(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Every sample by its name and its labels' values, in the order of the labels' names."""
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("method", "path", "verb", "resource"),
    [
        ("GET", f"{API}", "list", "saetrainingjobs"),
        ("GET", f"{API}/a", "get", "saetrainingjobs"),
        ("PATCH", f"{API}/a/status", "patch", "saetrainingjobs/status"),
        ("DELETE", "/apis/batch/v1/namespaces/lab/jobs/a", "delete", "jobs"),
        ("POST", "/api/v1/namespaces/lab/configmaps", "create", "configmaps"),
        ("GET", "/api/v1/pods", "list", "pods"),
        ("GET", "/apis/sae-operator.dev/v1alpha1", "get", "discovery"),
    ],
)
def test_a_call_is_named_as_rbac_names_it(method: str, path: str, verb: str, resource: str) -> None:
    assert endpoint_of(method, path) == (verb, resource)


def test_calls_and_reconciles_are_counted() -> None:
    metrics = Metrics()
    for code in (200, 200, 409, None):
        metrics.called("PATCH", f"{API}/a/status", code, 0.004)
    metrics.reconciled("SAETrainingJob", "ok", 0.02)
    metrics.reconciled("SAETrainingJob", "error", 3.0)
    found = values(metrics)
    assert found["sae_operator_api_requests_total", "200", "saetrainingjobs/status", "patch"] == 2
    assert found["sae_operator_api_requests_total", "409", "saetrainingjobs/status", "patch"] == 1
    assert found["sae_operator_api_requests_total", "none", "saetrainingjobs/status", "patch"] == 1
    assert found["sae_operator_api_request_seconds_count", "patch"] == 4
    assert found["sae_operator_reconcile_seconds_sum", "SAETrainingJob", "ok"] == pytest.approx(0.02)
    assert found["sae_operator_reconcile_seconds_count", "SAETrainingJob", "error"] == 1


def test_gauges_show_the_operator_at_the_moment_of_a_scrape() -> None:
    metrics = Metrics()
    metrics.show(Shown())
    found = values(metrics)
    assert found["sae_operator_queue_depth",] == 3
    assert found["sae_operator_queue_oldest_key_seconds",] == 1.5
    assert found["sae_operator_heartbeat_age_seconds",] == 12
    assert found["sae_operator_breaker_open",] == 1
    assert found["sae_operator_ready",] == 0
    assert found["sae_operator_resources", "SAETrainingJob", "Running"] == 2
    assert found["sae_operator_resources", "ActivationCache", "Ready"] == 5
    assert found["sae_operator_jobs_active", "SAETrainingJob"] == 2
    assert found["process_resident_memory_bytes",] > 0
    assert any(name[0] == "sae_operator_build_info" and value == 1 for name, value in found.items())


def test_gpu_time_is_the_gpus_held_times_the_time_between_two_looks() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    metrics.saw_gpus({"lab": 8})
    clock.time += 10
    metrics.saw_gpus({"lab": 2, "other": 1})
    clock.time += 5
    metrics.saw_gpus({"lab": 2})
    found = values(metrics)
    assert found["sae_operator_gpu_seconds_total", "lab"] == 30
    assert found["sae_operator_gpu_seconds_total", "other"] == 10
    # After a pause nobody knows who worked.
    clock.time += 86400
    metrics.saw_gpus({"lab": 1})
    assert values(metrics)["sae_operator_gpu_seconds_total", "lab"] == 30 + 120


@pytest.mark.parametrize(
    ("limits", "gpus"),
    [
        ({"nvidia.com/gpu": "2", "memory": "8Gi"}, 2),
        ({"amd.com/gpu": 1}, 1),
        ({"nvidia.com/mig-1g.10gb": "3"}, 3),
        ({"cpu": "4"}, 0),
        ({"shares.example.com/gpu": "1k"}, 0),
        (None, 0),
    ],
)
def test_gpus_of_a_pod_are_those_of_its_limits(limits: Any, gpus: int) -> None:
    assert gpus_of({"spec": {"containers": [{"resources": {"limits": limits} if limits else {}}]}}) == gpus


def test_watches_that_start_over_together_count_once() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    for seconds in (0.0, 0.5, 1.0, 30.0):
        clock.time += seconds
        metrics.relisted()
    assert values(metrics)["sae_operator_watch_relists_total",] == 2


def test_no_metric_names_a_single_resource() -> None:
    metrics = Metrics()
    metrics.show(Shown())
    for name in ("a", "b", "c"):
        metrics.called("GET", f"{API}/{name}", 200, 0.001)
        metrics.called("GET", f"/api/v1/namespaces/{name}/configmaps/sae-operator-defaults", 404, 0.001)
    assert len([name for name in values(metrics) if name[0] == "sae_operator_api_requests_total"]) == 2


def test_the_cost_of_a_look_with_four_calls_is_far_below_a_tenth_of_a_millisecond() -> None:
    """CPU time, and the best of several runs: other work on the machine counts for nothing."""
    metrics, rounds = Metrics(), 500

    def one_run() -> float:
        begun = time.process_time()
        for _ in range(rounds):
            for _ in range(4):
                metrics.called("PATCH", f"{API}/a/status", 200, 0.004)
            metrics.reconciled("SAETrainingJob", "ok", 0.02)
        return (time.process_time() - begun) / rounds

    assert min(one_run() for _ in range(5)) < 1e-4
