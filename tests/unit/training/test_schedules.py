"""The learning rate: values of worked examples, and what holds for every schedule."""

from __future__ import annotations

from math import cos, pi

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_job.training.schedules import LearningRateSchedule, ScheduleName


def rates(
    name: ScheduleName, *, warm_up: int, decay: int, total: int, cycles: int = 1, end: float = 0.01
) -> list[float]:
    schedule = LearningRateSchedule(name, 0.1, end, warm_up, decay, total, cycles)
    return [schedule(step) for step in range(total + 1)]


def test_warm_up_begins_at_a_fraction_and_reaches_the_peak() -> None:
    assert rates("constant", warm_up=2, decay=0, total=4) == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.0])


def test_decay_ends_above_zero_and_is_zero_after_the_last_step() -> None:
    assert rates("constant", warm_up=2, decay=4, total=6) == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025, 0.0])


def test_cosine_hands_over_to_the_decay_at_its_end() -> None:
    cosine = [0.01 + 0.09 * (1 + cos(pi * i / 4)) / 2 for i in range(4)]
    expected = [0.05, 0.1, *cosine, 0.01, 0.005, 0.0]
    assert rates("cosineannealing", warm_up=2, decay=2, total=8) == pytest.approx(expected)


def test_warm_restarts_divide_the_main_phase() -> None:
    cycle = [0.01 + 0.09 * (1 + cos(pi * i / 4)) / 2 for i in range(4)]
    assert rates("cosineannealingwarmrestarts", warm_up=0, decay=0, total=8, cycles=2) == pytest.approx(
        [*cycle, *cycle, 0.0]
    )


def test_steps_that_do_not_divide_lengthen_the_first_cycles() -> None:
    lengths = (4, 4, 3)
    expected = [0.01 + 0.09 * (1 + cos(pi * i / n)) / 2 for n in lengths for i in range(n)]
    assert rates("cosineannealingwarmrestarts", warm_up=0, decay=0, total=11, cycles=3) == pytest.approx(
        [*expected, 0.0]
    )


@pytest.mark.parametrize(
    ("name", "end", "warm_up", "decay", "cycles"),
    [
        ("linear", 0.01, 0, 0, 1),
        ("constant", 0.01, 6, 5, 1),
        ("cosineannealing", 0.0, 0, 5, 1),
        ("cosineannealingwarmrestarts", 0.01, 3, 3, 5),
    ],
)
def test_what_cannot_work_is_refused(name: ScheduleName, end: float, warm_up: int, decay: int, cycles: int) -> None:
    with pytest.raises(ValueError):
        LearningRateSchedule(name, 0.1, end, warm_up, decay, 10, cycles)


@given(
    name=st.sampled_from(["constant", "cosineannealing", "cosineannealingwarmrestarts"]),
    warm_up=st.integers(0, 20),
    main=st.integers(1, 40),
    decay=st.integers(0, 20),
    cycles=st.integers(1, 40),
)
def test_every_step_has_a_rate_between_zero_and_the_peak(
    name: ScheduleName, warm_up: int, main: int, decay: int, cycles: int
) -> None:
    total = warm_up + main + decay
    schedule = LearningRateSchedule(name, 0.3, 0.03, warm_up, decay, total, min(cycles, main))
    assert all(0 < schedule(step) <= 0.3 * (1 + 1e-12) for step in range(total))
    assert schedule(warm_up) == pytest.approx(0.3)
    assert schedule(total) == 0
