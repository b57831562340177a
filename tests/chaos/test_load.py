"""What an operator writes and looks at when there is much to do, and nothing to do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sae_operator.controller import progress
from tests.chaos.life import JOBS, Life, Specs
from tests.chaos.workloads import Fate

# Each at every look would be 20 a second.
RUNNING = 200
SECONDS = 60.0
MOST_PATCHES_PER_SECOND = 15.0


@pytest.fixture
def life(monkeypatch: pytest.MonkeyPatch) -> Iterator[Life]:
    life = Life(1)
    monkeypatch.setattr(progress, "ask", life.answer_poll)
    life.invariants.most_writes = 10**6
    life.start_operator()
    yield life
    life.close()


def test_live_progress_of_many_trainings_is_written_at_a_bounded_rate(life: Life) -> None:
    life.workloads.fate = lambda pod: Fate(runs=1.0 if "preflight" in pod["metadata"]["name"] else 10_000.0)
    for number in range(RUNNING):
        life.create(JOBS, f"job-{number}", Specs.job(f"job-{number}", {"uri": "s3://saes/there"}))

    def all_run() -> bool:
        return all(job["status"].get("phase") == "Running" for job in life.server.all(JOBS))

    assert life.wait_until(all_run, 120.0, every=5.0)
    life.wait(20.0)
    before = life.invariants.writes[JOBS]
    life.wait(SECONDS)
    per_second = (life.invariants.writes[JOBS] - before) / SECONDS
    print(f"{per_second:.1f} status patches a second for {RUNNING} trainings")
    assert 0.2 * MOST_PATCHES_PER_SECOND < per_second <= MOST_PATCHES_PER_SECOND


def test_a_life_on_a_finished_cache_takes_few_writes(life: Life) -> None:
    life.create(JOBS, "job", Specs.job("job", {"uri": "s3://saes/there"}))
    life.settle()
    writes = life.invariants.writes
    assert writes["configmaps"] == writes["jobs"] == 2
    assert writes[JOBS] <= 4
    assert writes["events"] <= 5
