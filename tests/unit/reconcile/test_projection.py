"""Raw objects of the API server become facts; odd ones become fewer facts, never an error."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_operator.api.steps import Progress
from sae_operator.reconcile.conditions import rfc3339
from sae_operator.reconcile.projection import defaults, job_facts, parse_time, pod_facts, read_message

JOB_METADATA = {
    "name": "sae-01234567-train-3",
    "uid": "u",
    "labels": {"sae-operator.dev/step": "train"},
    "annotations": {"sae-operator.dev/attempt": "3", "sae-operator.dev/work": "0.1000"},
}


def pod(status: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    labels = {"batch.kubernetes.io/job-name": "sae-01234567-train-3", "sae-operator.dev/step": "train"}
    spec = {"nodeName": "n1", "containers": [{"name": "step", "image": "img"}]}
    return {"metadata": {"name": "p", "labels": labels, **metadata}, "spec": spec, "status": status}


def ended(**terminated: Any) -> dict[str, Any]:
    return {"phase": "Failed", "containerStatuses": [{"name": "step", "state": {"terminated": terminated}}]}


def test_a_job_that_works() -> None:
    facts = job_facts({"metadata": JOB_METADATA, "spec": {"completions": 2}, "status": {"active": 2, "failed": 1}})
    assert (facts.step, facts.attempt, facts.work) == ("train", 3, "0.1000")
    assert (facts.active, facts.failed, facts.completions, facts.finished) == (2, 1, 2, False)


def test_a_job_that_completed_and_one_that_failed() -> None:
    at = "2026-01-01T00:00:00Z"
    complete = {"conditions": [{"type": "Complete", "status": "True"}], "completionTime": at}
    failed = {
        "conditions": [
            {"type": "FailureTarget", "status": "True", "reason": "PodFailurePolicy"},
            {
                "type": "Failed",
                "status": "True",
                "reason": "PodFailurePolicy",
                "message": "m",
                "lastTransitionTime": at,
            },
        ]
    }
    done = job_facts({"metadata": JOB_METADATA, "status": complete})
    assert done.complete
    assert done.finish_time == datetime(2026, 1, 1, tzinfo=UTC)
    bad = job_facts({"metadata": JOB_METADATA, "status": failed})
    assert (bad.complete, bad.failed_reason, bad.failed_message) == (False, "PodFailurePolicy", "m")
    assert bad.finish_time == datetime(2026, 1, 1, tzinfo=UTC)


def test_a_condition_that_is_not_true_is_none() -> None:
    status = {"conditions": [{"type": "Failed", "status": "False", "reason": "x"}]}
    assert not job_facts({"metadata": JOB_METADATA, "status": status}).finished


def test_a_running_pod_and_one_that_is_being_deleted() -> None:
    status = {
        "phase": "Running",
        "podIP": "127.0.0.9",
        "containerStatuses": [{"name": "step", "state": {"running": {}}}],
    }
    facts = pod_facts(pod(status, annotations={"batch.kubernetes.io/job-completion-index": "7"}))
    assert (facts.running, facts.ip, facts.index, facts.node, facts.image) == (True, "127.0.0.9", 7, "n1", "img")
    ending = pod_facts(pod(status, deletionTimestamp="2026-01-01T00:00:00Z"))
    assert (ending.running, ending.deleting) == (False, True)
    assert ending.deletion_time == datetime(2026, 1, 1, tzinfo=UTC)


def test_when_a_container_started_and_ended() -> None:
    times = {"startedAt": "2026-01-01T00:00:05Z", "finishedAt": "2026-01-01T00:00:09Z"}
    running = {"phase": "Running", "containerStatuses": [{"name": "step", "state": {"running": times}}]}
    for status in (running, ended(exitCode=0, **times)):
        assert pod_facts(pod(status)).begin_time == datetime(2026, 1, 1, 0, 0, 5, tzinfo=UTC)
    assert pod_facts(pod(ended(exitCode=0, **times))).finish_time == datetime(2026, 1, 1, 0, 0, 9, tzinfo=UTC)
    assert pod_facts(pod({"phase": "Pending"})).begin_time is None


@pytest.mark.parametrize(
    ("ready", "containers_ready", "lost"),
    [
        ({"status": "False"}, "True", True),
        ({"status": "True"}, "True", False),
        ({"status": "False", "reason": "ContainersNotReady"}, "False", False),
        ({"status": "False", "reason": "ReadinessGatesNotReady"}, "True", False),
        ({"status": "False"}, "False", False),
    ],
    ids=["node silent", "ready", "not ready", "readiness gate", "no reason"],
)
def test_a_pod_whose_node_does_not_answer(ready: dict[str, str], containers_ready: str, lost: bool) -> None:
    status = {
        "phase": "Running",
        "conditions": [{"type": "Ready", **ready}, {"type": "ContainersReady", "status": containers_ready}],
        "containerStatuses": [{"name": "step", "state": {"running": {}}}],
    }
    facts = pod_facts(pod(status))
    assert (facts.lost, facts.running) == (lost, not lost)


def test_a_pod_killed_for_memory() -> None:
    facts = pod_facts(pod(ended(exitCode=137, reason="OOMKilled", finishedAt="2026-01-01T00:00:00Z")))
    assert facts.oom_killed
    assert (facts.exit_code, facts.finish_time) == (137, datetime(2026, 1, 1, tzinfo=UTC))


def test_an_evicted_pod_has_no_container_state() -> None:
    facts = pod_facts(pod({"phase": "Failed", "reason": "Evicted", "message": "low on resource: memory"}))
    assert (facts.termination_reason, facts.termination_text) == ("Evicted", "low on resource: memory")


def test_a_result_in_the_termination_message() -> None:
    text = '{"step":"train","exitCode":2,"reason":"OutputTaken","message":"m","somethingNew":1}'
    facts = pod_facts(pod(ended(exitCode=2, message=text)))
    assert facts.result is not None
    assert (facts.result.reason, facts.termination_text) == ("OutputTaken", None)


def test_a_log_instead_of_a_result_is_kept_by_its_end() -> None:
    facts = pod_facts(pod(ended(exitCode=1, message="line\n" * 1000 + "RuntimeError: the cause")))
    assert facts.result is None
    assert facts.termination_text is not None
    assert facts.termination_text.endswith("RuntimeError: the cause")
    assert len(facts.termination_text) <= 1003


@given(st.text())
def test_any_text_that_is_no_result_is_kept_as_text(text: str) -> None:
    facts = pod_facts(pod(ended(exitCode=1, message=text)))
    assert facts.result is None
    assert (facts.termination_text or "") == " ".join(text.split())


def test_an_unschedulable_pod() -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}
    assert pod_facts(pod({"phase": "Pending", "conditions": [condition]})).unschedulable == "0/1 nodes"
    gated = condition | {"reason": "SchedulingGated"}
    assert pod_facts(pod({"phase": "Pending", "conditions": [gated]})).unschedulable is None


def test_defaults_are_read_and_what_is_wrong_with_them_told() -> None:
    assert defaults(None).problem is None
    good = defaults(
        {"data": {"endpointUrl": "http://s3", "nodeSelector": '{"a": "b"}', "tolerations": '[{"key": "k"}]'}}
    )
    assert (good.endpoint_url, good.node_selector, good.problem) == ("http://s3", {"a": "b"}, None)
    assert good.tolerations == ({"key": "k", "operator": "Equal"},)
    bad = defaults({"data": {"nodeSelector": "gpu=true", "tolerations": "{}", "endpoint": "x", "region": "eu-1"}})
    assert bad.problem is not None
    assert all(word in bad.problem for word in ("nodeSelector", "tolerations", "unknown keys endpoint"))
    assert (bad.region, bad.node_selector, bad.tolerations) == ("eu-1", {}, ())
    assert defaults({"data": {"queueName": "team.gpu"}}).queue_name == "team.gpu"
    # A label's value, which the API server would refuse.
    too_long = defaults({"data": {"queueName": "q" * 64}})
    assert too_long.queue_name is None
    assert too_long.problem is not None
    texts = defaults({"data": {"endpointUrl": "s3.local:9000", "region": "a\nb", "secretName": "S_3", "image": "i:1"}})
    assert (texts.endpoint_url, texts.region, texts.secret_name, texts.image) == (None, None, None, "i:1")
    assert texts.problem is not None
    assert all(f"{word} is not what it should be" in texts.problem for word in ("endpointUrl", "region", "secretName"))


@pytest.mark.parametrize(
    "said",
    [
        '"tokensPerSecond": 1e999',
        '"tokensPerSecond": Infinity',
        '"tokens": 99999999999999999999',
        '"tokens": 1e300',
        '"saes": [{"name": "a", "explainedVariance": NaN}]',
        '"saes": ' + "[" * 5000,
    ],
)
def test_what_no_status_can_hold_is_no_message(said: str) -> None:
    assert read_message(f'{{"step": "train", "updatedAt": "", {said}}}', Progress) is None


def test_large_figures_are_figures() -> None:
    said = read_message('{"step": "train", "updatedAt": "", "saes": [{"name": "a", "mse": 1e25}]}', Progress)
    assert said is not None
    assert said.saes[0].mse == 1e25


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "nodeSelector is not what it should be: no JSON (recursion limit exceeded"),
        ("gpu=yes", "nodeSelector is not what it should be: no JSON ("),
        ('{"gpu": 1}', "nodeSelector is not what it should be: gpu: Input should be a valid string"),
        ("[]", "nodeSelector is not what it should be: Input should be a valid dictionary"),
    ],
)
def test_a_malformed_default_is_told_and_left_out(text: str, problem: str) -> None:
    found = defaults({"data": {"nodeSelector": text, "region": "eu"}})
    assert (found.node_selector, found.region) == ({}, "eu")
    assert found.problem is not None
    assert found.problem.startswith(problem)
    assert "pydantic" not in found.problem


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "yesterday", ""])
def test_a_time_that_is_none_is_not_known(text: str) -> None:
    assert parse_time(text) is None


def test_a_time_of_another_zone_is_told_in_utc() -> None:
    moment = parse_time("2026-01-01T02:00:00+02:00")
    assert moment is not None
    assert rfc3339(moment) == "2026-01-01T00:00:00Z"
