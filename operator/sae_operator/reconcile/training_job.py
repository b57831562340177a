"""SAETrainingJob: preflight -> (its cache) -> train. The contexts of a live source are prepared by preflight.

Pending -> Preflight -> WaitingForCache -> Queued / Running -> Succeeded. Tokens that are raised while it trains end the
pod (after a checkpoint) and go on from there: finishing first would only decay the learning rate for nothing.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Literal

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import cache_identity, training_identity
from sae_operator.api.resources import SAE_TRAINING_JOB
from sae_operator.api.status import CheckpointStatus, SAETrainingJobStatus
from sae_operator.api.steps import StepResult, TrainStep, TrainStepName
from sae_operator.api.store import StoreLocation
from sae_operator.api.training_job import SAETrainingJobSpec
from sae_operator.reconcile import admission
from sae_operator.reconcile.cache_gate import Gate, activations_of, cache_gate
from sae_operator.reconcile.children import StepWanted, resources_field, resources_of, secret_names
from sae_operator.reconcile.cleanup import Expiry
from sae_operator.reconcile.conditions import METRICS_UNAVAILABLE, Finding
from sae_operator.reconcile.defaults import resolve_cache, resolve_location, resolve_training_job
from sae_operator.reconcile.diagnosis import Surroundings
from sae_operator.reconcile.names import cache_name_of
from sae_operator.reconcile.observed import InvalidSpec, ObservedTrainingJob, OperatorSettings
from sae_operator.reconcile.progress import (
    finished_progress,
    latest_by_index,
    merge_checkpoint,
    merge_progress,
    merge_saes,
    reports,
    summarize,
)
from sae_operator.reconcile.projection import parse_time
from sae_operator.reconcile.rounds import Round, current_round
from sae_operator.reconcile.scene import (
    Draft,
    Scene,
    at_rest,
    compose,
    forget_round,
    is_suspending,
    plan_of,
    refuse_invalid,
    suspend,
    without_refused_job,
)
from sae_operator.reconcile.steps import StepPlan, StepView, drive_step, fail
from sae_operator.reconcile.wanted import Wanted

STEPS: tuple[TrainStepName, ...] = ("preflight", "train")
PHASES: dict[TrainStepName, tuple[str, str]] = {"preflight": ("Preflight", "Preflight"), "train": ("Queued", "Running")}
KIND = SAE_TRAINING_JOB.kind
SAES_FAILED = "SAEsFailed"

TrainingScene = Scene[SAETrainingJobStatus]
Source = tuple[StoreLocation, ActivationCacheSpec | None]


def reconcile_training_job(observed: ObservedTrainingJob, settings: OperatorSettings, now: datetime) -> Wanted:
    """What an SAETrainingJob wants now."""
    stored, metadata, spec = without_refused_job(observed.status), observed.metadata, observed.spec
    if metadata.deleting:
        return Wanted(status=stored.to_manifest())
    ended = _ended(stored)
    if isinstance(spec, InvalidSpec):
        return at_rest(metadata, stored, observed) if ended else refuse_invalid(metadata, stored, spec, now)
    work = current_round(stored, ended, Round(spec.retry, _asked_for(spec)), more_interrupts=True)
    if ended is not None and not work.begins:
        together = spec.parallelism > 1 or any((job.completions or 1) > 1 for job in observed.jobs)
        expiry = Expiry(spec.run.ttl_seconds_after_finished, STEPS, service=together)
        return at_rest(metadata, stored, observed, expiry, now)
    cache_spec = observed.cache.spec if observed.cache is not None else None
    refusal = admission.check_training_job(spec, cache_spec, observed.defaults, settings)
    let_on = admission.is_let_on(observed.jobs, work.key, STEPS[-1]) or (spec.suspend and is_suspending(stored))
    if refusal is not None and not let_on:
        again = admission.again_after(refusal)
        return refuse_invalid(metadata, stored, refusal, now, reason=admission.NOT_ALLOWED, again_after=again)
    forgotten = ("saes", "summary", "report_uri", "log_uri")
    previous = forget_round(stored, forgotten) if work.begins else stored
    scene = Scene(KIND, metadata, observed, stored, previous, work, observed.defaults, settings, now, spec.run)
    draft = Draft(updates={"cache_name": cache_name_of(spec)})
    if spec.suspend:
        suspend(scene, draft)
    else:
        _work(scene, draft, spec, observed)
    wanted = compose(scene, draft)
    if draft.standing.kind == "failed" and spec.retry > work.retry:
        # Asked for again while it still worked: it is never told to have failed for a spec that it has not failed for.
        reached = SAETrainingJobStatus.model_validate(wanted.status)
        following = reconcile_training_job(replace(observed, status=reached), settings, now)
        return replace(following, events=(*wanted.events, *following.events))
    return wanted


def _asked_for(spec: SAETrainingJobSpec) -> int:
    """What a round is about: the tokens to train on or, where these are all that an inline cache or a live source
    gives, the source's. 0 is all that there are."""
    source = spec.activations.cache or spec.activations.live
    return spec.training.tokens or (source.tokens if source is not None else 0)


