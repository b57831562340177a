"""The table of the training benchmark, made from its results file.

python -m bench.training_table FILE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.machine import only_one_at

NAMES = {"saelens": "sae-lens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}
DENSITIES = {"k": "k", "initial": "half of the latents", "trained": "60"}
KEYS = ("shape", "architecture", "density")


def add_results(path: Path, machine: dict[str, object], entry: dict[str, Any]) -> None:
    """Add figures to the file, in place of earlier ones of the same case, and write the table."""
    with only_one_at(path.parent):
        content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cases": []}
        kept = [case for case in content["cases"] if any(case[key] != entry[key] for key in KEYS)]
        cases = ",\n  ".join(json.dumps(case) for case in [*kept, entry])
        path.write_text(f'{{\n "machine": {json.dumps(machine)},\n "cases": [\n  {cases}\n ]\n}}\n')
        write_table(path)


def write_table(path: Path) -> None:
    content = json.loads(path.read_text())
    machine = content["machine"]
    peers = ", ".join(machine["peers"].values())
    lines = [
        "# Speed of training on a CPU",
        "",
        f"Written by `bench/training.py --out` from `{path.name}`; not edited by hand.",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, which other work shared. Python "
        f"{machine['python']}, PyTorch {machine['torch']}; peers: {peers}.",
        "",
        "CPU seconds of one step (batch 4,096, k 32, Adam, float32, one thread), median of turns that the sides take "
        "one after the other; in brackets the side's seconds over ours. The bound is the encoder's product and fused "
        "Adam on both weight matrices: nothing computes less. Loss and gradients of the first batch agree within "
        "1e-3, but for what a library defines otherwise, which the script tells. *Active* is what the weights "
        "begin with: for architectures with a penalty a training begins with about half of the latents and ends with "
        "few. While half are active, sparsity saves nothing: a step is its dense products (five for a standard SAE, "
        "where tracing takes a sixth). *Tuned malloc*: both sides keep freed memory "
        "(`MALLOC_TOP_PAD_`, `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_` at 4 GiB).",
        "",
        "| shape | architecture | active | ours | × bound | sparsify | sae-lens | dictionary_learning | turns |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cases = sorted(content["cases"], key=_order)
    for case in cases:
        lines.append(_speed_row(case, case["cpu_seconds"], ""))
        if case["cpu_seconds_tuned_malloc"]:
            lines.append(_speed_row(case, case["cpu_seconds_tuned_malloc"], ", tuned malloc"))
    lines += [
        "",
        "Memory in MiB at its highest, beside the libraries and the batches: weights, optimiser and one step.",
        "",
        "| shape | architecture | active | ours | sparsify | sae-lens | dictionary_learning |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        cells = [f"{case['peak_mib'][side]:.0f}" if side in case["peak_mib"] else "–" for side in _SIDES]
        lines.append(f"| {' | '.join([*_what(case), *cells])} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


_SIDES = ("ours", "sparsify", "saelens", "dictionary_learning")
_ARCHITECTURES = ("topk", "batchtopk", "matryoshka_batchtopk", "standard", "gated", "jumprelu")


def _order(case: dict[str, Any]) -> tuple[int, ...]:
    d_in, d_sae = (int(size) for size in case["shape"].split("x"))
    return d_in * d_sae, d_in, _ARCHITECTURES.index(case["architecture"]), list(DENSITIES).index(case["density"])


def _what(case: dict[str, Any]) -> list[str]:
    return [case["shape"].replace("x", " × "), case["architecture"], DENSITIES[case["density"]]]


def _speed_row(case: dict[str, Any], seconds: dict[str, float], suffix: str) -> str:
    ours = seconds["ours"]
    shape, architecture, density = _what(case)
    bound = f"{ours / seconds['bound']:.2f}" if "bound" in seconds else "–"
    cells = [f"{seconds[side]:.3f} ({seconds[side] / ours:.2f})" if side in seconds else "–" for side in _SIDES[1:]]
    turns = f"{case['rounds']} × {case['steps']}"
    return f"| {' | '.join([shape, architecture + suffix, density, f'{ours:.3f}', bound, *cells, turns])} |"


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
