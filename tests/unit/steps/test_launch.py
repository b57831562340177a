"""What the launcher tells of processes that trained together, and which of them a pod runs."""

from __future__ import annotations

import pytest

from sae_job.steps.launch import Group, group_of, merged
from sae_job.training.place import ALONE, Place
from sae_operator.api.steps import StepResult


def said(code: int, reason: str, message: str = "") -> StepResult:
    return StepResult(step="train", exit_code=code, reason=reason, message=message)


DONE, LOST = said(0, "Completed"), said(1, "PeerLost", "another process has ended")
STOPPED, FAILED, INVALID = said(143, "Stopped"), said(1, "StoreFailed"), said(2, "ShardCorrupt")


@pytest.mark.parametrize(
    ("results", "ended", "reason", "code"),
    [
        ([DONE, said(0, "Completed", "beside")], {}, "Completed", 0),
        ([LOST, LOST, INVALID], {}, "ShardCorrupt", 2),
        ([LOST, FAILED, LOST], {}, "StoreFailed", 1),
        ([LOST, None, LOST], {0: 1, 1: -9, 2: 1}, "ProcessKilled", 1),
        ([FAILED, None], {0: 1, 1: -9}, "StoreFailed", 1),
        ([LOST, None], {0: 1, 1: -15}, "PeerLost", 1),
        ([STOPPED, STOPPED], {}, "Stopped", 143),
        ([STOPPED, None], {}, "Stopped", 143),
        ([None, None], {}, "Stopped", 143),
        ([None, None], {0: 1, 1: -15}, "ProcessKilled", 1),
    ],
)
def test_the_cause_is_told(results: list[StepResult | None], ended: dict[int, int], reason: str, code: int) -> None:
    found = merged("train", dict(enumerate(results)), ended)
    assert (found.reason, found.exit_code) == (reason, code)


def test_the_group_is_one_process_per_gpu_and_pod() -> None:
    assert group_of({}, lambda: 0) == Group(1)
    assert group_of({}, lambda: 8) == Group(8)
    assert group_of({"SAE_JOB_PROCESSES": "2"}, lambda: 8).size == 2
    pods = {"SAE_JOB_PODS": "4", "SAE_JOB_RENDEZVOUS": "job-0.sae-x:29400", "JOB_COMPLETION_INDEX": "3"}
    group = group_of(pods, lambda: 8)
    assert group == Group(8, 4, 3, ("job-0.sae-x", 29400))
    assert group.size == 32


def test_the_place_is_what_torchrun_says() -> None:
    assert Place.of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(5, 8, 1)
    assert Place.of({}) == ALONE
