"""Pods that wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sae_job.errors import PeerLost, Stopped
from sae_job.steps.meeting import AlreadyFinished, Meeting
from sae_operator.api.steps import StepResult
from tests.rank_processes import free_port, in_parallel

DONE = StepResult(step="train", exit_code=0, reason="Completed")


def meeting(pod: int, port: int, *, stop: Callable[[], bool] = lambda: False, **settings: Any) -> Meeting:
    return Meeting(2, pod, "127.0.0.1", port, stop, settings.pop("finished", lambda: None), **settings)


def test_a_pod_that_waits_in_vain_says_so() -> None:
    for pod in (0, 1):
        with pytest.raises(PeerLost, match="in vain"):
            meeting(pod, free_port(), wait_seconds=0.1).store()


def test_a_pod_that_waits_can_be_stopped() -> None:
    with pytest.raises(Stopped, match="while waiting"):
        meeting(1, free_port(), stop=lambda: True).store()


def test_a_pod_that_comes_when_all_is_done_takes_the_results() -> None:
    with pytest.raises(AlreadyFinished) as found:
        meeting(1, free_port(), finished=lambda: DONE).store()
    assert found.value.result is DONE


def test_a_pod_that_is_started_again_waits_for_the_last_attempt_to_end() -> None:
    """The second pod died; the first one, which holds its store, has not noticed yet."""
    port = free_port()
    first, second = in_parallel(meeting(0, port).store, meeting(1, port).store)
    asked: list[int] = []

    def later() -> bool:
        asked.append(1)
        return len(asked) > 5

    with pytest.raises(Stopped, match="end their last attempt"):
        meeting(1, port, stop=later).store()
    del first, second
