"""The table of a sweep: ranks, the Pareto front, and what is told of trials that have no figures."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_job.reporting.sweep_table import (
    FIGURES,
    JobResults,
    TrialRow,
    best_of,
    by_rank,
    counts,
    document,
    pareto_front,
    reasons,
    table,
)
from sae_operator.api.sweep import Objective

FINITE = st.floats(-1e9, 1e9)
POINTS = st.lists(st.tuples(st.floats(0, 1e4), FINITE), max_size=30)
# Few different values, so that ties are common.
COARSE = st.lists(st.tuples(st.integers(0, 4).map(float), st.integers(0, 4).map(float)), max_size=30)


def name_of(number: int) -> str:
    return f"t-{number:010x}"


def sae(number: int, suffix: str = "", **told: Any) -> dict[str, Any]:
    return {"name": name_of(number) + suffix, "phase": "Succeeded", "message": None, **told}


def rows_of(
    saes: list[dict[str, Any]], objective: Objective | None = None, trials: int | None = None
) -> list[TrialRow]:
    """Rows of trials that share one job."""
    number = trials if trials is not None else len({told["name"][:12] for told in saes})
    names = [name_of(i) for i in range(number)]
    job = JobResults("job", "folder", names, results={"saes": saes})
    return table([(name, {"x": i}) for i, name in enumerate(names)], [job], objective or Objective())


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] <= b[0] and a[1] >= b[1]


@given(POINTS | COARSE)
def test_the_front_is_what_nobody_beats(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    assert set(front) == {i for i, point in enumerate(points) if not any(beats(other, point) for other in points)}
    assert len(front) == len(set(front))
    costs = [points[i][0] for i in front]
    assert costs == sorted(costs)


@given(COARSE, st.randoms())
def test_the_front_does_not_depend_on_the_order(points: list[tuple[float, float]], source: Any) -> None:
    shuffled = points[:]
    source.shuffle(shuffled)
    assert sorted(points[i] for i in pareto_front(points)) == sorted(shuffled[i] for i in pareto_front(shuffled))


@given(
    st.lists(st.tuples(st.integers(0, 5).map(float), st.integers(0, 60).map(float)), min_size=1, max_size=20),
    st.sampled_from(["maximize", "minimize"]),
    st.none() | st.integers(1, 40),
)
def test_the_best_is_the_first_of_the_best_figures_that_are_sparse_enough(
    figures: list[tuple[float, float]], goal: str, bound: int | None
) -> None:
    objective = Objective.model_validate({"metric": "mse", "goal": goal, "l0AtMost": bound})
    rows = rows_of([sae(i, mse=mse, l0=l0) for i, (mse, l0) in enumerate(figures)], objective)
    able = [(mse, i) for i, (mse, l0) in enumerate(figures) if bound is None or l0 <= bound]
    sign = 1 if goal == "minimize" else -1
    expected = [i for _, i in sorted((sign * mse, i) for mse, i in able)]
    ranked = [row.name for row in by_rank(rows) if row.rank is not None]
    assert ranked == [name_of(i) for i in expected]
    assert [row.rank for row in by_rank(rows)][: len(expected)] == list(range(1, len(expected) + 1))
    best = best_of(rows)
    assert best is None if not expected else best is not None and best.name == name_of(expected[0])


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "0.5", True])
def test_a_figure_that_is_none_is_no_rank(value: Any) -> None:
    (row,) = rows_of([sae(0, explained_variance=value, l0=3)])
    assert (row.phase, row.rank, row.objective) == ("Succeeded", None, None)
    assert row.shown is not None
    assert row.shown.figures == {"l0": 3.0}


def test_with_a_bound_an_unknown_l0_cannot_be_the_best() -> None:
    (row,) = rows_of([sae(0, explained_variance=0.9)], Objective.model_validate({"l0AtMost": 10}))
    assert row.rank is None


def test_given_up_and_failed_trials_have_figures_and_no_rank_and_are_in_no_front() -> None:
    rows = rows_of(
        [
            sae(0, explained_variance=0.9, l0=8),
            sae(1, explained_variance=0.99, l0=4, phase="Stopped", message="below the median"),
            sae(2, phase="Failed", message="not finite"),
        ]
    )
    assert [row.phase for row in rows] == ["Succeeded", "Stopped", "Failed"]
    assert [row.rank for row in rows] == [1, None, None]
    assert [row.is_on_front("explained_variance") for row in rows] == [True, False, False]
    assert [row.message for row in rows] == [None, "below the median", "not finite"]
    assert counts(rows) == {"Succeeded": 1, "Stopped": 1, "Failed": 1, "Unfinished": 0}


def test_a_trial_of_several_saes_is_as_good_as_the_best_of_them() -> None:
    rows = rows_of(
        [
            sae(0, "-a", explained_variance=0.7, l0=4),
            sae(0, "-b", explained_variance=0.8, l0=8),
            sae(0, "-c", explained_variance=0.9, l0=8, phase="Stopped", message="worse"),
            sae(1, "-a", phase="Failed", message="not finite"),
            sae(1, "-b", phase="Stopped", message="worse"),
        ]
    )
    assert rows[0].sae is not None
    assert rows[0].sae.name == name_of(0) + "-b"
    assert [row.phase for row in rows] == ["Succeeded", "Stopped"]
    fronts = {found.name[-1]: found.fronts for found in rows[0].saes}
    assert fronts == {"a": ("explained_variance",), "b": ("explained_variance",), "c": ()}


def test_reasons_that_differ_in_numbers_and_trials_are_one() -> None:
    told = [
        "stopped after 128 tokens: explained_variance 0.5 is below 0.7",
        "SAE 't-0000000003': the loss is not finite",
    ]
    rows = rows_of(
        [
            sae(0, explained_variance=0.9),
            sae(1, phase="Stopped", message=told[0]),
            sae(2, phase="Failed", message=told[1]),
            sae(3, phase="Failed", message=told[1].replace("t-0000000003", "t-00000000ab")),
            sae(4, phase="Stopped", message=told[0].replace("0.5", "1.25e-05").replace("128", "256")),
            sae(5, phase="Stopped", message=told[0]),
        ]
    )
    assert [(row.name, number) for row, number in reasons(rows)] == [(name_of(1), 3), (name_of(2), 2)]


def test_there_is_a_front_of_the_score_where_it_is_measured() -> None:
    rows = rows_of(
        [
            sae(0, explained_variance=0.9, ce_loss_score=0.5, l0=8),
            sae(1, explained_variance=0.8, ce_loss_score=0.6, l0=8),
        ]
    )
    assert [found.fronts for row in rows for found in row.saes] == [("explained_variance",), ("ce_loss_score",)]


def test_trials_without_results_say_why() -> None:
    trials = [(name_of(i), {}) for i in range(4)]
    jobs = [
        JobResults("a", "fa", [name_of(0)], message="spec.saes[0].dSae: too large"),
        JobResults("b", "fb", [name_of(1)]),
        JobResults("c", "fc", [name_of(2), name_of(9)], results={"saes": [sae(9, l0=1)]}),
    ]
    rows = table(trials, jobs, Objective())
    assert [(row.phase, row.job, row.message) for row in rows] == [
        ("Failed", "a", "spec.saes[0].dSae: too large"),
        ("Unfinished", "b", "its training job has left no results"),
        ("Unfinished", "c", "its training job has left no results"),
        ("Unfinished", None, "its training job has not been started"),
    ]
    assert best_of(rows) is None


def test_of_two_jobs_with_a_trial_the_first_by_name_counts() -> None:
    jobs = [
        JobResults("b", "fb", [name_of(0)], results={"saes": [sae(0, explained_variance=0.9)]}),
        JobResults("a", "fa", [name_of(0)], results={"saes": [sae(0, explained_variance=0.5)]}),
    ]
    (row,) = table([(name_of(0), {})], jobs, Objective())
    assert (row.job, row.objective) == ("a", 0.5)


def test_the_document_tells_every_trial_and_every_sae() -> None:
    rows = rows_of(
        [
            sae(0, explained_variance=0.9, l0=8, hook="layer", d_sae=64, architecture="topk"),
            sae(1, phase="Failed", message="not finite"),
        ]
    )
    job = JobResults("job", "folder", [name_of(0), name_of(1)])
    told = json.loads(json.dumps(document("sweep", "ns", "s3://b/s", Objective(), rows, [job]), allow_nan=False))
    assert told["counts"] == {"total": 2, "succeeded": 1, "stopped": 0, "failed": 1, "unfinished": 0}
    assert (told["best"], told["pareto_front"]["explained_variance"]) == (name_of(0), [name_of(0)])
    first, second = told["trials"]
    assert (first["best"], first["pareto_front"], first["rank"], first["objective"]) == (True, True, 1, 0.9)
    assert first["saes"][0]["uri"] == f"s3://b/s/folder/{name_of(0)}"
    assert (first["saes"][0]["hook"], first["saes"][0]["d_sae"]) == ("layer", 64)
    assert second["saes"][0]["uri"] is None
    assert (second["phase"], second["message"]) == ("Failed", "not finite")
    assert all(figure in first for figure in FIGURES)
    assert told["jobs"] == [{"name": "job", "folder": "folder", "trials": [name_of(0), name_of(1)], "message": None}]
