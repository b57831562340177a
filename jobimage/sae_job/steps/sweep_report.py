"""The step `report`: what a sweep's trials came to, as a table and as a page, beside the folders of its jobs."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from sae_job.errors import InvalidInput
from sae_job.reporting.sweep_report import render_sweep_report
from sae_job.reporting.sweep_table import JobResults, TrialRow, best_of, counts, document, table
from sae_job.steps.context import StepContext
from sae_job.steps.sweep_folder import REPORT_KEY, TABLE_KEY, claim_folder, read_results
from sae_job.storage.base import ObjectStore
from sae_operator.api.steps import CacheStep, ExitCode, StepResult, SweepStep, TrainStep
from sae_operator.api.sweep_expansion import SweepInvalid, Trial, describe_parameters, expand

logger = logging.getLogger(__name__)


def run_report(step: SweepStep | TrainStep | CacheStep, context: StepContext) -> StepResult:
    """Write trials.json and report.html of a sweep. Done again on the same results, it writes the same.

    Trials without results are in both, with what is known of them.

    Raises:
        InvalidInput: the folder is something else's.
        Stopped: asked to stop; nothing is written.
        StoreError: the store failed.
    """
    if not isinstance(step, SweepStep):
        raise TypeError(f"the report step is given a {type(step).__name__}")
    try:
        trials = expand(step.spec)
    except SweepInvalid as error:
        first = error.problems[0]
        raise InvalidInput("SweepInvalid", first.message, field=first.field) from error
    store = context.open_store(step.output)
    claim_folder(store, step.namespace, step.name)
    jobs = read_results(store, step.jobs, context.should_stop)
    rows = write_report(store, step, trials, jobs)
    return StepResult(step="report", exit_code=ExitCode.DONE, reason="Completed", message=_told(rows))


def write_report(
    store: ObjectStore, step: SweepStep, trials: Sequence[Trial], jobs: Sequence[JobResults]
) -> list[TrialRow]:
    """Write table and page; returns the table's rows. The table comes last: it tells that both are there."""
    objective = step.spec.objective
    rows = table([(trial.name, trial.parameters) for trial in trials], jobs, objective)
    page = render_sweep_report(step.name, objective, rows, step.spec.to_manifest(), jobs=len(jobs))
    store.put(REPORT_KEY, page.encode())
    store.put(TABLE_KEY, table_bytes(store, step, rows, jobs))
    return rows


def table_bytes(store: ObjectStore, step: SweepStep, rows: Sequence[TrialRow], jobs: Sequence[JobResults]) -> bytes:
    """Content of trials.json."""
    told = document(step.name, step.namespace, store.uri, step.spec.objective, rows, jobs)
    return (json.dumps(told, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _told(rows: Sequence[TrialRow]) -> str:
    """The sweep in one line."""
    found = ", ".join(f"{number} {phase.lower()}" for phase, number in counts(rows).items() if number)
    best = best_of(rows)
    if best is None:
        return f"{len(rows)} trials: {found}; none can be the best"
    return f"{len(rows)} trials: {found}; the best is {best.name} ({describe_parameters(best.parameters)})"
