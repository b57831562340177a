"""A sweep in this process: its training jobs one after the other, then the report.

The folder's trials.json tells which trials share which job, from before the first of them runs. So a run that was
interrupted goes on where it was, and an edited space keeps what has been trained.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import ValidationError

from sae_job.errors import InvalidInput, PeerLost, Stopped
from sae_job.reporting.sweep_table import JobResults, TrialRow, table
from sae_job.steps.output_marker import MARKER_KEY, check_output, finished_results
from sae_job.steps.sweep_folder import TABLE_KEY, claim_folder, read_table
from sae_job.steps.sweep_report import table_bytes, write_report
from sae_job.storage.base import ObjectStore, StoreError
from sae_job.storage.folder import StoreFolder
from sae_job.training.plan import tokens_asked_for
from sae_operator.api.identity import determining
from sae_operator.api.manifest import ManifestError
from sae_operator.api.resources import Resource
from sae_operator.api.steps import SweepJob, SweepStep, TrainStep
from sae_operator.api.store import StoreLocation
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.api.sweep_expansion import (
    HASH_LENGTH,
    SweepInvalid,
    Trial,
    TrialJob,
    as_job,
    expand,
    hooks_by_cache,
    job_name,
    join,
    pack,
)
from sae_operator.api.training_job import SAETrainingJobSpec

logger = logging.getLogger(__name__)

# Folder of a job, below its sweep's.
_FOLDER = re.compile(rf"[0-9a-f]{{{HASH_LENGTH}}}")


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep has left.

    Attributes:
        name: name of the resource.
        output: its folder.
        spec: as it was run.
        rows: its trials.
        jobs: number of its training jobs.
        found: how many of them had been finished before.
        mistakes: whether every job failed by a mistake in the spec or the data.
    """

    name: str
    output: StoreLocation
    spec: SAESweepSpec
    rows: list[TrialRow]
    jobs: int
    found: int
    mistakes: bool


class JobRunner(Protocol):
    """What a sweep needs of a local run."""

    def step(self, name: str, namespace: str, spec: SAETrainingJobSpec) -> TrainStep:
        """The step `train` of a job."""
        ...

    def open(self, location: StoreLocation) -> ObjectStore: ...

    def run(self, name: str, namespace: str, spec: SAETrainingJobSpec, *, title: str) -> None:
        """Run a training job to its end; `title` is what its progress is shown under."""
        ...


def trials_of(sweep: Resource, caches: Iterable[tuple[str, str]]) -> list[Trial]:
    """The trials of a sweep, all of them valid.

    Args:
        sweep: an SAESweep.
        caches: namespace and name of the caches that cacheRef may name.

    Raises:
        ManifestError: the space is not, with everything that is wrong with it.
        InvalidInput: a trial's cacheRef names no cache of the file.
    """
    try:
        trials = expand(sweep.spec)
    except SweepInvalid as error:
        label = f"{sweep.kind.kind}/{sweep.name}"
        raise ManifestError([replace(problem, resource=label) for problem in error.problems]) from error
    known = set(caches)
    for trial in trials:
        reference = trial.spec.activations.cache_ref
        if reference is not None and (sweep.namespace, reference.name) not in known:
            raise InvalidInput(
                "CacheNotFound",
                f"no ActivationCache named {reference.name!r} in the given files; add it, or use cache or uri instead",
                field=f"{sweep.name}: spec.template.activations.cacheRef.name",
            )
    return trials


def run_sweep(sweep: Resource, trials: Sequence[Trial], runner: JobRunner, *, uid: str) -> SweepOutcome:
    """Run a sweep to its end. A job that fails is told, and the others go on.

    Raises:
        InvalidInput: its folder, or that of a job, is of something else: nothing has been run.
        Stopped: asked to stop; the same call continues.
        StoreError: the sweep's folder cannot be read or written.
    """
    spec: SAESweepSpec = sweep.spec
    output = spec.template.output
    store = runner.open(output)
    claim_folder(store, sweep.namespace, sweep.name)
    jobs, results = jobs_to_run(spec, trials, store)
    names = {job.folder: job_name(sweep.name, uid, job.trials) for job in jobs}
    for job in jobs:
        if job.folder not in results:
            step = runner.step(names[job.folder], sweep.namespace, job.spec)
            results[job.folder] = _finished(job, store, step)
    found = {
        job.folder: JobResults(names[job.folder], job.folder, job.trials, results=results[job.folder]) for job in jobs
    }
    step = SweepStep(
        step="report",
        namespace=sweep.namespace,
        name=sweep.name,
        uid=uid,
        spec=spec,
        output=output,
        jobs=[SweepJob(name=names[job.folder], folder=job.folder, trials=list(job.trials)) for job in jobs],
    )
    running = _Running(sweep, trials, jobs, runner, found)
    store.put(TABLE_KEY, table_bytes(store, step, running.rows(), list(found.values())))
    finished = sum(job.results is not None for job in found.values())
    if finished:
        logger.info("%d of %d training jobs of %s are finished already", finished, len(jobs), sweep.name)
    running.run_all(store)
    rows = write_report(store, step, trials, list(found.values()))
    return SweepOutcome(
        name=sweep.name,
        output=output,
        spec=spec,
        rows=rows,
        jobs=len(jobs),
        found=finished,
        mistakes=len(running.mistakes) == len(jobs),
    )


