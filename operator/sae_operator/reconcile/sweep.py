"""SAESweep: trials packed into SAETrainingJobs, at most so many at a time, and a report when all have ended.

Pending -> Running -> Reporting -> Succeeded. What an edit of the space leaves out is deleted (its data stays), what it
adds is trained, and what it keeps is not trained again; after the end an edit begins another round, with a new report.
A training job that somebody deletes while the sweep works is created again: where its trials had been trained, its
preflight finds their results. A sweep that has ended creates nothing, whatever is deleted.

Too many failed trials end a sweep once the jobs that run have ended: their work is not thrown away, and no others are
created. A report that fails ends nothing: the results are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from sae_operator.api.resources import SAE_SWEEP
from sae_operator.api.status import JobCounts, SAESweepStatus, TrialCounts
from sae_operator.api.steps import SweepJob, SweepStep
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.reconcile import admission
from sae_operator.reconcile.children import StepWanted, secret_names
from sae_operator.reconcile.conditions import INVALID, Finding, rfc3339
from sae_operator.reconcile.defaults import resolve_location, resolve_training_job
from sae_operator.reconcile.diagnosis import Surroundings
from sae_operator.reconcile.observed import InvalidSpec, OperatorSettings, SpecProblem
from sae_operator.reconcile.rounds import Round
from sae_operator.reconcile.scene import (
    Draft,
    Expiry,
    Scene,
    at_rest,
    compose,
    forget_round,
    refuse_invalid,
    suspend,
    without_refused_job,
)
from sae_operator.reconcile.steps import StepPlan, drive_step
from sae_operator.reconcile.sweep_jobs import JobsWanted, jobs_wanted, run_again
from sae_operator.reconcile.sweep_observed import ENDED_PHASES, ObservedSweep, is_at_rest
from sae_operator.reconcile.sweep_status import (
    MESSAGE_BYTES,
    Claim,
    TrialView,
    claims_of,
    clipped,
    count,
    ended,
    failures_found,
    messages_of,
    tell,
    view_trials,
)
from sae_operator.reconcile.sweep_trials import Outline
from sae_operator.reconcile.wanted import Wanted

KIND = SAE_SWEEP.kind
REPORT = "report"
REPORT_FILE, TABLE_FILE = "report.html", "trials.json"
REPORT_FAILED = "ReportFailed"
TOO_MANY_FAILED = "TooManyFailedTrials"
ALL_FAILED = "AllTrialsFailed"
# Writes of each kind that one look at a sweep makes; the next look goes on at once. Others wait no longer than that.
WRITES_PER_LOOK = 50
# What the report's ConfigMap holds of messages: with 5,000 jobs the rest takes half of the 1 MiB that it may have.
REPORT_MESSAGE_BYTES = 100_000

SweepScene = Scene[SAESweepStatus]


def reconcile_sweep(observed: ObservedSweep, settings: OperatorSettings, now: datetime) -> Wanted:
    """What an SAESweep wants now."""
    stored, metadata, spec = without_refused_job(observed.status), observed.metadata, observed.spec
    if metadata.deleting:
        return Wanted(status=stored.to_manifest())
    if is_at_rest(metadata, stored):
        return _rest(observed, stored, now)
    if isinstance(spec, InvalidSpec):
        return refuse_invalid(metadata, stored, _short(spec), now)
    outline = observed.outline
    if isinstance(outline, InvalidSpec):
        return refuse_invalid(metadata, stored, _short(outline), now)
    if outline is None:
        raise RuntimeError(f"the trials of {metadata.name} are not known")
    work = _round(stored, spec, outline, now)
    if stored.phase in ENDED_PHASES and not work.begins:
        return _rest(observed, stored, now)
    refusal = admission.check_sweep(spec, outline.samples, observed.defaults, settings)
    if refusal is not None and not admission.is_let_on(observed.jobs, work.key, REPORT):
        again = admission.again_after(refusal)
        return refuse_invalid(metadata, stored, _short(refusal), now, reason=admission.NOT_ALLOWED, again_after=again)
    previous = forget_round(stored, ("report_uri", "table_uri")) if work.begins else stored
    run = spec.template.run.model_copy(update={"cpu_steps": spec.report})
    scene = Scene(KIND, metadata, observed, stored, previous, work, observed.defaults, settings, now, run)
    return _Sweep(scene, spec, outline, observed).wanted()


def _rest(observed: ObservedSweep, stored: SAESweepStatus, now: datetime) -> Wanted:
    """A sweep that has ended: its training jobs look after themselves, and after a time nothing is left of its report's
    Job."""
    expiry = None
    if not isinstance(observed.spec, InvalidSpec):
        expiry = Expiry(observed.spec.template.run.ttl_seconds_after_finished, (REPORT,))
    return at_rest(observed.metadata, stored, observed, expiry, now)


def _short(problem: InvalidSpec) -> InvalidSpec:
    """The problems in as many bytes as a condition of a sweep may take."""
    share = MESSAGE_BYTES // max(1, len(problem.problems))
    return InvalidSpec(tuple(SpecProblem(found.field, clipped(found.message, share)) for found in problem.problems[:5]))


def _round(stored: SAESweepStatus, spec: SAESweepSpec, outline: Outline, now: datetime) -> Round:
    """The round that a sweep is in. Its key is that of the report's Job: a report of other trials, or of results from
    before they were trained further, is none of this round's."""
    begins = stored.observed_trials is None or (stored.phase in ENDED_PHASES and _asks_for_more(stored, spec, outline))
    began = None if begins else stored.start_time
    return Round(spec.retry, outline.tokens, (outline.digest, began or rfc3339(now)), begins)


