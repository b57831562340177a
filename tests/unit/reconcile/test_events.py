"""What is worth an event: a life has few of them, and a restart adds none."""

from __future__ import annotations

from tests.unit.reconcile.fake_cluster import JOB, FakeCluster, PodScript
from tests.unit.reconcile.specs import job_spec


def reasons(cluster: FakeCluster) -> list[str]:
    return [reason for name, reason, _ in cluster.events if name == "sae"]


def test_a_life_on_a_ready_cache_has_three_events() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}))
    cluster.run()
    assert cluster.phases("sae") == ["Preflight", "Queued", "Running", "Succeeded"]
    assert reasons(cluster) == ["Preflight", "Running", "Succeeded"]


def test_what_hinders_a_job_from_starting_is_told_once() -> None:
    def script(step: str, index: int, earlier: int) -> PodScript:
        return PodScript(unschedulable="0/3 nodes are available") if step == "train" else PodScript()

    cluster = FakeCluster(script)
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}))
    cluster.run(60)
    assert cluster.phase(JOB, "sae") == "Queued"
    assert reasons(cluster) == ["Preflight", "Unschedulable"]