def _ended(status: SAETrainingJobStatus) -> Literal["done", "failed"] | None:
    if status.phase == "Succeeded":
        return "done"
    return "failed" if status.phase == "Failed" else None


def _work(scene: TrainingScene, draft: Draft, spec: SAETrainingJobSpec, observed: ObservedTrainingJob) -> None:
    found = activations_of(spec, observed.cache, scene.metadata.namespace)
    step = scene.current_step(STEPS)
    source = None if isinstance(found, Gate) else found
    # A Job that was given its activations needs the cache's resource no more.
    if isinstance(found, Gate) and not _has_job(scene, step):
        _wait(scene, draft, found, "WaitingForCache" if step == "train" else "Pending")
        return
    _recall_preflight(scene, draft)
    # Past preflight, its Job may be deleted by anybody without being missed.
    if step == "preflight" and scene.previous.phase != "WaitingForCache":
        view = drive_step(scene, draft, _plan(scene, draft, spec, source, "preflight"))
        _take_preparation(scene, draft, view)
        if view.state != "succeeded":
            return
        if view.result is not None and view.result.adopted:
            _succeed(scene, draft, spec, view.result, adopted=True)
            return
    if not _has_job(scene, "train") and not _pass_gate(scene, draft, spec, observed):
        return
    view = drive_step(scene, draft, _plan(scene, draft, spec, source, "train"))
    _take_figures(scene, draft, spec, view)
    if view.state == "succeeded":
        _succeed(scene, draft, spec, view.result, adopted=False)


def _has_job(scene: TrainingScene, step: TrainStepName) -> bool:
    return any(job.step == step for job in scene.round_jobs)


def _recall_preflight(scene: TrainingScene, draft: Draft) -> None:
    result = scene.result_of("preflight") if scene.previous.plan is None else None
    if result is not None and result.plan:
        draft.updates["plan"] = plan_of(result)


def _pass_gate(scene: TrainingScene, draft: Draft, spec: SAETrainingJobSpec, observed: ObservedTrainingJob) -> bool:
    """Whether the training may start; what the inline cache needs is asked for on the way."""
    gate = cache_gate(spec, observed.cache, scene.metadata, scene.previous)
    draft.apply_cache = gate.apply_cache
    if gate.event is not None:
        draft.events.append(gate.event)
    if gate.failure is not None:
        fail(scene, draft, gate.failure)
        return False
    if not gate.open:
        _wait(scene, draft, gate, "WaitingForCache")
    return gate.open


def _wait(scene: TrainingScene, draft: Draft, gate: Gate, phase: str) -> None:
    draft.stand(phase, "working", gate.reason, gate.message)
    draft.delete(scene.unfinished_jobs)
    draft.poll_pods, draft.requeue_after = False, None


def _plan(
    scene: TrainingScene, draft: Draft, spec: SAETrainingJobSpec, source: Source | None, step: TrainStepName
) -> StepPlan:
    """How a step is run; without a known source only a Job that exists already can be."""
    plan = draft.updates.get("plan") or scene.previous.plan

    def build(attempt: int) -> StepWanted:
        if source is None:
            raise RuntimeError(
                f"step {step} of {scene.metadata.name} was to be created before its activations are known"
            )
        return StepWanted(
            kind=KIND,
            metadata=scene.metadata,
            step=step,
            attempt=attempt,
            work=scene.round.key,
            spec=_given(scene, spec, source, step),
            run=spec.run,
            defaults=scene.defaults,
            default_image=scene.settings.job_image,
            memory_bytes=plan.memory_bytes if plan else None,
            pods=spec.parallelism if step == "train" else 1,
        )

    surroundings = Surroundings(
        namespace=scene.metadata.namespace,
        run_field="spec.run",
        resources_field=resources_field(step, "spec.run"),
        limits=resources_of(spec.run, step).limits,
        secrets=lambda: secret_names(_given(scene, spec, source, step).to_manifest()) if source is not None else (),
    )
    waiting, running = PHASES[step]
    checkpoint = _checkpoint(scene, spec)
    safe = parse_time(checkpoint.time) if checkpoint is not None and step == "train" else None
    return StepPlan(step, waiting, running, build, surroundings, checkpoint_time=safe, can_build=source is not None)