def _asks_for_more(stored: SAESweepStatus, spec: SAESweepSpec, outline: Outline) -> bool:
    """Whether the spec of a sweep that has ended asks for something new."""
    counts = stored.trials or TrialCounts()
    failed, pending = counts.failed or 0, counts.pending or 0
    held = {condition.type: condition for condition in stored.conditions or () if condition.status == "True"}
    if outline.digest != stored.observed_trials or outline.tokens > (stored.observed_tokens or 0):
        return True
    if spec.retry > (stored.observed_retry or 0) and (failed or REPORT_FAILED in held):
        return True
    # Corrected, without anything else: tell so.
    if INVALID in held:
        return True
    limit = spec.max_failed_trials
    return stored.phase == "Failed" and pending > 0 and (limit is None or failed <= limit)


class _Sweep:
    """One look at a sweep."""

    def __init__(self, scene: SweepScene, spec: SAESweepSpec, outline: Outline, observed: ObservedSweep) -> None:
        self.scene, self.spec, self.outline = scene, spec, outline
        self.draft = Draft()
        self.claims, self.removed = claims_of(outline, observed.training_jobs, spec.retry)
        again = run_again(spec, outline, self.claims)
        self.trials: list[TrialView] = view_trials(outline, self.claims, {claim.job.uid for claim in again})
        self.counts = count(self.trials)
        limit = spec.max_failed_trials
        self.given_up = limit is not None and (self.counts.failed or 0) > limit
        leaving = sum(not job.ended for job in self.removed)
        self.jobs: JobsWanted = jobs_wanted(
            scene.metadata, spec, outline, self.claims, again, leaving=leaving, given_up=self.given_up
        )
        left = self.removed[WRITES_PER_LOOK:]
        self.works = bool(self.jobs.unfinished or again or left or (self.jobs.groups and not self.given_up))

    @property
    def output(self) -> str:
        return self.spec.template.output.uri.rstrip("/")

    def wanted(self) -> Wanted:
        draft = self.draft
        total = len(self.claims) + len(self.jobs.groups)
        jobs = JobCounts(total=total, unfinished=len(self.jobs.unfinished))
        draft.updates |= tell(self.outline, self.spec.objective, self.trials, self.counts, jobs)
        draft.findings += failures_found(self.outline, self.trials, self.counts)
        if self.spec.suspend:
            self._suspend()
        elif self.works:
            self._stand_working()
        elif self.counts.failed == self.counts.total:
            self._fail(ALL_FAILED, f"all {self.counts.total} trials failed; correct their cause and raise spec.retry")
        else:
            self._report()
        draft.create += self.jobs.create[:WRITES_PER_LOOK]
        removed = [(job.name, job.uid) for job in self.removed if not job.deleting]
        if removed or max(len(self.jobs.create), len(self.jobs.patches)) > WRITES_PER_LOOK:
            draft.look_again(0.0)
        return replace(
            compose(self.scene, draft),
            patch_training_jobs=tuple(self.jobs.patches[:WRITES_PER_LOOK]),
            delete_training_jobs=tuple(removed[:WRITES_PER_LOOK]),
        )

    # Phases

    def _suspend(self) -> None:
        at_work = [job for job in self.jobs.unfinished if not (job.seen and job.phase == "Suspended")]
        suspend(self.scene, self.draft)
        if at_work:
            message = f"waits for {_number(len(at_work), 'training job')} to stop"
            phase = self.scene.previous.phase or "Pending"
            self.draft.stand("Running" if phase == "Reporting" else phase, "working", "Suspending", message)
        self._forget_report()

    def _stand_working(self) -> None:
        begun = any(trial.state != "pending" for trial in self.trials)
        phase = "Running" if begun or self.scene.previous.phase in ("Running", "Reporting") else "Pending"
        unfinished = len(self.jobs.unfinished) + len(self.jobs.create)
        message = f"{ended(self.counts)} of {self.counts.total} trials have ended"
        message += f"; {_number(unfinished, 'training job')} unfinished"
        if self.given_up:
            message += "; no others are started, since more than spec.maxFailedTrials have failed"
        by_hand = [job.name for job in self.jobs.unfinished if job.suspended and not job.suspended_by_sweep]
        if by_hand:
            message += f"; suspended by hand: {', '.join(by_hand[:3])}{', ...' if len(by_hand) > 3 else ''}"
        self.draft.stand(phase, "working", "TrialsUnfinished", message)
        self._forget_report()

    def _forget_report(self) -> None:
        """Whatever works on a report has nothing to do now. It is not one that somebody deleted."""
        self.draft.delete(self.scene.unfinished_jobs)
        if self.scene.previous.phase == "Reporting" or self.scene.previous.job_name is not None:
            self.draft.updates |= {"job_name": None, "attempt": None}

    def _report(self) -> None:
        draft = self.draft
        view = drive_step(self.scene, draft, self._plan())
        if view.state == "succeeded":
            draft.updates |= {
                "report_uri": f"{self.output}/{REPORT_FILE}",
                "table_uri": f"{self.output}/{TABLE_FILE}",
            }
            self._end(f"see {self.output}/{REPORT_FILE}")
        elif draft.standing.kind == "failed":
            why = draft.standing.message
            message = clipped(f"{why}; raise spec.retry to write it again", MESSAGE_BYTES)
            draft.findings.append(Finding(REPORT_FAILED, draft.standing.reason, message))
            self._end(f"the report failed; the results are in the trials' folders below {self.output}")

    def _end(self, where: str) -> None:
        """All that is to be trained has ended."""
        counts, draft = self.counts, self.draft
        if self.given_up and self.jobs.groups:
            left = counts.pending or 0
            message = (
                f"{counts.failed} trials failed, more than spec.maxFailedTrials allows; {left} were not started: raise"
                f" that, or correct the cause and raise spec.retry; {where}"
            )
            self._fail(TOO_MANY_FAILED, message)
            return
        stopped = f", {counts.stopped} were given up early" if counts.stopped else ""
        failed = f", {counts.failed} failed" if counts.failed else ""
        message = f"{counts.succeeded} of {counts.total} trials were trained{stopped}{failed}: {where}"
        draft.stand("Succeeded", "done", "Completed", clipped(message, MESSAGE_BYTES))
        draft.requeue_after, draft.poll_pods = None, False

    def _fail(self, reason: str, message: str) -> None:
        draft = self.draft
        draft.stand("Failed", "failed", reason, clipped(message, MESSAGE_BYTES))
        draft.delete(self.scene.unfinished_jobs)
        draft.requeue_after, draft.poll_pods = None, False

    # The report's Job

    def _plan(self) -> StepPlan:
        scene, spec = self.scene, self.spec

        def build(attempt: int) -> StepWanted:
            return StepWanted(
                kind=KIND,
                metadata=scene.metadata,
                step=REPORT,
                attempt=attempt,
                work=scene.round.key,
                spec=self._given(),
                run=scene.run,
                defaults=scene.defaults,
                default_image=scene.settings.job_image,
            )

        surroundings = Surroundings(
            namespace=scene.metadata.namespace,
            run_field="spec.template.run",
            resources_field="spec.report.resources",
            limits=spec.report.resources.limits,
            secrets=lambda: secret_names(self._given().to_manifest()),
        )
        return StepPlan(REPORT, "Reporting", "Reporting", build, surroundings, needs_result=False)

    def _given(self) -> SweepStep:
        scene, spec = self.scene, self.spec
        template = resolve_training_job(spec.template, scene.defaults)
        return SweepStep(
            step=REPORT,
            namespace=scene.metadata.namespace,
            name=scene.metadata.name,
            uid=scene.metadata.uid,
            spec=spec.model_copy(update={"template": template}),
            output=resolve_location(spec.template.output, scene.defaults),
            jobs=_jobs_told(self.claims),
        )


def _jobs_told(claims: Sequence[Claim]) -> list[SweepJob]:
    messages = messages_of(claims, REPORT_MESSAGE_BYTES)
    return [
        SweepJob(
            name=claim.job.name,
            folder=claim.job.folder,
            trials=list(claim.trials),
            message=messages.get(claim.job.uid),
        )
        for claim in claims
    ]


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
