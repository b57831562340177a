"""report.html: one self-contained page that tells what a training job did and how well."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sae_job.reporting.plots import Series, density_histogram, line_plot, threshold_histogram

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 72rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
p.lead { color: #555; margin-top: .2rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; color: #444; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.2rem; }
.plots svg { width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }
.failed { color: #b00020; } .stopped { color: #8a5a00; }
"""

# Columns of the table of results: key in results.json, heading, format.
_COLUMNS = (
    ("explained_variance", "explained variance", ".4f"),
    ("explained_variance_at_10_percent", "at 10 % of the tokens", ".4f"),
    ("l0", "L0", ".2f"),
    ("mse", "MSE", ".4g"),
    ("ce_loss_score", "CE-loss score", ".4f"),
    ("kl_divergence_score", "KL score", ".4f"),
    ("cossim", "cosine", ".4f"),
    ("l2_ratio", "L2 ratio", ".4f"),
    ("dead_fraction", "dead", ".2%"),
)
# Evaluation metrics that are drawn over tokens, with their plots' titles.
_EVALUATION_PLOTS = (
    ("explained_variance", "Explained variance on held-out activations"),
    ("l0", "L0 on held-out activations"),
    ("ce_loss_score", "CE-loss score"),
    ("kl_divergence_score", "KL-divergence score"),
    ("dead_fraction", "Dead latents"),
)


def _text(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def _results_table(saes: Sequence[Mapping[str, Any]]) -> str:
    columns = [column for column in _COLUMNS if any(sae.get(column[0]) is not None for sae in saes)]
    head = "".join(f"<th>{html.escape(title)}</th>" for _, title, _ in columns)
    rows = []
    for sae in saes:
        phase, name = sae.get("phase"), html.escape(str(sae["name"]))
        if phase in ("Failed", "Stopped"):
            tokens = sae.get("tokens")
            after = "" if tokens is None else f" after {tokens:,} tokens"
            message = html.escape(str(sae.get("message") or ""))
            name = f'<span class="{phase.lower()}">{name}: {phase.lower()}{after}. {message}</span>'
        cells = "".join(f"<td>{_text(sae.get(key), form)}</td>" for key, _, form in columns)
        rows.append(f"<tr><td>{name}</td>{cells}</tr>")
    return f"<table><thead><tr><th>SAE</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _series(lines: Sequence[Mapping[str, Any]], key: str, *, evaluation: bool) -> Series:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        sources = (line.get("evaluation"), line.get("model_evaluation")) if evaluation else (line,)
        source = next((source for source in sources if source and source.get(key) is not None), None)
        if source is None:
            continue
        tokens, values = series.setdefault(str(line["sae"]), ([], []))
        tokens.append(line["tokens"])
        values.append(source[key])
    return series


def _plots(
    metrics: Sequence[Mapping[str, Any]],
    log_densities: Mapping[str, Sequence[float]],
    thresholds: Mapping[str, Sequence[float]],
) -> list[str]:
    plots = []
    if loss := _series(metrics, "loss", evaluation=False):
        plots.append(line_plot("Training loss", loss, y_label="loss", log_y=True))
    for key, title in _EVALUATION_PLOTS:
        if series := _series(metrics, key, evaluation=True):
            plots.append(line_plot(title, series, y_label=key, markers=True))
    if coefficients := _series(metrics, "coefficient", evaluation=False):
        plots.append(line_plot("Weight of the sparsity penalty", coefficients, y_label="coefficient"))
    if rates := _series(metrics, "learning_rate", evaluation=False):
        plots.append(line_plot("Learning rate", rates, y_label="learning rate"))
    if log_densities:
        plots.append(density_histogram(log_densities))
    if thresholds:
        plots.append(threshold_histogram(thresholds))
    return plots


def render_report(
    results: dict[str, Any],
    metrics: list[dict[str, Any]],
    log_densities: dict[str, list[float]],
    spec: dict[str, Any],
    thresholds: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """The page as HTML.

    Args:
        results: content of results.json.
        metrics: lines of metrics.jsonl.
        log_densities: SAE name -> log10 firing frequency of each latent.
        spec: the job's spec as in the manifest.
        thresholds: SAE name -> threshold of each latent, of those that have one each.
    """
    name = html.escape(str(results.get("name") or "training job"))
    rate = results.get("tokens_per_second")
    summary = f"{results['tokens']:,} tokens" + (f", {rate:,.0f} tokens/s" if rate else "")
    number = len(results["saes"])
    count = f"{number} sparse autoencoder{'' if number == 1 else 's'}"
    plots = "".join(f"<figure>{plot}</figure>" for plot in _plots(metrics, log_densities, thresholds or {}))
    configuration = html.escape(json.dumps(spec, indent=2, ensure_ascii=False))
    provenance = html.escape(json.dumps(results.get("provenance", {}), indent=2, ensure_ascii=False))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{STYLE}</style></head><body>"
        f'<h1>{name}</h1><p class="lead">{count}, {summary}</p>'
        f"<h2>Results on held-out activations</h2>{_results_table(results['saes'])}"
        f'<h2>Curves</h2><div class="plots">{plots}</div>'
        f"<h2>Configuration</h2><pre>{configuration}</pre><h2>Provenance</h2><pre>{provenance}</pre></body></html>\n"
    )
