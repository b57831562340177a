"""The table of the quality benchmark, made from its results file.

python -m bench.quality_table FILE.json
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.quality_plan import D_SAE, SEEDS, SIDES_OF, K, best_rate, counts, is_matched
from bench.quality_results import Result, Results

NAMES = {
    "ours": "sae-operator",
    "saelens": "sae-lens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
}
FIGURES = ("explained_variance", "ce_loss_score", "dead_fraction", "l0")


def write_table(results: Results, path: Path | None) -> dict[str, float]:
    """Write the table to `path`, or print it when that is None.

    Returns:
        `ARCHITECTURE_FIGURE` of ours, and `ARCHITECTURE_FIGURE_best_peer`: means over seeds on test rows, of the
        shorter training.
    """
    found = list(results.all().values())
    text = (
        "\n".join([*_introduction(results), *_seeds(found), *_longer(found), *_rates(found), *_missing(found)]) + "\n"
    )
    if path is None:
        print(text)
    else:
        path.write_text(text)
    return _figures(found)


def short_tokens(found: Sequence[Result]) -> int:
    return min((result.run.tokens for result in found), default=0)


def final(found: Sequence[Result], side: str, architecture: str, tokens: int) -> list[Result]:
    """A side's runs that are compared: of each seed the one whose L0 is matched."""
    return [
        result
        for result in found
        if (result.run.side, result.run.architecture, result.run.tokens) == (side, architecture, tokens)
        and result.run.seed in SEEDS
        and not result.run.steer
        and is_matched(result)
    ]


def _figures(found: Sequence[Result]) -> dict[str, float]:
    figures: dict[str, float] = {}
    tokens = short_tokens(found)
    for architecture, sides in SIDES_OF.items():
        for name in FIGURES[:3]:
            means = {
                side: statistics.mean(result.test[name] for result in runs)
                for side in sides
                if (runs := final(found, side, architecture, tokens)) and all(name in run.test for run in runs)
            }
            if "ours" in means:
                figures[f"{architecture}_{name}"] = round(means.pop("ours"), 4)
            if means:
                best = min if name == "dead_fraction" else max
                figures[f"{architecture}_{name}_best_peer"] = round(best(means.values()), 4)
    return figures


def _introduction(results: Results) -> list[str]:
    facts = results.facts()
    data, machine = facts.get("data", {}), facts.get("machine", {})
    return [
        "# Quality of SAEs",
        "",
        "Written by `bench/quality.py` from `quality.json`; not edited by hand.",
        "",
        f"{data.get('model')}, {data.get('hook')}, {D_SAE} latents, {K} active per token (found by the penalty's "
        "coefficient, within 5 %, where there is one), float32. All sides train on the same "
        f"{data.get('train_rows'):,} rows in batches of the same size. The learning rate of each is picked on "
        f"{data.get('validation_rows'):,} validation rows with one seed (last table); the seeds of the first tables "
        f"are others, and are evaluated on {data.get('test_rows'):,} test rows of other contexts, cross-entropies on "
        f"{data.get('cross_entropy_tokens'):,} of their tokens. Dead are latents that fire on no test row. Values are "
        "means over seeds ± half the range.",
        "",
        f"Machine: {machine.get('processor')}, {machine.get('cores')} cores, one thread per training. "
        f"PyTorch {data.get('torch')}, Transformers {data.get('transformers')}; peers: "
        f"{', '.join(machine.get('peers', {}).values())}. sae-lens normalises by `expected_average_only_in`, "
        "dictionary_learning by its norm factor, sparsify trains with its default optimiser, signum; "
        "dictionary_learning warms up over a twentieth, and both it and sae-lens let the rate fall over the last "
        "fifth, as their instructions have it. Everything else is each library's default.",
        "",
    ]


