"""What pods and the API server say is told without credentials, by whatever way it comes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sae_operator.reconcile.projection import pod_facts
from tests.unit.reconcile.fake_cluster import JOB, FakeCluster, PodScript
from tests.unit.reconcile.specs import job_spec

PLANTED = "hunter2PLANTED"
SAID = f"https://minio:{PLANTED}@s3/x?X-Amz-Signature={PLANTED} AWS_SECRET_ACCESS_KEY={PLANTED}"


def pod(state: dict[str, Any], **status: Any) -> dict[str, Any]:
    meta = {"name": "a", "namespace": "lab", "uid": "u", "labels": {}}
    return {"metadata": meta, "status": {"containerStatuses": [{"name": "step", "state": state}], **status}}


@pytest.mark.parametrize(
    "raw",
    [
        pod({"terminated": {"exitCode": 1, "reason": "Error", "message": f"Traceback\n{SAID}"}}),
        pod({"terminated": {"exitCode": 1, "message": json.dumps({"step": "train", "exitCode": 1, "message": SAID})}}),
        pod({"waiting": {"reason": "ErrImagePull", "message": SAID}}),
        pod({}, message=SAID, reason="Evicted"),
    ],
)
def test_a_pods_texts(raw: dict[str, Any]) -> None:
    assert PLANTED not in str(pod_facts(raw))


def test_a_result_keeps_its_figures() -> None:
    message = json.dumps({"step": "train", "exitCode": 0, "reason": "Completed", "message": SAID, "tokens": 900})
    facts = pod_facts(pod({"terminated": {"exitCode": 0, "message": message}}))
    assert facts.result is not None
    assert (facts.result.tokens, facts.result.reason) == (900, "Completed")
    assert "https://***@s3/x" in facts.result.message


def test_statuses_and_events_of_a_failed_life() -> None:
    said = json.dumps({"step": "preflight", "exitCode": 2, "reason": "StoreRefused", "message": SAID})
    cluster = FakeCluster(lambda step, index, earlier: PodScript(exit_code=2, message=said))
    cluster.create(JOB, "sae", job_spec())
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Failed"
    told = json.dumps([cluster.statuses, cluster.events])
    assert "https://***@s3/x" in told
    assert PLANTED not in told
