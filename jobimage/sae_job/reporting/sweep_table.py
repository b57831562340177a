"""The table of a sweep: what each trial came to, which is the best, and which no other beats in both of two figures.

Pure functions: results in, rows out. An operator that sees the jobs' statuses alone comes to the same best trial.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sae_operator.api.sweep import Objective
from sae_operator.api.sweep_expansion import trial_of

Phase = Literal["Succeeded", "Stopped", "Failed", "Unfinished"]
PHASES: tuple[Phase, ...] = ("Succeeded", "Stopped", "Failed", "Unfinished")
# Figures of an SAE, by their keys in results.json.
FIGURES = (
    "explained_variance",
    "l0",
    "mse",
    "ce_loss_score",
    "kl_divergence_score",
    "dead_fraction",
    "cossim",
    "l2_ratio",
    "explained_variance_at_10_percent",
    "loss",
)
FACTS = ("hook", "target_hook", "architecture", "d_in", "d_sae", "tokens")
# Numbers, and names of trials.
_VARYING = re.compile(r"t-[0-9a-f]{10}|\d+(\.\d+)?(e[+-]?\d+)?")
# What an SAE's active latents buy; the first is the one that every sweep has.
GAINS = ("explained_variance", "ce_loss_score")
NO_RESULTS = "its training job has left no results"
NOT_STARTED = "its training job has not been started"


@dataclass(frozen=True)
class SaeRow:
    """One SAE of a trial.

    Attributes:
        phase: how its training ended.
        figures: by the names of `FIGURES`; only what is known and finite.
        facts: by the names of `FACTS`.
        fronts: gains of `GAINS` in whose Pareto front it is.
    """

    name: str
    phase: Phase
    message: str | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    fronts: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        parameters: value by path.
        job: its training job; None while there is none.
        folder: of that job, below the sweep's output.
        saes: as far as results tell of them.
        sae: its best SAE, by the objective; None where none of them can be the best of the sweep.
        objective: that SAE's figure.
        rank: from 1, of the trials that have one.
    """

    name: str
    parameters: Mapping[str, Any]
    phase: Phase
    message: str | None = None
    job: str | None = None
    folder: str | None = None
    saes: tuple[SaeRow, ...] = ()
    sae: SaeRow | None = None
    objective: float | None = None
    rank: int | None = None

    @property
    def shown(self) -> SaeRow | None:
        """The SAE that stands for the trial: the best one, or the first of those that were not."""
        return self.sae or (self.saes[0] if self.saes else None)

    def is_on_front(self, gain: str) -> bool:
        return any(gain in sae.fronts for sae in self.saes)


@dataclass(frozen=True)
class JobResults:
    """What a training job left.

    Attributes:
        name: of the job.
        folder: below the sweep's output.
        trials: names of its trials.
        message: why it failed, where it did.
        results: content of results.json; None where it is not there.
    """

    name: str
    folder: str
    trials: Sequence[str]
    message: str | None = None
    results: Mapping[str, Any] | None = None


def table(
    trials: Iterable[tuple[str, Mapping[str, Any]]], jobs: Sequence[JobResults], objective: Objective
) -> list[TrialRow]:
    """The rows, in the order of the trials.

    Args:
        trials: name and parameters of each.
        jobs: those that train them, and perhaps others; of two with the same trial the first by name counts.
    """
    of_trial: dict[str, JobResults] = {}
    for job in sorted(jobs, key=lambda job: job.name):
        for name in job.trials:
            of_trial.setdefault(name, job)
    rows = [_row(name, parameters, of_trial.get(name)) for name, parameters in trials]
    for gain in GAINS:
        rows = _with_front(rows, gain)
    return _ranked([_with_best_sae(row, objective) for row in rows], objective)


def _row(name: str, parameters: Mapping[str, Any], job: JobResults | None) -> TrialRow:
    if job is None:
        return TrialRow(name, parameters, "Unfinished", NOT_STARTED)
    told = [] if job.results is None else job.results.get("saes") or []
    saes = tuple(_sae(sae) for sae in told if trial_of(str(sae.get("name", ""))) == name)
    phase, message = _phase(job, saes)
    return TrialRow(name, parameters, phase, message, job.name, job.folder, saes)


def _phase(job: JobResults, saes: Sequence[SaeRow]) -> tuple[Phase, str | None]:
    """How a trial stands, and why: as the operator tells it of the job's status."""
    if job.message is not None:
        return "Failed", job.message
    if not saes:
        return "Unfinished", NO_RESULTS
    messages = [sae.message for sae in saes if sae.message]
    message = messages[0] if messages else None
    phases = {sae.phase for sae in saes}
    if phases <= {"Failed", "Stopped"}:
        return ("Stopped" if "Stopped" in phases else "Failed"), message
    return "Succeeded", message


def _sae(told: Mapping[str, Any]) -> SaeRow:
    figures = {name: value for name in FIGURES if (value := _number(told.get(name))) is not None}
    facts = {name: told[name] for name in FACTS if told.get(name) is not None}
    phase: Phase = told["phase"] if told.get("phase") in ("Failed", "Stopped") else "Succeeded"
    return SaeRow(str(told["name"]), phase, told.get("message"), figures, facts)


