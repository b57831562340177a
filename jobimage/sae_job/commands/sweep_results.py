"""What `sae-job run` shows of a sweep: its best trials, how the others ended, and where everything lies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sae_operator.api.steps import ExitCode
from sae_operator.api.sweep_expansion import describe_parameters

if TYPE_CHECKING:
    from rich.console import Console

    from sae_job.reporting.sweep_table import TrialRow
    from sae_job.steps.local_sweep import SweepOutcome

SHOWN_TRIALS = 10
SHOWN_REASONS = 5


def show_sweep(outcome: SweepOutcome, place: str, console: Console) -> None:
    """The table of the best trials.

    Args:
        outcome: of the sweep.
        place: its folder, as people would open it.
    """
    from rich.table import Table

    from sae_job.reporting.sweep_plots import title_of
    from sae_job.reporting.sweep_table import by_rank, counts

    rows = by_rank(outcome.rows)
    ended = ", ".join(f"{number} {phase.lower()}" for phase, number in counts(rows).items() if number)
    metric = outcome.spec.objective.metric
    trials = f"{len(rows)} trial{'' if len(rows) == 1 else 's'}"
    jobs = f"{outcome.jobs} training job{'' if outcome.jobs == 1 else 's'}"
    table = Table(title=f"{outcome.name}: {trials} in {jobs}: {ended}", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("trial", no_wrap=True)
    table.add_column("parameters", overflow="fold", min_width=20)
    best = [row for row in rows if row.rank is not None][:SHOWN_TRIALS]
    known = {key for row in best if row.sae is not None for key in row.sae.figures}
    figures = [key for key in ("explained_variance", "l0", "ce_loss_score") if key != metric and key in known]
    for heading in (title_of(metric), *map(title_of, figures)):
        table.add_column(heading, justify="right")
    for row in best:
        cells = [_figure(row, key) for key in (metric, *figures)]
        table.add_row(str(row.rank), row.name, describe_parameters(_shortened(row.parameters)), *cells)
    if best:
        console.print(table)
    else:
        console.print(f"{table.title}", highlight=False)
    for line in _reasons(rows):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if best and best[0].sae is not None:
        console.print(f"best    {place}/{best[0].folder}/{best[0].sae.name}", soft_wrap=True, highlight=False)
    for name, file in (("table", "trials.json"), ("report", "report.html")):
        console.print(f"{name:<8}{place}/{file}", soft_wrap=True, highlight=False)


def _figure(row: TrialRow, key: str) -> str:
    value = None if row.sae is None else row.sae.figures.get(key)
    return "–" if value is None else f"{value:.2f}" if key == "l0" else f"{value:.4f}"


def _shortened(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by the ends of their paths, where these tell them apart."""
    ends = Counter(path.rpartition(".")[2] for path in parameters)
    return {path if ends[end := path.rpartition(".")[2]] > 1 else end: value for path, value in parameters.items()}


def _reasons(rows: list[TrialRow]) -> list[str]:
    """Why trials did not come to their end: each reason once, with an example."""
    from sae_job.reporting.sweep_table import reasons

    found = reasons(rows)
    lines = [
        f"{row.phase.lower():<8}{number} {'trial' if number == 1 else 'trials'}, e.g. {row.name}: {row.message or ''}"
        for row, number in found[:SHOWN_REASONS]
    ]
    more = len(found) - len(lines)
    return [*lines, f"        and {more} other reasons: see the report"] if more else lines


def exit_code(outcome: SweepOutcome) -> ExitCode:
    """How a run of a sweep ends: with failed trials it is not well done; where a mistake kept all jobs from running,
    that is told as of any job."""
    if outcome.mistakes:
        return ExitCode.INVALID
    return ExitCode.FAILED if any(row.phase in ("Failed", "Unfinished") for row in outcome.rows) else ExitCode.DONE
