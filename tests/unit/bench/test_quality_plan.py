"""How the quality benchmark chooses its runs from what earlier ones came to."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

import pytest

from bench.quality import coefficient_of
from bench.quality_plan import (
    L0_TOLERANCE,
    MOST_EXTENSIONS,
    MOST_MATCHING_RUNS,
    K,
    best_rate,
    is_matched,
    match,
    repeat,
    sweep,
)
from bench.quality_results import Result, Run

TOPK = Run("sparsify", "topk", 1000, 10, 0.0, None, 0)
STANDARD = Run("ours", "standard", 1000, 10, 1e-3, None, 0)


def carried_out(plan: Generator[Run, Result, Any], outcome: Callable[[Run], tuple[float, float]]) -> list[Result]:
    """What a plan asks for when a run comes to (explained variance, L0)."""
    done: list[Result] = []
    answer: Result | None = None
    while True:
        try:
            run = plan.send(answer) if answer is not None else next(plan)
        except StopIteration:
            return done
        explained, active = outcome(run)
        answer = Result(run, {"explained_variance": explained, "l0": active, "dead_fraction": 0.0}, {}, 1.0, None)
        done.append(answer)


def peak_at(rate: float) -> Callable[[Run], tuple[float, float]]:
    return lambda run: (1 - abs(math.log(run.learning_rate / rate)), float(K))


def test_a_default_that_is_best_is_compared_with_both_neighbours() -> None:
    rates = [result.run.learning_rate for result in carried_out(sweep(TOPK, 1e-3), peak_at(1e-3))]
    assert rates == pytest.approx([1e-3, 3e-3, 1e-3 / 3], rel=1e-2)


@pytest.mark.parametrize("best", [9e-3, 1e-3 / 9])
def test_the_search_goes_on_while_the_outermost_rate_is_the_best(best: float) -> None:
    results = carried_out(sweep(TOPK, 1e-3), peak_at(best))
    assert best_rate(results) == pytest.approx(best, rel=1e-2)
    assert len(results) == 5


def test_the_search_ends_where_rates_only_get_better() -> None:
    results = carried_out(sweep(TOPK, 1e-3), lambda run: (run.learning_rate, float(K)))
    assert len(results) == 3 + MOST_EXTENSIONS


def test_a_rate_at_which_l0_cannot_be_matched_is_not_chosen_however_much_it_explains() -> None:
    def outcome(run: Run) -> tuple[float, float]:
        assert run.coefficient is not None
        if run.learning_rate < 9e-4:
            return 0.9, 3 * K
        return 0.8, K / run.coefficient

    results = carried_out(sweep(STANDARD, 1e-3), outcome)
    assert best_rate(results) == 1e-3
    assert min(result.run.learning_rate for result in results) == pytest.approx(1e-3 / 3, rel=1e-2)


def test_rates_at_which_steering_ends_far_from_the_wanted_l0_lead_on_to_where_it_does_not() -> None:
    """They explain much with many active latents, which counts for nothing."""
    penalised = Run("saelens", "standard", 1000, 10, 0.0, None, 0)

    def outcome(run: Run) -> tuple[float, float]:
        assert run.steer
        return (
            (0.99, 500 * K * 1e-3 / run.learning_rate)
            if run.learning_rate < 8e-3
            else (0.8 + run.learning_rate, 1.1 * K)
        )

    results = carried_out(sweep(penalised, 1e-3), outcome)
    assert [result.run.learning_rate for result in results] == pytest.approx(
        [1e-3, 3e-3, 1e-3 / 3, 9e-3, 27e-3], rel=1e-2
    )
    assert best_rate(results) == pytest.approx(27e-3)


def test_a_rate_that_does_not_get_there_is_given_up_after_two_runs() -> None:
    hopeless = carried_out(match(STANDARD, 1.0), lambda run: (0.9, 100.0 * K))
    assert len(hopeless) == 2


def test_where_steering_failed_the_coefficient_is_that_of_the_run_that_was_matched() -> None:
    def result(coefficient: float, active: float, *, steered_to: float | None = None) -> Result:
        run = Run("saelens", "jumprelu", 1000, 10, 1e-3, coefficient, 0, steered_to is not None)
        return Result(run, {"explained_variance": 0.8, "l0": active, "dead_fraction": 0.0}, {}, 1.0, steered_to)

    failed, matched = result(1.0, 4 * K, steered_to=9.0), result(2.0, K)
    assert coefficient_of([failed, result(5.0, 2 * K), matched], 1e-3) == 2.0
    assert coefficient_of([result(1.0, 1.1 * K, steered_to=3.0), matched], 1e-3) == 3.0
    assert coefficient_of([failed], 1e-3) is None


def test_a_library_that_aims_at_an_l0_is_tried_once_at_each_rate_and_matched_when_it_is_compared() -> None:
    aiming = Run("dictionary_learning", "jumprelu", 1000, 10, 0.0, None, 0)

    def outcome(run: Run) -> tuple[float, float]:
        assert run.coefficient is not None
        return 0.8, 0.9 * K / run.coefficient

    results = carried_out(sweep(aiming, 1e-3), outcome)
    assert [result.run.coefficient for result in results] == [1.0] * 3
    assert best_rate(results) == 1e-3
    compared = carried_out(repeat(aiming, 1e-3, 1.0), outcome)
    assert [(result.run.seed, is_matched(result)) for result in compared] == [
        (1, False),
        (1, True),
        (2, True),
        (3, True),
    ]


@pytest.mark.parametrize("slope", [-0.5, -1.0, -2.0])
@pytest.mark.parametrize("first", [0.5, 5.0, 50.0])
def test_the_coefficient_is_found_where_l0_follows_a_power_of_it(slope: float, first: float) -> None:
    def outcome(run: Run) -> tuple[float, float]:
        assert run.coefficient is not None
        return 0.5, K * (run.coefficient / 4.0) ** slope

    results = carried_out(match(STANDARD, first), outcome)
    assert abs(results[-1].validation["l0"] / K - 1) <= L0_TOLERANCE
    assert len(results) <= MOST_MATCHING_RUNS


def test_runs_whose_l0_is_not_matched_choose_no_rate() -> None:
    unmatched = Result(STANDARD, {"explained_variance": 0.9, "l0": 3.0 * K, "dead_fraction": 0.0}, {}, 1.0, None)
    assert best_rate([unmatched]) is None
