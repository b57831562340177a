"""The report's plots, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
# Latents that never fired have no logarithm; they are drawn at this value.
NEVER_FIRED = -10.0


def svg_of(figure: Figure) -> str:
    """A figure as text to put into a page."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    # No date in the file, and no ids by chance: the same results give the same report.
    with rc_context({"svg.hashsalt": "sae-job"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", dpi=150)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def line_plot(title: str, series: Series, *, y_label: str, log_y: bool = False, markers: bool = False) -> str:
    """Lines over tokens, one per SAE.

    Args:
        series: name -> (tokens, values).
    """
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    for index, (name, (tokens, values)) in enumerate(series.items()):
        axes.plot(
            tokens,
            values,
            color=COLOURS[index % len(COLOURS)],
            linewidth=1.4,
            marker="o" if markers else None,
            markersize=3.5,
            label=name,
        )
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(y_label)
    if log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    return svg_of(figure)


def density_histogram(log_densities: Mapping[str, Sequence[float]]) -> str:
    """Histogram of log10 firing frequency over latents, one per SAE; latents that never fired stand at the left end."""
    values = {name: [max(value, NEVER_FIRED) for value in densities] for name, densities in log_densities.items()}
    x_label = "log10 of the share of tokens on which a latent fires (-10: never)"
    return _histogram("Feature density", values, x_label=x_label, span=(NEVER_FIRED, 0.0))


def threshold_histogram(thresholds: Mapping[str, Sequence[float]]) -> str:
    """Histogram of latents' thresholds, one per SAE that has one for each latent."""
    everything = [value for values in thresholds.values() for value in values]
    span = (min(everything), max(everything)) if everything else (0.0, 1.0)
    if span[0] == span[1]:
        # All alike, as before the first step.
        span = (span[0] - 0.5, span[1] + 0.5)
    return _histogram("Thresholds", thresholds, x_label="pre-activation from which a latent fires", span=span)


def _histogram(title: str, values: Mapping[str, Sequence[float]], *, x_label: str, span: tuple[float, float]) -> str:
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    for index, (name, of_sae) in enumerate(values.items()):
        axes.hist(
            of_sae,
            bins=60,
            range=span,
            histtype="stepfilled" if len(values) == 1 else "step",
            alpha=0.75,
            color=COLOURS[index % len(COLOURS)],
            label=name,
        )
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel("latents")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(values) > 1:
        axes.legend(frameon=False, fontsize=8)
    return svg_of(figure)
