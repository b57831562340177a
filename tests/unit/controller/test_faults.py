"""Which of the API calls of a process one is."""

from __future__ import annotations

from contextlib import nullcontext

import aiohttp
import pytest

from sae_operator.controller.faults import (
    ENV_EXIT_AT_CALL,
    ENV_FAULTS,
    FAULTS,
    Call,
    CallFaults,
    fault_of,
    kind_of,
)


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
    monkeypatch.delenv(ENV_FAULTS, raising=False)
    assert CallFaults.from_environment() is None


def test_a_share_of_the_calls_goes_wrong_in_every_way_and_the_same_ones_for_the_same_seed() -> None:
    calls = [Call("PATCH saetrainingjobs/status", number) for number in range(4000)]
    told = [fault_of(call, 0.1, "7") for call in calls]
    assert 300 < sum(fault is not None for fault in told) < 500
    assert {*told} == {None, *FAULTS}
    assert told == [fault_of(call, 0.1, "7") for call in calls]
    assert told != [fault_of(call, 0.1, "8") for call in calls]


def test_reads_meet_no_conflict() -> None:
    assert "409" not in {fault_of(Call("GET pods", number), 0.5, "7") for number in range(2000)}


class Answer:
    """A response that was read."""

    reads = 0
    status = 201

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *error: object) -> None:
        return None

    async def read(self) -> bytes:
        Answer.reads += 1
        return b"{}"


class Server:
    def request(self, method: str, url: str, **options: object) -> Answer:
        return Answer()


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_call_that_goes_wrong_was_carried_out_or_not(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answer, "reads", 0)
    monkeypatch.setattr("sae_operator.controller.faults.fault_of", lambda call, rate, seed: fault)
    monkeypatch.setattr("sae_operator.controller.faults.TIMEOUT_SECONDS", 0.0)
    faults = CallFaults(None, before=False, rate=0.1)
    raised = {"timeout": TimeoutError, "lost": aiohttp.ServerDisconnectedError}.get(fault.split()[0])
    with nullcontext() if raised is None else pytest.raises(raised):
        async with faults.around(Server(), Call("POST jobs", 1)).request("POST", "/") as response:
            assert str(response.status) == fault[:3]
            assert (await response.read()).startswith(b"{")
    assert Answer.reads == fault.endswith("done")
