"""Which of the API calls of a process one is."""

from __future__ import annotations

import pytest

from sae_operator.controller.faults import ENV_EXIT_AT_CALL, Call, CallFaults, kind_of


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("GET", "/apis/sae-operator.dev/v1alpha1", "GET discovery"),
        ("GET", "/api/v1/pods", "GET pods"),
        ("GET", "/api/v1/namespaces/lab/pods", "GET pods"),
        ("GET", "/api/v1/namespaces/lab", "GET namespaces"),
        ("POST", "/apis/batch/v1/namespaces/lab/jobs", "POST jobs"),
        ("PATCH", "/apis/g/v1/namespaces/lab/activationcaches/acts", "PATCH activationcaches"),
        ("PATCH", "/apis/g/v1/namespaces/lab/activationcaches/acts/status", "PATCH activationcaches/status"),
    ],
)
def test_a_kind_is_method_resource_and_subresource(method: str, path: str, kind: str) -> None:
    assert kind_of(method, path) == kind


def test_calls_are_counted_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_EXIT_AT_CALL, "never")
    faults = CallFaults.from_environment()
    assert faults is not None
    jobs, pods = "/apis/batch/v1/namespaces/lab/jobs", "/api/v1/namespaces/lab/pods"
    told = [faults.sending(method, path) for method, path in (("POST", jobs), ("GET", pods), ("POST", jobs))]
    assert [str(call) for call in told] == ["POST jobs#1", "GET pods#1", "POST jobs#2"]
    assert Call.parse("POST jobs#2") == told[-1]


def test_without_a_wish_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_EXIT_AT_CALL, raising=False)
    assert CallFaults.from_environment() is None
