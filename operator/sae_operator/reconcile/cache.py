"""ActivationCache: prepare -> cache -> finalize, and again when more tokens or hooks are asked for.

Pending -> Preparing -> Queued / Caching -> Finalizing -> Ready. A round that is going on is finished before tokens or
hooks that were asked for meanwhile are looked at: the pods' work is not thrown away, and a job that waits for less gets
it sooner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Literal

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import cache_identity, cache_location
from sae_operator.api.resources import ACTIVATION_CACHE
from sae_operator.api.status import ActivationCacheStatus, HookStatus, ShardsStatus
from sae_operator.api.steps import CacheStep, CacheStepName, StepResult
from sae_operator.reconcile import admission
from sae_operator.reconcile.children import StepWanted, resources_field, resources_of, secret_names
from sae_operator.reconcile.cleanup import Expiry
from sae_operator.reconcile.conditions import METRICS_UNAVAILABLE, Finding
from sae_operator.reconcile.defaults import resolve_cache, resolve_location
from sae_operator.reconcile.diagnosis import Surroundings
from sae_operator.reconcile.observed import InvalidSpec, ObservedCache, OperatorSettings
from sae_operator.reconcile.progress import finished_progress, latest_by_index, merge_progress
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
from sae_operator.reconcile.steps import StepPlan, StepView, drive_step
from sae_operator.reconcile.wanted import Wanted

STEPS: tuple[CacheStepName, ...] = ("prepare", "cache", "finalize")
PHASES: dict[CacheStepName, tuple[str, str]] = {
    "prepare": ("Preparing", "Preparing"),
    "cache": ("Queued", "Caching"),
    "finalize": ("Finalizing", "Finalizing"),
}
KIND = ACTIVATION_CACHE.kind

CacheScene = Scene[ActivationCacheStatus]


def reconcile_cache(observed: ObservedCache, settings: OperatorSettings, now: datetime) -> Wanted:
    """What an ActivationCache wants now."""
    stored, metadata, spec = without_refused_job(observed.status), observed.metadata, observed.spec
    if metadata.deleting:
        return Wanted(status=stored.to_manifest())
    ended = _ended(stored)
    if isinstance(spec, InvalidSpec):
        return at_rest(metadata, stored, observed) if ended else refuse_invalid(metadata, stored, spec, now)
    asked = Round(spec.retry, spec.tokens, tuple(hook.key for hook in spec.hooks))
    work = current_round(stored, ended, asked, observed_hooks=stored.observed_hooks, more_interrupts=False)
    if ended is not None and not work.begins:
        return at_rest(metadata, stored, observed, Expiry(spec.run.ttl_seconds_after_finished, STEPS), now)
    refusal = admission.check_cache(spec, observed.defaults, settings)
    suspended = is_suspended(observed, spec)
    let_on = admission.is_let_on(observed.jobs, work.key, STEPS[-1]) or (suspended and is_suspending(stored))
    if refusal is not None and not let_on:
        again = admission.again_after(refusal)
        return refuse_invalid(metadata, stored, refusal, now, reason=admission.NOT_ALLOWED, again_after=again)
    previous = forget_round(stored, ("shards",)) if work.begins else stored
    scene = Scene(KIND, metadata, observed, stored, previous, work, observed.defaults, settings, now, spec.run)
    draft = Draft(updates={"observed_hooks": list(work.hooks)})
    if suspended:
        suspend(scene, draft)
    else:
        _work(scene, draft, _of_round(spec, work), inline=bool(observed.owners))
    wanted = compose(scene, draft)
    failed = draft.standing.kind == "failed"
    if (draft.standing.kind == "done" or failed) and (asked.exceeds(work) or (failed and asked.retry > work.retry)):
        # Another round is asked for already: it is never told to have ended for a spec that it has not ended for.
        reached = ActivationCacheStatus.model_validate(wanted.status)
        following = reconcile_cache(replace(observed, status=reached), settings, now)
        return replace(following, events=(*wanted.events, *following.events))
    return wanted


def _of_round(spec: ActivationCacheSpec, work: Round) -> ActivationCacheSpec:
    """The spec as far as the round is about it."""
    return spec.model_copy(
        update={"tokens": work.tokens, "hooks": [hook for hook in spec.hooks if hook.key in work.hooks]}
    )


def is_suspended(observed: ObservedCache, spec: ActivationCacheSpec) -> bool:
    """An inline cache is suspended only when all its owners that still have work to do are."""
    waiting = [owner for owner in observed.owners if not owner.finished]
    return spec.suspend or (bool(waiting) and all(owner.suspended for owner in waiting))


def _ended(status: ActivationCacheStatus) -> Literal["done", "failed"] | None:
    if status.phase == "Ready":
        return "done"
    return "failed" if status.phase == "Failed" else None


def _work(scene: CacheScene, draft: Draft, spec: ActivationCacheSpec, inline: bool) -> None:
    """Walk through the steps from the one that the round has reached, as far as they have succeeded."""
    step: CacheStepName | None = scene.current_step(STEPS)
    _recall_preparation(scene, draft)
    while step is not None:
        view = drive_step(scene, draft, _plan(scene, draft, spec, step, inline))
        _take_figures(scene, draft, spec, step, view)
        if view.state != "succeeded":
            return
        step = _after(scene, draft, spec, step, view)


def _after(
    scene: CacheScene, draft: Draft, spec: ActivationCacheSpec, step: CacheStepName, view: StepView
) -> CacheStepName | None:
    """The step after one that has succeeded; None when the cache is ready."""
    result = view.result
    if step == "finalize" or (step == "prepare" and result is not None and result.adopted):
        _become_ready(scene, draft, spec, result)
        return None
    if step == "cache":
        return "finalize"
    shards = _shards(scene, draft)
    nothing_left = shards.total is not None and shards.complete is not None and shards.complete >= shards.total
    return "finalize" if nothing_left else "cache"


def _become_ready(scene: CacheScene, draft: Draft, spec: ActivationCacheSpec, result: StepResult | None) -> None:
    total = (result.shards_total if result else None) or _shards(scene, draft).total
    tokens = (result.tokens if result else None) or spec.tokens
    location = cache_location(spec, scene.metadata.namespace)
    draft.updates |= {
        "tokens": tokens,
        "bytes": result.bytes if result else None,
        "manifest_uri": f"{location.uri}/manifest.json",
        "shards": ShardsStatus(total=total, complete=total),
        "hooks": _hooks(spec, result, scene.previous.hooks or ()),
        "progress": finished_progress(tokens, None, scene.now),
    }
    adopted = result is not None and bool(result.adopted)
    message = f"{'found' if adopted else 'stored'} {tokens} tokens at {location.uri}"
    if result is None:
        text = "the last step ended well, but its message was lost: the manifest has the figures"
        draft.findings.append(Finding(METRICS_UNAVAILABLE, "NoMessage", text))
    draft.stand("Ready", "done", "Adopted" if adopted else "Completed", message)
    draft.requeue_after, draft.poll_pods = None, False


def _hooks(spec: ActivationCacheSpec, result: StepResult | None, known: Sequence[HookStatus]) -> list[HookStatus]:
    """Every hook of the round, by which jobs see that it is there; the figures of one may be lost, or be left out of a
    message that would be too long."""
    figures = {hook.name: hook for hook in known}
    for hook in (result.hooks if result is not None else None) or ():
        figures[hook.name] = HookStatus(name=hook.name, d_in=hook.d_in, mean_norm=hook.mean_norm)
    return [figures.get(hook.key, HookStatus(name=hook.key)) for hook in spec.hooks]


def _take_figures(
    scene: CacheScene, draft: Draft, spec: ActivationCacheSpec, step: CacheStepName, view: StepView
) -> None:
    """What a step says of plan, shards and progress."""
    result = view.result
    if result is not None and result.plan:
        draft.updates["plan"] = plan_of(result)
    if result is not None and result.shards_total is not None:
        draft.updates["shards"] = ShardsStatus(total=result.shards_total, complete=result.shards_complete or 0)
    if step == "finalize":
        return
    before = scene.previous.progress if scene.previous_step == step else None
    caching = step == "cache"
    merged = merge_progress(
        view.pods,
        scene.children.progress,
        before,
        total_tokens=spec.tokens if caching else None,
        # Rows that are stored stay stored: a pod that starts anew has only not said so yet.
        at_least=(before.tokens or 0) if before is not None and caching else 0,
        now=scene.now,
    )
    if caching:
        reports = latest_by_index(view.pods, scene.children.progress).values()
        shards = _shards(scene, draft)
        done = max(shards.complete or 0, sum(said.shards_complete or 0 for said in reports))
        if view.state == "succeeded":
            done = shards.total or done
        if shards.total is not None:
            draft.updates["shards"] = shards.model_copy(update={"complete": min(done, shards.total)})
    if merged.total_tokens is not None:
        draft.updates["progress"] = merged


def _shards(scene: CacheScene, draft: Draft) -> ShardsStatus:
    return draft.updates.get("shards") or scene.previous.shards or ShardsStatus()


def _recall_preparation(scene: CacheScene, draft: Draft) -> None:
    """What prepare said, where the operator ended before it could write it down."""
    result = scene.result_of("prepare") if scene.previous.shards is None else None
    if result is not None:
        draft.updates["plan"] = plan_of(result)
        draft.updates["shards"] = ShardsStatus(total=result.shards_total, complete=result.shards_complete or 0)


def _plan(scene: CacheScene, draft: Draft, spec: ActivationCacheSpec, step: CacheStepName, inline: bool) -> StepPlan:
    plan = draft.updates.get("plan") or scene.previous.plan

    def build(attempt: int) -> StepWanted:
        completions = _completions(scene, draft, spec, attempt) if step == "cache" else None
        return StepWanted(
            kind=KIND,
            metadata=scene.metadata,
            step=step,
            attempt=attempt,
            work=scene.round.key,
            spec=_given(scene, spec, step, completions or 1),
            run=spec.run,
            defaults=scene.defaults,
            default_image=scene.settings.job_image,
            memory_bytes=plan.memory_bytes if plan else None,
            completions=completions,
            parallelism=spec.parallelism,
        )

    run_field = "spec.activations.cache.run" if inline else "spec.run"
    surroundings = Surroundings(
        namespace=scene.metadata.namespace,
        run_field=run_field,
        resources_field=resources_field(step, run_field),
        limits=resources_of(spec.run, step).limits,
        secrets=lambda: secret_names(_given(scene, spec, step, 1).to_manifest()),
    )
    waiting, running = PHASES[step]
    # The shards themselves say that the cache step is done; nothing waits for its pods' messages.
    caching = step == "cache"
    limit = spec.run.backoff_limit if caching else None
    return StepPlan(step, waiting, running, build, surroundings, needs_result=not caching, limit_per_index=limit)


def _given(scene: CacheScene, spec: ActivationCacheSpec, step: CacheStepName, completions: int) -> CacheStep:
    """What the step's pods are given: the spec with the namespace's defaults."""
    return CacheStep(
        step=step,
        namespace=scene.metadata.namespace,
        name=scene.metadata.name,
        uid=scene.metadata.uid,
        spec=resolve_cache(spec, scene.defaults),
        location=resolve_location(cache_location(spec, scene.metadata.namespace), scene.defaults),
        identity=cache_identity(spec),
        completions=completions,
    )


def _completions(scene: CacheScene, draft: Draft, spec: ActivationCacheSpec, attempt: int) -> int:
    """Pods of an attempt at the cache step: those of its Job or, while there is none, as many as asked for, but no more
    than there are shards to write."""
    jobs = [job for job in scene.round_jobs if job.step == "cache" and job.attempt == attempt]
    if jobs and jobs[0].completions is not None:
        return jobs[0].completions
    shards = _shards(scene, draft)
    if shards.total is None:
        return spec.parallelism
    return max(1, min(spec.parallelism, shards.total - (shards.complete or 0)))
