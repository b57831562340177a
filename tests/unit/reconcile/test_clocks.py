"""Clocks that are put back: nothing waits for a time to come again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from sae_operator.api.status import ProgressStatus
from sae_operator.reconcile.progress import is_too_early
from tests.unit.reconcile.fake_cluster import JOB, FakeCluster
from tests.unit.reconcile.test_failures import uri_job

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("written", "too_early"),
    [("2025-12-31T23:59:55Z", True), ("2025-12-31T23:59:50Z", False), ("2026-01-01T01:00:00Z", False)],
)
def test_progress_of_the_future_does_not_hold_that_of_now_back(written: str, too_early: bool) -> None:
    assert is_too_early(ProgressStatus(updated_at=written), NOW, 10.0) is too_early


def test_a_lost_message_is_not_waited_for_until_the_old_time_comes_again() -> None:
    cluster = FakeCluster(lose_messages=frozenset({"train"}))
    cluster.create(JOB, "sae", uri_job())
    cluster.run_until(
        lambda: any("conditions" in job["status"] for name, job in cluster.jobs.items() if "train" in name)
    )
    cluster.now -= timedelta(hours=1)
    cluster.wait(5)
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert cluster.condition(JOB, "sae", "MetricsUnavailable") is not None
