"""The page of a sweep: parsed as a browser would, with one trial and with thousands."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from sae_job.reporting.sweep_plots import Point, parameter_plot, pareto_plot
from sae_job.reporting.sweep_report import render_sweep_report
from sae_job.reporting.sweep_table import JobResults, TrialRow, table
from sae_operator.api.sweep import Objective

PATHS = ("saes[0].architecture.k", "training.learningRate", "saes[0].hook")
VOID = {"meta", "br", "img", "use", "path", "rect", "link", "input"}


class Page(HTMLParser):
    """What a page holds: rows of its table, links, headings, plots; and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.rows: list[list[str]] = []
        self.keys: list[list[str]] = []
        self.plots = 0
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "a":
            self.links.append(str(told["href"]))
        if tag in ("script", "img", "link", "image"):
            self.sources += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.plots += tag == "svg"
        if tag == "tr":
            self.rows.append([])
            self.keys.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.keys[-1].append(str(told.get("data-key", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "image":
            self.sources += [str(value) for name, value in attrs if name in ("href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if any(tag in self.open for tag in ("td", "th")):
            self.rows[-1][-1] += data

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def made(number: int, *, score: bool = False) -> tuple[list[TrialRow], int]:
    """Rows of a sweep with trials of every kind, the same each time."""
    source = random.Random(number)
    trials: list[tuple[str, dict[str, Any]]] = []
    jobs: list[JobResults] = []
    for i in range(number):
        k = source.choice([8, 16, 32, 64])
        values = (k, 10 ** source.uniform(-4, -2), source.choice(["layers.1", "layers.2"]))
        trials.append((f"t-{i:010x}", dict(zip(PATHS, values, strict=True))))
    for first in range(0, number, 8):
        part = trials[first : first + 8]
        saes: list[dict[str, Any]] = []
        for place, (name, parameters) in enumerate(part):
            k = parameters[PATHS[0]]
            figures = {"l0": float(k), "explained_variance": math.log2(k) / 8 + source.uniform(0, 0.1)}
            figures |= {"ce_loss_score": figures["explained_variance"] + 0.1} if score else {}
            phase = ("Stopped", "Failed")[place - 3] if place in (3, 4) else "Succeeded"
            message = {"Stopped": "worse than <the median>", "Failed": "not finite"}.get(phase)
            saes.append({"name": name, "phase": phase, "message": message, **figures})
        lost = first == 8
        jobs.append(
            JobResults(
                f"job-{first}",
                f"folder{first}",
                [name for name, _ in part],
                message="it has lost its disk" if lost else None,
                results=None if lost else {"saes": saes},
            )
        )
    return table(trials, jobs, Objective()), len(jobs)


def page_of(rows: list[TrialRow], jobs: int = 1, objective: Objective | None = None) -> tuple[Page, str]:
    text = render_sweep_report("my-sweep", objective or Objective(), rows, {"template": {"a": "<b>"}}, jobs=jobs)
    return Page(text), text


@pytest.mark.parametrize("number", [1, 40, 2000])
def test_the_page_stands_alone_and_tells_every_trial(number: int) -> None:
    rows, jobs = made(number)
    page, text = page_of(rows, jobs)
    assert page.open == []
    head, *body = page.rows
    assert len(body) == number
    assert {len(row) for row in body} == {len(head)}
    assert {row[1] for row in body} == {row.name for row in rows}
    assert all(source.startswith(("#", "data:")) for source in page.sources)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert len(text) < 3_000_000


def test_the_same_rows_give_the_same_page() -> None:
    assert page_of(*made(40))[1] == page_of(*made(40))[1]


def test_rows_are_by_rank_and_cells_hold_what_they_are_sorted_by() -> None:
    rows, jobs = made(40)
    page, _ = page_of(rows, jobs)
    body, keys = page.rows[1:], page.keys[1:]
    ranked = [row[0] for row in body if row[0] != "–"]
    assert ranked == [str(rank) for rank in range(1, len(ranked) + 1)]
    assert [row[0] for row in body[: len(ranked)]] == ranked
    figures = [float(key[5]) for key in keys[: len(ranked)]]
    assert page.rows[0][5] == "explained variance"
    assert figures == sorted(figures, reverse=True)
    unknown = [key for row, key in zip(body, keys, strict=True) if row[0] == "–"]
    assert all(key[0] == "" for key in unknown)


def test_links_lead_to_the_reports_of_jobs_that_have_one() -> None:
    rows, jobs = made(40)
    page, _ = page_of(rows, jobs)
    assert set(page.links) == {"trials.json"} | {f"folder{i}/report.html" for i in (0, 16, 24, 32)}


def test_what_failed_is_told_once_for_each_reason() -> None:
    rows, jobs = made(40)
    page, text = page_of(rows, jobs)
    assert "40 trials in 5 training jobs: 24 succeeded, 4 stopped, 12 failed" in page.words
    assert "Failed, 8 trials, e.g. t-0000000008" in page.words
    assert "it has lost its disk" in page.words
    assert "Stopped, 4 trials" in page.words
    assert "&lt;the median&gt;" in text
    assert "<the median>" not in text
    assert "8 trials without figures" not in page.words
    assert "12 trials without figures: not drawn." in page.words


def test_plots_are_those_of_what_varies_and_is_measured() -> None:
    """One of L0 against explained variance, one of the score where it is measured, one for each parameter."""
    assert page_of(*made(40))[0].plots == 1 + 3
    assert page_of(*made(40, score=True))[0].plots == 2 + 3
    assert page_of(*made(1))[0].plots == 1


def test_values_that_matplotlib_would_take_for_formulas_are_drawn_as_they_are() -> None:
    points = [Point(value, 0.5) for value in (r"$\frac$", "a\x00b", "\ud800")]
    assert parameter_plot(points, "a.b", "explained_variance") is not None


def test_without_a_best_trial_the_page_says_so() -> None:
    rows = table([("t-0000000000", {"x": 1})], [JobResults("a", "f", ["t-0000000000"], message="no disk")], Objective())
    page, _ = page_of(rows, objective=Objective.model_validate({"l0AtMost": 3}))
    assert "No trial has come to its end with an L0 of at most 3" in page.words
    assert page.plots == 0
    assert "no disk" in page.words


def test_the_best_is_named_with_its_figures_and_its_place() -> None:
    rows, jobs = made(16)
    page, _ = page_of(rows, jobs)
    best = next(row for row in rows if row.rank == 1)
    assert best.sae is not None
    assert f"{best.name} : saes[0].architecture.k=64" in page.words
    assert f"folder0/{best.name}" in page.words
    assert f"explained variance {best.sae.figures['explained_variance']:.4f}" in page.words


def test_many_points_are_an_image_inside_the_plot() -> None:
    points = [Point(float(i), math.sqrt(i)) for i in range(1000)]
    assert "data:image/png" in pareto_plot(points, "explained_variance")
    assert "data:image/png" not in pareto_plot(points[:50], "explained_variance")


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([1, 2, 3], True),
        ([1, 1, 1], False),
        (["a", "b"], True),
        ([True, False], True),
        ([1, "a"], True),
        ([{"type": "topk"}, {"type": "gated"}], True),
        ([f"value {i}" for i in range(40)], False),
        ([], False),
        ([1e-5, 1e-3, 1.0], True),
    ],
)
def test_a_parameter_has_a_plot_where_it_can_be_drawn(values: list[Any], drawn: bool) -> None:
    points = [Point(value, 0.5 + i, best=i == 0) for i, value in enumerate(values)]
    plot = parameter_plot(points, "a.b", "explained_variance")
    assert (plot is not None) is drawn
    assert plot is None or plot.startswith("<svg")
