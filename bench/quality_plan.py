"""Which runs the quality benchmark does: each is chosen from what earlier ones came to, by the same rules for every
side."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable

from bench.quality_results import Result, Run
from bench.sides.setting import PENALIZED

D_SAE, K = 4608, 32
SIDES_OF = {
    "topk": ("ours", "sparsify", "saelens", "dictionary_learning"),
    "jumprelu": ("ours", "saelens", "dictionary_learning"),
    "batchtopk": ("ours", "saelens", "dictionary_learning"),
    "standard": ("ours", "saelens", "dictionary_learning"),
}
# Rates are tried a factor apart around the library's default, and further while the best is the outermost.
RATE_FACTOR, MOST_EXTENSIONS = 3.0, 2
SWEEP_SEED, SEEDS = 0, (1, 2, 3)
# Active latents count as matched within this much of the target. A run whose coefficient was moved until its last
# fifth, or whose library aims at a number of active latents, ends only near it, which is enough to choose a rate by.
L0_TOLERANCE, NEAR_TOLERANCE = 0.05, 0.25
MOST_MATCHING_RUNS = 5
# Two runs that both end so many times above or below the target show that its rate does not get there.
HOPELESS = 8.0
# Where searches for the coefficient begin.
FIRST_COEFFICIENTS = {
    ("ours", "standard"): 5.0,
    ("saelens", "standard"): 5.0,
    ("dictionary_learning", "standard"): 0.2,
    ("ours", "jumprelu"): 1.0,
    ("saelens", "jumprelu"): 1.0,
    # The wanted number of active latents over the one that it is told to aim at.
    ("dictionary_learning", "jumprelu"): 1.0,
}
AIMS_AT_L0 = {("dictionary_learning", "jumprelu")}
# log L0 falls by about this much per log of the coefficient; what is measured replaces it.
FIRST_SLOPE = -1.0

Plan = Generator[Run, Result, None]


def needs_coefficient(side: str, architecture: str) -> bool:
    """Whether a weight must be found for which as many latents are active as are wanted."""
    return (side, architecture) in FIRST_COEFFICIENTS


def can_steer(side: str, architecture: str) -> bool:
    """Whether a side's coefficient can be moved during a training: ours is part of the spec, and sae-lens's JumpReLU
    thresholds follow so slowly that it would run away."""
    return side != "ours" and (side, architecture) != ("saelens", "jumprelu")


def default_rate(side: str, architecture: str, *, ours: float) -> float:
    """Learning rate that a library takes when it is told none; the product's, `ours`, follows batch and steps."""
    if side == "ours":
        return ours
    if side == "saelens":
        return 3e-4
    by_width = math.sqrt(2**14 / D_SAE)
    if side == "sparsify":
        return 5e-3 * by_width
    return {"standard": 1e-3, "gated": 5e-5, "jumprelu": 7e-5}.get(architecture, 2e-4 * by_width)


def rounded(value: float) -> float:
    """Three digits: a run is found again by its numbers."""
    return float(f"{value:.3g}")


def of_side(results: Iterable[Result], run: Run, *, seed: int) -> list[Result]:
    """Results of the same side, architecture and length."""
    return [
        result
        for result in results
        if (result.run.side, result.run.architecture, result.run.tokens, result.run.batch, result.run.seed)
        == (run.side, run.architecture, run.tokens, run.batch, seed)
    ]


def is_matched(result: Result) -> bool:
    return result.run.architecture not in PENALIZED or abs(result.validation["l0"] / K - 1) <= L0_TOLERANCE


def counts(result: Result) -> bool:
    """Whether a result may choose a rate: with more latents active anything explains more."""
    if result.run.steer or (result.run.side, result.run.architecture) in AIMS_AT_L0:
        return abs(result.validation["l0"] / K - 1) <= NEAR_TOLERANCE
    return is_matched(result)


def _worth(result: Result) -> tuple[bool, float]:
    """Orders the results of rates: by explained variance, behind them by how near L0 is to the wanted number."""
    return (True, result.validation["explained_variance"]) if counts(result) else (False, -_distance(result))


def _distance(result: Result) -> float:
    """Of L0 from its target, in logarithms."""
    return abs(math.log(max(result.validation["l0"], 1e-3) / K))