def _number(value: Any) -> float | None:
    """A figure that is known and finite."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _with_best_sae(row: TrialRow, objective: Objective) -> TrialRow:
    if row.phase != "Succeeded":
        return row
    able = [sae for sae in row.saes if sae.phase == "Succeeded" and can_be_best(sae.figures, objective)]
    if not able:
        return row
    # The first of several that are as good.
    best = min(able, key=lambda sae: _order(sae.figures[objective.metric], objective))
    return replace(row, sae=best, objective=best.figures[objective.metric])


def can_be_best(figures: Mapping[str, float], objective: Objective) -> bool:
    """Whether there is a figure to rank by, and the SAE is as sparse as asked for."""
    if objective.metric not in figures:
        return False
    return objective.l0_at_most is None or figures.get("l0", math.inf) <= objective.l0_at_most


def _order(figure: float, objective: Objective) -> float:
    return -figure if objective.goal == "maximize" else figure


def _ranked(rows: Sequence[TrialRow], objective: Objective) -> list[TrialRow]:
    """Rows with ranks; of trials that are as good, the first in the space is the better one."""
    able = [(row.objective, position) for position, row in enumerate(rows) if row.objective is not None]
    ordered = sorted(able, key=lambda item: (_order(item[0], objective), item[1]))
    ranks = {position: rank for rank, (_, position) in enumerate(ordered, 1)}
    return [replace(row, rank=ranks.get(position)) for position, row in enumerate(rows)]


def _with_front(rows: Sequence[TrialRow], gain: str) -> list[TrialRow]:
    """Rows whose SAEs know whether they are in the Pareto front of L0 against a gain."""
    points = {
        (row.name, sae.name): (sae.figures["l0"], sae.figures[gain])
        for row in rows
        if row.phase == "Succeeded"
        for sae in row.saes
        if sae.phase == "Succeeded" and {"l0", gain} <= sae.figures.keys()
    }
    names = list(points)
    front = {names[i] for i in pareto_front(list(points.values()))}
    return [
        replace(
            row,
            saes=tuple(
                replace(sae, fronts=(*sae.fronts, gain)) if (row.name, sae.name) in front else sae for sae in row.saes
            ),
        )
        for row in rows
    ]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points that no other beats, from the lowest cost to the highest: none of them costs at most as
    much and gives at least as much, and more of one. Points that are the same are all in it.

    Args:
        points: cost (the less the better) and gain (the more the better).
    """
    ordered = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    front: list[int] = []
    most = -math.inf
    for i in ordered:
        if points[i][1] > most or (front and points[i] == points[front[-1]]):
            front.append(i)
            most = points[i][1]
    return front


def best_of(rows: Iterable[TrialRow]) -> TrialRow | None:
    """The best trial."""
    return next((row for row in rows if row.rank == 1), None)


def counts(rows: Sequence[TrialRow]) -> dict[str, int]:
    """Number of trials by phase."""
    return {phase: sum(row.phase == phase for row in rows) for phase in PHASES}


def reasons(rows: Iterable[TrialRow]) -> list[tuple[TrialRow, int]]:
    """Why trials did not come to their end, the most frequent reason first: one trial as an example, and how many there
    are like it. Messages that differ only in numbers and names of trials are one reason."""
    alike: dict[tuple[Phase, str], list[TrialRow]] = {}
    for row in rows:
        if row.phase != "Succeeded":
            alike.setdefault((row.phase, _VARYING.sub("#", row.message or "")), []).append(row)
    return sorted(((found[0], len(found)) for found in alike.values()), key=lambda item: -item[1])


def by_rank(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """The best first; then those without a rank, by how they ended, in the order of the space."""
    return sorted(rows, key=lambda row: (row.rank is None, row.rank or 0, PHASES.index(row.phase)))


def document(
    name: str, namespace: str, uri: str, objective: Objective, rows: Sequence[TrialRow], jobs: Sequence[JobResults]
) -> dict[str, Any]:
    """Content of trials.json.

    Args:
        uri: the sweep's folder.
    """
    best = best_of(rows)
    return {
        "name": name,
        "namespace": namespace,
        "objective": objective.to_manifest(),
        "counts": {"total": len(rows)} | {phase.lower(): number for phase, number in counts(rows).items()},
        "best": None if best is None else best.name,
        "pareto_front": {gain: [row.name for row in rows if row.is_on_front(gain)] for gain in GAINS},
        "trials": [_trial_document(row, uri) for row in rows],
        "jobs": [
            {"name": job.name, "folder": job.folder, "trials": list(job.trials), "message": job.message} for job in jobs
        ],
    }


def _trial_document(row: TrialRow, uri: str) -> dict[str, Any]:
    shown = row.shown
    return {
        "name": row.name,
        "parameters": dict(row.parameters),
        "phase": row.phase,
        "message": row.message,
        "job": row.job,
        "rank": row.rank,
        "best": row.rank == 1,
        "pareto_front": row.is_on_front(GAINS[0]),
        "objective": row.objective,
        "sae": None if shown is None else shown.name,
        **{name: None if shown is None else shown.figures.get(name) for name in FIGURES},
        "saes": [
            {
                "name": sae.name,
                "uri": None if sae.phase == "Failed" else f"{uri}/{row.folder}/{sae.name}",
                "phase": sae.phase,
                "message": sae.message,
                "pareto_front": list(sae.fronts),
                **sae.facts,
                **{name: sae.figures.get(name) for name in FIGURES},
            }
            for sae in row.saes
        ],
    }
