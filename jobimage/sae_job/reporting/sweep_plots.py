"""Plots of a sweep, as SVG text: what SAEs cost and give, and what each parameter does to the objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_job.reporting.plots import COLOURS, svg_of
from sae_job.reporting.sweep_table import TrialRow, pareto_front

BLUE, ORANGE, GREEN = COLOURS[0], COLOURS[1], COLOURS[2]
# More points are drawn as an image inside the plot: shapes of their own would make the page slow.
MOST_SHAPES = 400
# Values of a parameter that is no number, which stand side by side.
MOST_CATEGORIES = 16
# Numbers that reach over so many times their smallest are drawn on a logarithmic axis.
LOG_RATIO = 20
TITLES = {"explained_variance": "explained variance", "ce_loss_score": "CE-loss score", "l0": "L0", "mse": "MSE"}


@dataclass(frozen=True)
class Point:
    """One SAE of a trial in a plot.

    Attributes:
        stopped: it was given up, so that its figures are of less training.
        best: it is the best of the sweep.
    """

    x: Any
    y: float
    stopped: bool = False
    best: bool = False


def title_of(metric: str) -> str:
    """A figure's name for people."""
    return TITLES.get(metric, metric.replace("_", " "))


def pareto_points(rows: Sequence[TrialRow], gain: str) -> list[Point]:
    """L0 and a gain of every SAE that has both."""
    return [
        Point(
            sae.figures["l0"],
            sae.figures[gain],
            stopped=sae.phase == "Stopped" or row.phase == "Failed",
            best=row.rank == 1 and row.sae is not None and sae.name == row.sae.name,
        )
        for row in rows
        for sae in row.saes
        if sae.phase != "Failed" and {"l0", gain} <= sae.figures.keys()
    ]


def parameter_points(rows: Sequence[TrialRow], path: str, metric: str) -> list[Point]:
    """A parameter's value and the objective's figure of every trial that has one."""
    return [
        Point(row.parameters[path], shown.figures[metric], stopped=row.phase != "Succeeded", best=row.rank == 1)
        for row in rows
        if (shown := row.shown) is not None and path in row.parameters and metric in shown.figures
    ]


def pareto_plot(points: Sequence[Point], gain: str) -> str:
    """L0 against a gain, with the front drawn and the best trial marked."""
    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.subplots()
    ended = [(point.x, point.y) for point in points if not point.stopped]
    front = [ended[i] for i in pareto_front(ended)]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=ORANGE, linewidth=1.4, label="Pareto front", zorder=2)
    elif front:
        axes.scatter(*zip(*front, strict=True), s=70, facecolors="none", edgecolors=ORANGE, label="Pareto front")
    _scatter(axes, points)
    positive = [point.x for point in points]
    if _is_wide(positive):
        axes.set_xscale("log")
    _finish(axes, f"L0 against {title_of(gain)}", "L0 (mean active latents)", title_of(gain))
    return svg_of(figure)


def parameter_plot(points: Sequence[Point], path: str, metric: str) -> str | None:
    """A parameter's values against the objective; None where it takes only one of them, or more kinds than can stand
    side by side."""
    numbers = all(isinstance(point.x, int | float) and not isinstance(point.x, bool) for point in points)
    values = list(dict.fromkeys(_word(point.x) for point in points))
    if len(values) < 2 or not (numbers or len(values) <= MOST_CATEGORIES):
        return None
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    if numbers:
        _scatter(axes, points)
        if _is_wide([point.x for point in points]):
            axes.set_xscale("log")
    else:
        places = {value: place for place, value in enumerate(values)}
        _scatter(axes, [Point(places[_word(p.x)], p.y, p.stopped, p.best) for p in points])
        axes.set_xticks(range(len(values)), [_label(value) for value in values], rotation=20, ha="right")
        axes.set_xlim(-0.5, len(values) - 0.5)
    _finish(axes, path, path, title_of(metric))
    return svg_of(figure)


def _scatter(axes: Axes, points: Sequence[Point]) -> None:
    image = len(points) > MOST_SHAPES
    size = 14 if image else 24
    ended = [(point.x, point.y) for point in points if not point.stopped]
    stopped = [(point.x, point.y) for point in points if point.stopped]
    best = [(point.x, point.y) for point in points if point.best]
    if ended:
        axes.scatter(*zip(*ended, strict=True), s=size, color=BLUE, alpha=0.65, linewidths=0, rasterized=image)
    if stopped:
        axes.scatter(
            *zip(*stopped, strict=True),
            s=size,
            marker="v",
            facecolors="none",
            edgecolors="#888888",
            label="given up before the end",
            rasterized=image,
        )
    if best:
        axes.scatter(*zip(*best, strict=True), s=150, marker="*", color=GREEN, label="best", zorder=4)


def _finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _is_wide(values: Sequence[float]) -> bool:
    return min(values, default=0) > 0 and max(values) >= LOG_RATIO * min(values)


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _label(word: str) -> str:
    """A word as matplotlib is to draw it: `$` begins a formula there, and fonts have no control characters."""
    return "".join(letter if letter.isprintable() else "·" for letter in word).replace("$", r"\$")
