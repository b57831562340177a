"""report.html of a sweep: one self-contained page about all of its trials, of one as of thousands."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sae_job.reporting.report import STYLE
from sae_job.reporting.sweep_plots import parameter_plot, parameter_points, pareto_plot, pareto_points, title_of
from sae_job.reporting.sweep_table import GAINS, SaeRow, TrialRow, best_of, by_rank, counts, reasons
from sae_operator.api.sweep import Objective
from sae_operator.api.sweep_expansion import describe_parameters

# Columns of the table of trials: key of the figure, heading, format.
_COLUMNS = (
    ("explained_variance", "explained variance", ".4f"),
    ("l0", "L0", ".2f"),
    ("mse", "MSE", ".4g"),
    ("ce_loss_score", "CE-loss score", ".4f"),
    ("kl_divergence_score", "KL score", ".4f"),
    ("dead_fraction", "dead", ".2%"),
)
# Different reasons that are told of trials that did not end well.
_MOST_REASONS = 20
_STYLE = """
table.trials th { cursor: pointer; white-space: nowrap; position: sticky; top: 0; background: #fff; }
table.trials th[aria-sort=ascending]::after { content: " ▲"; }
table.trials th[aria-sort=descending]::after { content: " ▼"; }
table.trials td { vertical-align: top; white-space: nowrap; }
table.trials td.text { text-align: left; white-space: normal; }
tr.best { background: #e8f5ee; } tr.front td:first-child { border-left: 3px solid #D55E00; padding-left: .4rem; }
.scroll { overflow-x: auto; } .note { color: #555; }
"""
# Sorts by a click on a heading. Cells hold what they are sorted by; empty ones stay behind.
_SCRIPT = """
document.querySelectorAll("table.trials").forEach(function (table) {
  var body = table.tBodies[0];
  table.querySelectorAll("th").forEach(function (head, column) {
    head.addEventListener("click", function () {
      var up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      var rows = Array.prototype.slice.call(body.rows).map(function (row) {
        var key = row.cells[column].getAttribute("data-key");
        var number = Number(key);
        return { row: row, empty: key === "", key: key !== "" && !isNaN(number) ? number : key };
      });
      rows.sort(function (a, b) {
        if (a.empty || b.empty) { return a.empty - b.empty; }
        if (typeof a.key !== typeof b.key) { return typeof a.key === "number" ? -1 : 1; }
        var order = a.key < b.key ? -1 : a.key > b.key ? 1 : 0;
        return up ? order : -order;
      });
      rows.forEach(function (entry) { body.appendChild(entry.row); });
    });
  });
});
"""


def render_sweep_report(
    name: str, objective: Objective, rows: Sequence[TrialRow], spec: Mapping[str, Any], *, jobs: int
) -> str:
    """The page as HTML; the same rows give the same page.

    Args:
        name: of the sweep.
        rows: as `sweep_table.table` gives them.
        spec: as in the manifest.
        jobs: number of training jobs.
    """
    title = html.escape(name)
    parts = [
        f'<h1>{title}</h1><p class="lead">{_summary(rows, jobs)}</p>',
        f"<h2>Best trial</h2>{_best(rows, objective)}",
        _section("Reconstruction against sparsity", _pareto(rows)),
        _section("Parameters", _parameters(rows, objective)),
        _section("Trials that did not come to their end", _reasons(rows)),
        f"<h2>All trials</h2>{_table(rows)}",
        f"<h2>Configuration</h2><pre>{html.escape(json.dumps(spec, indent=2, ensure_ascii=False))}</pre>",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}{_STYLE}</style></head><body>{''.join(parts)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>{content}" if content else ""


def _number(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _summary(rows: Sequence[TrialRow], jobs: int) -> str:
    found = [f"{number:,} {phase.lower()}" for phase, number in counts(rows).items() if number]
    return f"{_number(len(rows), 'trial')} in {_number(jobs, 'training job')}: {', '.join(found) or 'none'}"


def _best(rows: Sequence[TrialRow], objective: Objective) -> str:
    bound = "" if objective.l0_at_most is None else f" with an L0 of at most {objective.l0_at_most:g}"
    best = best_of(rows)
    if best is None or best.sae is None:
        return f'<p class="failed">No trial has come to its end{bound} and has {title_of(objective.metric)}.</p>'
    goal = "highest" if objective.goal == "maximize" else "lowest"
    figures = ", ".join(
        f"{heading} {best.sae.figures[key]:{form}}" for key, heading, form in _COLUMNS if key in best.sae.figures
    )
    return (
        f"<p><strong>{html.escape(best.name)}</strong>: {html.escape(describe_parameters(best.parameters))}</p>"
        f"<p>{figures}</p>"
        f'<p class="note">The {goal} {title_of(objective.metric)}{bound} of {_number(_ranked(rows), "trial")}. '
        f"{_link(best, 'Report of its training job')}; SAE: "
        f"<code>{html.escape(f'{best.folder}/{best.sae.name}')}</code> beside this page.</p>"
    )


def _ranked(rows: Sequence[TrialRow]) -> int:
    return sum(row.rank is not None for row in rows)


def _link(row: TrialRow, text: str) -> str:
    return f'<a href="{html.escape(str(row.folder), quote=True)}/report.html">{html.escape(text)}</a>'


def _figures(plots: Sequence[str]) -> str:
    drawn = "".join(f"<figure>{plot}</figure>" for plot in plots)
    return f'<div class="plots">{drawn}</div>' if drawn else ""


def _pareto(rows: Sequence[TrialRow]) -> str:
    points = {gain: pareto_points(rows, gain) for gain in GAINS}
    plots = [pareto_plot(found, gain) for gain, found in points.items() if found]
    missing = sum(not row.saes or row.phase in ("Failed", "Unfinished") for row in rows)
    note = f'<p class="note">{_number(missing, "trial")} without figures: not drawn.</p>' if missing and plots else ""
    return _figures(plots) + note


def _parameters(rows: Sequence[TrialRow], objective: Objective) -> str:
    paths = dict.fromkeys(path for row in rows for path in row.parameters)
    plots = (parameter_plot(parameter_points(rows, path, objective.metric), path, objective.metric) for path in paths)
    return _figures([plot for plot in plots if plot is not None])


def _reasons(rows: Sequence[TrialRow]) -> str:
    """Why trials failed, were given up or are not there, each reason once."""
    found = reasons(rows)
    shown: list[str] = []
    for row, number in found[:_MOST_REASONS]:
        example = html.escape(f"{row.name} ({describe_parameters(row.parameters)}): {row.message or ''}")
        shown.append(f'<li class="{row.phase.lower()}">{row.phase}, {_number(number, "trial")}, e.g. {example}</li>')
    more = len(found) - len(shown)
    rest = f'<p class="note">{_number(more, "other reason")}: see the table.</p>' if more else ""
    return f"<ul>{''.join(shown)}</ul>{rest}" if shown else ""


def _table(rows: Sequence[TrialRow]) -> str:
    paths = list(dict.fromkeys(path for row in rows for path in row.parameters))
    columns = [column for column in _COLUMNS if any(_shown(row, column[0]) is not None for row in rows)]
    headings = ["rank", "trial", *paths, *(heading for _, heading, _ in columns), "phase", "message"]
    head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in headings)
    body = "".join(_table_row(row, paths, columns) for row in by_rank(rows))
    return (
        '<p class="note">A click on a heading sorts. The green row is the best trial; rows with a bar are in the '
        'Pareto front of L0 and explained variance. <a href="trials.json">trials.json</a> holds the same, and every '
        "SAE of each trial.</p>"
        f'<div class="scroll"><table class="trials"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _shown(row: TrialRow, key: str) -> float | None:
    shown: SaeRow | None = row.shown
    return None if shown is None else shown.figures.get(key)


def _table_row(row: TrialRow, paths: Sequence[str], columns: Sequence[tuple[str, str, str]]) -> str:
    classes = [name for name, holds in (("best", row.rank == 1), ("front", row.is_on_front(GAINS[0]))) if holds]
    name = _link(row, row.name) if row.saes else html.escape(row.name)
    cells = [_cell(row.rank, "–" if row.rank is None else str(row.rank)), _cell(row.name, name)]
    cells += [_cell(row.parameters.get(path), html.escape(_value(row.parameters.get(path)))) for path in paths]
    for key, _, form in columns:
        value = _shown(row, key)
        cells.append(_cell(value, "–" if value is None else format(value, form)))
    phase = f'<span class="{row.phase.lower()}">{row.phase}</span>'
    cells += [_cell(row.phase, phase), _cell(row.message, html.escape(row.message or ""), kind="text")]
    kinds = f' class="{" ".join(classes)}"' if classes else ""
    return f"<tr{kinds}>{''.join(cells)}</tr>"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cell(key: Any, content: str, *, kind: str = "") -> str:
    """A cell with what it is sorted by."""
    sorted_by = "" if key is None else html.escape(_value(key), quote=True)
    kinds = f' class="{kind}"' if kind else ""
    return f'<td data-key="{sorted_by}"{kinds}>{content}</td>'