def _checkpoint(scene: TrainingScene, spec: SAETrainingJobSpec) -> CheckpointStatus | None:
    said = [told for _, told in reports(scene.children.pods, scene.children.progress)]
    return merge_checkpoint(said, scene.previous.checkpoint, spec.output.uri)


def _given(scene: TrainingScene, spec: SAETrainingJobSpec, source: Source, step: TrainStepName) -> TrainStep:
    """What the step's pods are given: spec and places with the namespace's defaults."""
    location, cache = source
    return TrainStep(
        step=step,
        namespace=scene.metadata.namespace,
        name=scene.metadata.name,
        uid=scene.metadata.uid,
        spec=resolve_training_job(spec, scene.defaults),
        activations=resolve_location(location, scene.defaults),
        cache=resolve_cache(cache, scene.defaults) if cache is not None else None,
        identity=training_identity(spec),
        identity_of_cache=cache_identity(cache) if cache is not None else None,
    )


def _take_preparation(scene: TrainingScene, draft: Draft, view: StepView) -> None:
    """How far preflight is with the contexts of a live source; of other jobs it has nothing to tell."""
    before = scene.previous.progress if scene.previous_step == "preflight" else None
    merged = merge_progress(view.pods, scene.children.progress, before, total_tokens=None, now=scene.now)
    if merged.total_tokens is not None:
        draft.updates["progress"] = merged


def _take_figures(scene: TrainingScene, draft: Draft, spec: SAETrainingJobSpec, view: StepView) -> None:
    """What the training pods say while they work: of several the first one, which speaks for all."""
    pods = [pod for pod in view.pods if not pod.index]
    latest = latest_by_index(pods, scene.children.progress)
    draft.updates["progress"] = merge_progress(
        pods,
        scene.children.progress,
        scene.previous.progress if scene.previous_step == "train" else None,
        total_tokens=_tokens_asked_for(spec),
        now=scene.now,
    )
    said = next(iter(latest.values()), None)
    saes = merge_saes(said.saes if said is not None else (), scene.previous.saes)
    draft.updates["saes"] = saes
    draft.updates["summary"] = summarize(saes)
    draft.updates["checkpoint"] = _checkpoint(scene, spec)


def _tokens_asked_for(spec: SAETrainingJobSpec) -> int | None:
    """Tokens of the training and its fine-tuning; None where the length of the cache decides."""
    training = spec.training
    if training.tokens is None:
        return None
    return training.tokens + (training.finetuning.tokens if training.finetuning is not None else 0)


def _succeed(
    scene: TrainingScene, draft: Draft, spec: SAETrainingJobSpec, result: StepResult | None, *, adopted: bool
) -> None:
    saes = merge_saes(
        (result.saes if result is not None else None) or (), draft.updates.get("saes") or scene.previous.saes
    )
    progress = draft.updates.get("progress") or scene.previous.progress
    tokens = result.tokens if result is not None and result.tokens is not None else None
    if tokens is None:
        tokens = _tokens_asked_for(spec) or (progress.total_tokens if progress is not None else None)
    output = spec.output.uri.rstrip("/")
    draft.updates |= {
        "saes": saes,
        "summary": summarize(saes),
        "progress": finished_progress(tokens, result.tokens_per_second if result is not None else None, scene.now),
        "checkpoint": None,
        "report_uri": f"{output}/report.html",
        "log_uri": f"{output}/log.txt",
    }
    failed = [sae for sae in saes or () if sae.phase == "Failed"]
    if failed:
        text = "; ".join(f"{sae.name}: {sae.message or 'failed'}" for sae in failed)
        draft.findings.append(
            Finding(SAES_FAILED, "SAEsFailed", f"{len(failed)} of {len(spec.saes)} SAEs failed: {text}")
        )
    if result is None:
        text = f"the training ended well, but its message was lost: {output}/results.json has the figures"
        draft.findings.append(Finding(METRICS_UNAVAILABLE, "NoMessage", text))
    done = f"{len(spec.saes) - len(failed)} of {len(spec.saes)} SAEs"
    verb = "found" if adopted else "trained"
    draft.stand("Succeeded", "done", "Adopted" if adopted else "Completed", f"{verb} {done}: see {output}/report.html")
    draft.requeue_after, draft.poll_pods = None, False
