"""One resource as people watch it: phase, progress, figures and what needs attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sae_job.cluster.connection import Found
from sae_job.cluster.tables import NOTHING, conditions, plain

if TYPE_CHECKING:
    from rich.console import RenderableType

_FIGURES = (
    ("explained variance", "explainedVariance", ".4f"),
    ("L0", "l0", ".2f"),
    ("MSE", "mse", ".4g"),
    ("CE-loss score", "ceLossScore", ".4f"),
    ("dead", "deadFraction", ".1%"),
)


def headline(found: Found) -> str:
    """Phase, progress and message on one line."""
    status = found.status
    parts = [found.label, status.get("phase") or "Pending", progress_text(status.get("progress") or {})]
    trials = status.get("trials") or {}
    if trials:
        parts.append(trial_text(trials))
    ready = conditions(found).get("Ready", {})
    parts.append(ready.get("message", ""))
    return plain("  ".join(part for part in parts if part))


def progress_text(progress: Mapping[str, Any]) -> str:
    """`42 %, 420,000 of 1,000,000 tokens, 12,345 tokens/s, 0:01:10 left`; empty without progress."""
    total = progress.get("totalTokens")
    if not total:
        return ""
    tokens = progress.get("tokens") or 0
    parts = [f"{progress.get('percent') or 0} %", f"{tokens:,} of {total:,} tokens"]
    if progress.get("tokensPerSecond"):
        parts.append(f"{progress['tokensPerSecond']:,} tokens/s")
    if progress.get("etaSeconds") and tokens < total:
        minutes, seconds = divmod(int(progress["etaSeconds"]), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    return ", ".join(parts)


def trial_text(trials: Mapping[str, Any]) -> str:
    """`12 of 20 trials finished (1 failed, 2 stopped), 4 running`."""
    ended = {name: trials.get(name) or 0 for name in ("succeeded", "failed", "stopped")}
    extra = ", ".join(f"{ended[name]} {name}" for name in ("failed", "stopped") if ended[name])
    text = f"{sum(ended.values())} of {trials.get('total') or 0} trials finished"
    running = trials.get("running") or 0
    return text + (f" ({extra})" if extra else "") + (f", {running} running" if running else "")


def attention(found: Found) -> Iterator[str]:
    """Conditions that are there only while something needs attention, one line each."""
    for name, condition in conditions(found).items():
        if name not in ("Ready", "Reconciling", "Stalled") and condition.get("status") != "False":
            yield plain(f"{name}: {condition.get('message', '')}")


def figures_of(entries: Sequence[Mapping[str, Any]], *, first: str) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of SAEs or of trials; figures that none has are left out."""
    shown = [figure for figure in _FIGURES if any(entry.get(figure[1]) is not None for entry in entries)]
    rows = []
    for entry in entries:
        figures = [NOTHING if entry.get(field) is None else format(entry[field], form) for _, field, form in shown]
        second = plain(str(entry.get("phase") or entry.get("parameters") or NOTHING))
        rows.append([plain(str(entry.get("name"))), second, *figures])
    second = "phase" if first == "SAE" else "parameters"
    return [first, second, *(heading for heading, *_ in shown)], rows


def render(found: Found) -> RenderableType:
    """The whole picture, for a terminal."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    status = found.status
    parts: list[RenderableType] = [Text(headline(found), style="bold")]
    progress = status.get("progress") or {}
    trials = status.get("trials") or {}
    # A bar ends without a line's end, which the empty text brings.
    if progress.get("totalTokens"):
        bar = ProgressBar(total=progress["totalTokens"], completed=progress.get("tokens") or 0, width=60)
        parts += [bar, Text()]
    elif trials.get("total"):
        ended = sum(trials.get(name) or 0 for name in ("succeeded", "failed", "stopped"))
        parts += [ProgressBar(total=trials["total"], completed=ended, width=60), Text()]
    entries = status.get("saes") or status.get("best") or []
    if entries:
        names, rows = figures_of(entries, first="SAE" if status.get("saes") else "best trial")
        table = Table(box=None, pad_edge=False)
        for number, name in enumerate(names):
            table.add_column(name, justify="left" if number < 2 else "right")
        for cells in rows:
            # Text as it is: brackets in strings would be taken for markup.
            table.add_row(*map(Text, cells))
        parts.append(table)
    parts += [Text(line, style="yellow") for line in attention(found)]
    return Group(*parts)