def _row(side: str, architecture: str, runs: list[Result]) -> str:
    def spread(of: Callable[[Result], float], digits: int) -> str:
        values = [of(run) for run in runs]
        half = (max(values) - min(values)) / 2
        middle = f"{statistics.mean(values):.{digits}f}"
        return middle if len(values) == 1 else f"{middle} ± {half:.{digits}f}"

    def figure(name: str, digits: int) -> str:
        return spread(lambda run: run.test[name], digits) if all(name in run.test for run in runs) else "–"

    cells = [
        architecture,
        NAMES[side],
        f"{runs[0].run.learning_rate:.2g}",
        *(figure(name, digits) for name, digits in zip(FIGURES, (4, 4, 3, 1), strict=True)),
        spread(lambda run: run.cpu_seconds, 0),
        str(len(runs)),
    ]
    return f"| {' | '.join(cells)} |"


HEADER = [
    "| architecture | library | learning rate | explained variance | CE-loss score | dead | L0 | CPU-s | seeds |",
    "|---|---|---|---|---|---|---|---|---|",
]


def _seeds(found: Sequence[Result]) -> list[str]:
    tokens = short_tokens(found)
    rows = [
        _row(side, architecture, runs)
        for architecture, sides in SIDES_OF.items()
        for side in sides
        if (runs := final(found, side, architecture, tokens))
    ]
    return [f"## After {tokens:,} tokens", "", *HEADER, *rows, ""] if rows else []


def _longer(found: Sequence[Result]) -> list[str]:
    tokens = max((result.run.tokens for result in found), default=0)
    if tokens == short_tokens(found):
        return []
    rows = [
        _row(side, architecture, runs)
        for architecture, sides in SIDES_OF.items()
        for side in sides
        if (runs := final(found, side, architecture, tokens))
    ]
    return [f"## After {tokens:,} tokens, several epochs", "", *HEADER, *rows, ""] if rows else []


def _rates(found: Sequence[Result]) -> list[str]:
    tokens = short_tokens(found)
    lines = [
        "## Learning rates, one seed, validation rows",
        "",
        "The picked rate is bold. Of penalised architectures the search for the coefficient moves it during the run, "
        "for the product by one run after the other (dictionary_learning's JumpReLU aims at a number of active latents "
        "by itself); a rate at which L0 comes nowhere near its target is not picked.",
        "",
        "| architecture | library | rate: explained variance (L0) |",
        "|---|---|---|",
    ]
    for architecture, sides in SIDES_OF.items():
        for side in sides:
            runs = [
                result
                for result in found
                if (result.run.side, result.run.architecture, result.run.tokens) == (side, architecture, tokens)
                and result.run.seed not in SEEDS
            ]
            picked = best_rate(runs)
            cells = [
                _rate_cell(rate, [run for run in runs if run.run.learning_rate == rate], bold=rate == picked)
                for rate in sorted({run.run.learning_rate for run in runs})
            ]
            if cells:
                # A search has at least the library's rate and its neighbours.
                rest = "" if len(cells) >= 3 else "; the search is not finished"
                lines.append(f"| {architecture} | {NAMES[side]} | {'; '.join(cells)}{rest} |")
    return lines


def _rate_cell(rate: float, runs: list[Result], *, bold: bool) -> str:
    counting = [run for run in runs if counts(run)]
    if not counting:
        nearest = min((run.validation["l0"] for run in runs), key=lambda active: abs(active - K))
        return f"{rate:.2g}: L0 at best {nearest:.1f}"
    best = max(counting, key=lambda run: run.validation["explained_variance"])
    told = f"{rate:.2g}"
    return (
        f"{f'**{told}**' if bold else told}: {best.validation['explained_variance']:.4f} ({best.validation['l0']:.1f})"
    )


def _missing(found: Sequence[Result]) -> list[str]:
    """What the table does not tell, so that nobody takes it for more than it is."""
    tokens = short_tokens(found)
    missing = [
        f"{architecture} of {NAMES[side]}"
        for architecture, sides in SIDES_OF.items()
        for side in sides
        if not final(found, side, architecture, tokens)
    ]
    return ["", f"Not trained with the seeds that are compared: {', '.join(missing)}."] if missing else []


if __name__ == "__main__":
    file = Path(sys.argv[1])
    print(write_table(Results(file), file.with_suffix(".md")))