def best_rate(results: Iterable[Result]) -> float | None:
    """Rate of the highest explained variance on validation rows, of runs of the seed that rates are picked with."""
    swept = [result for result in results if result.run.seed == SWEEP_SEED and counts(result)]
    if not swept:
        return None
    return max(swept, key=lambda result: result.validation["explained_variance"]).run.learning_rate


def sweep(base: Run, default: float) -> Plan:
    """Try learning rates with one seed.

    Args:
        base: a run of the side; its rate and coefficient do not matter.
        default: the library's rate.
    """
    rates = [rounded(default * RATE_FACTOR**power) for power in (0, 1, -1)]
    found: dict[float, tuple[bool, float]] = {}
    coefficient: float | None = None
    extensions = 0
    while rates:
        rate = rates.pop(0)
        run = _with(base, rate, SWEEP_SEED)
        if not needs_coefficient(run.side, run.architecture):
            result = yield run
        elif (run.side, run.architecture) in AIMS_AT_L0:
            result = yield _with(run, rate, SWEEP_SEED, coefficient=FIRST_COEFFICIENTS[run.side, run.architecture])
        elif can_steer(run.side, run.architecture):
            start = coefficient or FIRST_COEFFICIENTS[run.side, run.architecture]
            result = yield _with(run, rate, SWEEP_SEED, coefficient=rounded(start), steer=True)
            coefficient = result.coefficient if counts(result) else coefficient
        else:
            result = yield from match(run, coefficient)
            coefficient = result.run.coefficient if counts(result) else coefficient
        found[rate] = _worth(result)
        best = max(found, key=lambda rate: found[rate])
        if not rates and extensions < MOST_EXTENSIONS and best in (min(found), max(found)):
            extensions += 1
            rates.append(rounded(best * (RATE_FACTOR if best == max(found) else 1 / RATE_FACTOR)))


def match(base: Run, coefficient: float | None) -> Generator[Run, Result, Result]:
    """Train with one coefficient after the other until L0 is matched; returns the run that came nearest.

    Args:
        base: the run, but for its coefficient.
        coefficient: where to begin.
    """
    tried: list[tuple[float, Result]] = []
    following = rounded(coefficient or FIRST_COEFFICIENTS[base.side, base.architecture])
    while True:
        result = yield _with(base, base.learning_rate, base.seed, coefficient=following)
        tried.append((following, result))
        hopeless = len(tried) == 2 and all(_distance(one) > math.log(HOPELESS) for _, one in tried)
        if is_matched(result) or hopeless or len(tried) == MOST_MATCHING_RUNS:
            return min((one for _, one in tried), key=_distance)
        following = rounded(_next_coefficient([(value, one.validation["l0"]) for value, one in tried]))


def _next_coefficient(tried: list[tuple[float, float]]) -> float:
    """From pairs of coefficient and L0: along the line through the last two in logarithms."""
    value, active = tried[-1]
    slope = FIRST_SLOPE
    if len(tried) > 1:
        before, active_before = tried[-2]
        measured = math.log(max(active, 1e-3) / max(active_before, 1e-3)) / math.log(value / before)
        slope = max(-4.0, min(-0.3, measured))
    step = math.log(K / max(active, 1e-3)) / slope
    return value * math.exp(max(-1.5, min(1.5, step)))


def repeat(base: Run, rate: float, coefficient: float | None) -> Plan:
    """Train with the seeds that are compared."""
    for seed in SEEDS:
        run = _with(base, rate, seed)
        if needs_coefficient(run.side, run.architecture):
            result = yield from match(run, coefficient)
            coefficient = result.run.coefficient
        else:
            yield run


def lengthen(base: Run, rate: float, coefficient: float | None, seed: int) -> Plan:
    """Train once for longer."""
    run = _with(base, rounded(rate), seed)
    if needs_coefficient(run.side, run.architecture):
        yield from match(run, coefficient)
    else:
        yield run


def _with(base: Run, rate: float, seed: int, *, coefficient: float | None = None, steer: bool = False) -> Run:
    return Run(base.side, base.architecture, base.tokens, base.batch, rate, coefficient, seed, steer)