class _Running:
    """The jobs of a sweep while they are run; `found` gets what they come to."""

    def __init__(
        self,
        sweep: Resource,
        trials: Sequence[Trial],
        jobs: Sequence[TrialJob],
        runner: JobRunner,
        found: dict[str, JobResults],
    ) -> None:
        self._sweep = sweep
        self._trials = [(trial.name, trial.parameters) for trial in trials]
        self._jobs = jobs
        self._runner = runner
        self._found = found
        self.mistakes: set[str] = set()

    def rows(self) -> list[TrialRow]:
        return table(self._trials, list(self._found.values()), self._sweep.spec.objective)

    def run_all(self, store: ObjectStore) -> None:
        for number, job in enumerate(self._jobs, 1):
            if self._found[job.folder].results is not None:
                continue
            if self._has_too_many_failures():
                logger.warning("%s: no more trials are started (spec.maxFailedTrials)", self._sweep.name)
                return
            place = f"job {number} of {len(self._jobs)}"
            message = self._run(job, f"{self._sweep.name} {place}")
            if message is not None:
                logger.warning("%s: %s failed, the others go on: %s", self._sweep.name, place, message)
            results = None if message is not None else finished_results(StoreFolder(store, job.folder))
            self._found[job.folder] = replace(self._found[job.folder], message=message, results=results)

    def _has_too_many_failures(self) -> bool:
        most = self._sweep.spec.max_failed_trials
        return most is not None and sum(row.phase == "Failed" for row in self.rows()) > most

    def _run(self, job: TrialJob, title: str) -> str | None:
        """Run a job; returns why it failed."""
        try:
            self._runner.run(self._found[job.folder].name, self._sweep.namespace, job.spec, title=title)
        except Stopped:
            raise
        except InvalidInput as error:
            self.mistakes.add(job.folder)
            return str(error)
        except (StoreError, PeerLost) as error:
            return str(error)
        except Exception as error:
            # Whatever it is, the other trials have nothing to do with it.
            logger.exception("%s failed", title)
            return f"{type(error).__name__}: {error}"
        return None


def _finished(job: TrialJob, store: ObjectStore, step: TrainStep) -> Mapping[str, Any] | None:
    """Results of a job that is finished already.

    Raises:
        InvalidInput: its folder is of another spec.
    """
    folder = StoreFolder(store, job.folder)
    try:
        mine = check_output(folder, step)
    except InvalidInput as error:
        field = error.field.replace("spec.", "spec.template.", 1)
        raise InvalidInput(error.reason, error.message, field=field) from error
    return _enough(job, folder) if mine else None


def _enough(job: TrialJob, folder: ObjectStore) -> Mapping[str, Any] | None:
    """Results in a job's folder, of as many tokens as it asks for."""
    results = finished_results(folder)
    return results if results is not None and results["tokens"] >= tokens_asked_for(job.spec) else None


def jobs_to_run(
    spec: SAESweepSpec, trials: Sequence[Trial], store: ObjectStore
) -> tuple[list[TrialJob], dict[str, Mapping[str, Any] | None]]:
    """The training jobs of a sweep, in the order of their first trials: those that an earlier run has begun as they
    are, and the other trials packed.

    A job that has lost trials is kept where it is finished; otherwise the trials that are left are packed anew.

    Args:
        store: the sweep's folder.

    Returns:
        The jobs, and by their folders the results of those that have lost trials.
    """
    named = {trial.name: trial for trial in trials}
    hooks = hooks_by_cache(trial.spec for trial in trials)
    kept: list[TrialJob] = []
    finished: dict[str, Mapping[str, Any] | None] = {}
    taken: set[str] = set()
    for folder, names in _earlier_jobs(store):
        left = [name for name in names if name in named and name not in taken]
        if not left:
            continue
        job = join(spec, [(name, as_job(spec, named[name], hooks)) for name in left])
        if job.folder != folder:
            job = replace(job, folder=folder)
            results = _results_with_more(job, StoreFolder(store, folder))
            if results is None:
                continue
            finished[folder] = results
        elif store.head(f"{folder}/{MARKER_KEY}") is None:
            continue
        kept.append(job)
        taken.update(left)
    positions = {trial.name: position for position, trial in enumerate(trials)}
    return sorted([*kept, *pack(spec, trials, taken)], key=lambda job: positions[job.trials[0]]), finished


def _earlier_jobs(store: ObjectStore) -> list[tuple[str, list[str]]]:
    """Folders and trials of the jobs of an earlier run; what is damaged is left out."""
    told = read_table(store).get("jobs")
    found: list[tuple[str, list[str]]] = []
    for entry in told if isinstance(told, list) else []:
        folder, names = (entry.get("folder"), entry.get("trials")) if isinstance(entry, dict) else (None, None)
        if not isinstance(folder, str) or not _FOLDER.fullmatch(folder) or not isinstance(names, list):
            continue
        if all(isinstance(name, str) for name in names):
            found.append((folder, names))
    return found


def _results_with_more(job: TrialJob, folder: ObjectStore) -> Mapping[str, Any] | None:
    """Results of a finished job of more trials than the space still has; None where it was not of the same spec."""
    results = _enough(job, folder)
    if results is None:
        return None
    try:
        before = SAETrainingJobSpec.model_validate(results["provenance"]["spec"], by_alias=True, by_name=False)
    except (ValidationError, KeyError, TypeError):
        return None
    mine = {sae.name for sae in job.spec.saes}
    left = before.model_copy(update={"saes": [sae for sae in before.saes if sae.name in mine]})
    return results if determining(left) == determining(job.spec) else None
