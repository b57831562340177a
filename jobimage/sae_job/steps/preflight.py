"""The step `preflight`: can this training job work, and what will it cost? Told before anything costs GPU time.

For a job with a live source it also stores the contexts that the model will run on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

from sae_job.activations.manifest import CacheManifest, HookStatistics, read_manifest
from sae_job.activations.reader import read_bytes_of_shard, reader_memory_bytes
from sae_job.errors import InvalidInput
from sae_job.models.facts import ModelFacts, check_batch_size, check_context_size, forward_bytes
from sae_job.models.mirror import LocalModel, localized
from sae_job.reporting.wandb_runs import check_wandb
from sae_job.steps.activation_sources import model_of
from sae_job.steps.advice import advice_for_job
from sae_job.steps.context import StepContext
from sae_job.steps.fields import fields_of_activations
from sae_job.steps.figure_folder import check_figure_folder
from sae_job.steps.hook_groups import shape_of
from sae_job.steps.memory import has_gpu, training_processes
from sae_job.steps.model_evaluation import evaluates_model
from sae_job.steps.output_marker import check_output, claim_output, finished_results, result_of
from sae_job.steps.prepare import check_size, finished_manifest, prepare_contexts_for
from sae_job.steps.training_memory import TrainingMemory
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import CacheIndex, row_bytes
from sae_job.training.plan import TrainingPlan, resolve_plan, tokens_asked_for
from sae_job.training.warm_start import load_starts
from sae_operator.api.activation_cache import ActivationCacheSpec, ModelSource
from sae_operator.api.identity import LIVE_SHARDS_IN_BUFFER
from sae_operator.api.run_settings import RunSettings
from sae_operator.api.steps import CacheStep, ExitCode, StepResult, TrainStep
from sae_operator.api.training_job import MODEL_METRICS, SAETrainingJobSpec

logger = logging.getLogger(__name__)

# A token id in a stored context.
TOKEN_BYTES = 4


def run_preflight(step: TrainStep | CacheStep, context: StepContext) -> StepResult:
    """Check a training job against its output, its activations and its model; claim the output; prepare the contexts
    of a live source.

    Results that a finished job of the same spec left are adopted.

    Raises:
        InvalidInput: what cannot work, with the field to change.
        Stopped: asked to stop; the next attempt goes on with the contexts.
    """
    if not isinstance(step, TrainStep):
        raise TypeError(f"the preflight step is given a {type(step).__name__}")
    spec = step.spec
    output = context.open_store(spec.output)
    finished = finished_results(output) if check_output(output, step) else None
    if finished is not None and finished["tokens"] >= tokens_asked_for(spec):
        logger.info("finished results are there already below %s", output.uri)
        return result_of("preflight", finished, adopted=True)
    check_wandb(spec.wandb, os.environ)
    check_figure_folder(step, output, context)
    store = context.open_store(step.activations)
    surveyed = survey(step, store, context)
    plan, memory = surveyed.plan, surveyed.memory
    for line in memory.lines(gpu=has_gpu(spec.run)):
        logger.info("memory: %s", line)
    for warning in advice_for_job(spec):
        logger.warning("%s", warning)
    # After all checks, so that a spec that cannot work does not keep its mended successor from the output.
    claim_output(output, step)
    stored_bytes = surveyed.bytes_to_cache
    if spec.activations.live is not None:
        stored_bytes = _prepare_contexts(step, store, context)
    return StepResult(
        step="preflight",
        exit_code=ExitCode.DONE,
        reason="Completed",
        message=f"{len(plan.saes)} SAEs, {plan.tokens} tokens in {plan.steps} steps of {plan.batch_size}",
        adopted=False,
        plan={"bytes": stored_bytes, "gpuSeconds": None, "memoryBytes": memory.total},
    )


@dataclass(frozen=True)
class Survey:
    """What a job comes to.

    Attributes:
        plan: every default resolved; scales only where a finished cache tells its statistics.
        memory: what its training pod needs.
        bytes_to_cache: size of the cache that is to be built or extended.
    """

    plan: TrainingPlan
    memory: TrainingMemory
    bytes_to_cache: int


def survey(step: TrainStep, store: ObjectStore, context: StepContext) -> Survey:
    """What a job comes to, without writing anything.

    Args:
        store: the folder of its activations.

    Raises:
        InvalidInput: what cannot work, with the field to change.
    """
    spec = step.spec
    needs = _needs(step, store, context)
    plan = resolve_plan(spec, cache_rows=needs.rows, widths=needs.widths, ranks=training_processes(spec))
    load_starts(plan, context.open_store)
    _check_held_out(spec, plan)
    if needs.statistics is not None:
        plan = plan.scaled_by(needs.statistics)
    memory = needs.memory(spec, plan)
    memory.check(spec)
    return Survey(plan, memory, needs.bytes_to_cache)


@dataclass(frozen=True)
class _Needs:
    """What is known of a job's activations, and what they take.

    Attributes:
        rows: rows that the job asked for, held-out ones included.
        widths: key of every hook -> width of its activations.
        row_bytes: memory of the training pod for rows that are read or computed ahead.
        model_bytes: the same for the model of a live source, with its forward pass.
        scored_model_bytes: the same for the model that scores SAEs.
        bytes_to_cache: size of the cache that is to be built or extended.
        statistics: of the activations, where a finished cache tells them.
    """

    rows: int
    widths: Mapping[str, int]
    row_bytes: int
    scored_model_bytes: int
    model_bytes: int = 0
    bytes_to_cache: int = 0
    statistics: Mapping[str, HookStatistics] | None = None

    def memory(self, spec: SAETrainingJobSpec, plan: TrainingPlan) -> TrainingMemory:
        return TrainingMemory.of(
            plan,
            rows=self.row_bytes,
            model=self.model_bytes,
            scored_model=self.scored_model_bytes,
            scored_beside=spec.evaluation.model_every_tokens is not None,
            processes=training_processes(spec) // spec.parallelism,
        )


def _needs(step: TrainStep, store: ObjectStore, context: StepContext) -> _Needs:
    """Facts of the job's activations.

    Raises:
        InvalidInput: they are not there, or cannot be computed.
    """
    spec, cache = step.spec, step.cache
    manifest = None if spec.activations.live is not None else _manifest(step, store)
    if manifest is not None and (cache is None or _has_hooks(manifest, cache)):
        facts = _inspect_scored(step, manifest, store, context)
        hooks = manifest.hooks if cache is None else [manifest.hook(hook.key) for hook in cache.hooks]
        widths = {hook.name: hook.d_in for hook in hooks}
        return _Needs(
            rows=manifest.tokens if cache is None else cache.tokens,
            widths=widths,
            row_bytes=reader_memory_bytes(
                manifest.bytes,
                manifest.shard_bytes,
                read_bytes=read_bytes_of_shard(manifest, list(_trained(spec, widths))),
            ),
            scored_model_bytes=0 if facts is None else facts.total_parameter_bytes,
            statistics={hook.name: hook for hook in hooks},
        )
    assert cache is not None, "a cache without a spec has a manifest"
    facts = _inspect(spec, cache, store, context)
    shape = shape_of(cache, facts.d_in, None, manifest)
    size, running = shape.tokens * shape.row_bytes(cache.storage.dtype), 0
    if manifest is not None:
        # Its shards keep their rows, however many bytes the spec's would have.
        row = row_bytes(_trained(spec, facts.d_in), cache.storage.dtype, group=1)
        held = reader_memory_bytes(size, manifest.shard_bytes, read_bytes=shape.rows_per_shard * row)
    elif spec.activations.live is None:
        held = reader_memory_bytes(size, cache.storage.shard_bytes)
    else:
        running = facts.parameter_bytes + forward_bytes(facts, cache.model, cache.context_size)
        held = min(size, LIVE_SHARDS_IN_BUFFER * cache.storage.shard_bytes)
    return _Needs(
        rows=cache.tokens,
        widths=facts.d_in,
        row_bytes=held,
        model_bytes=running,
        scored_model_bytes=facts.total_parameter_bytes if evaluates_model(spec) else 0,
        bytes_to_cache=size if spec.activations.live is None else 0,
    )


def _prepare_contexts(step: TrainStep, store: ObjectStore, context: StepContext) -> int:
    """Store the contexts of a live source; returns their bytes."""
    assert step.cache is not None, "a live source is described as a cache"
    context.reporter.update(total_tokens=step.cache.tokens)
    # Its memory was checked as a training pod's; what a cache worker would need does not count.
    cache = step.cache.model_copy(update={"run": RunSettings()})
    with fields_of_activations(step.spec):
        _, index = prepare_contexts_for(cache, store, context, identity=_cache_identity(step))
    context.reporter.update(tokens=step.cache.tokens)
    logger.info("%d contexts are stored below %s", index.contexts, store.uri)
    return index.contexts * index.context_size * TOKEN_BYTES


def _manifest(step: TrainStep, store: ObjectStore) -> CacheManifest | None:
    """The manifest of the cache; None when it is still to be built. It may have to be extended by hooks of the job."""
    if step.cache is not None:
        with fields_of_activations(step.spec):
            return finished_manifest(store, _cache_identity(step))
    try:
        return read_manifest(store)
    except InvalidInput as error:
        raise InvalidInput(error.reason, error.message, field="spec.activations.uri") from error


def _has_hooks(manifest: CacheManifest, cache: ActivationCacheSpec) -> bool:
    return {hook.key for hook in cache.hooks} <= {hook.name for hook in manifest.hooks}


def _trained(spec: SAETrainingJobSpec, widths: Mapping[str, int]) -> dict[str, int]:
    """Those of these hooks that SAEs are trained on, or reconstruct. One that is not among them is told later, with all
    that is known."""
    named = {sae.hook for sae in spec.saes} | {sae.target_hook for sae in spec.saes if sae.target_hook is not None}
    return {hook: width for hook, width in widths.items() if hook in named or None in named}


def _cache_identity(step: TrainStep) -> str:
    identity = step.cache_identity
    assert identity is not None, "the spec of the cache is known"
    return identity


def _inspect(
    spec: SAETrainingJobSpec, cache: ActivationCacheSpec, store: ObjectStore, context: StepContext
) -> ModelFacts:
    """Facts of the model, after checking what the cache asks of it."""
    with fields_of_activations(spec):
        facts = _localized(cache.model, store, None, context).inspect([hook.key for hook in cache.hooks])
        check_context_size(facts, cache.context_size)
        check_batch_size(cache.model, cache.context_size)
        check_size(cache, facts)
    _check_head(spec, facts)
    return facts


def _inspect_scored(
    step: TrainStep, manifest: CacheManifest, store: ObjectStore, context: StepContext
) -> ModelFacts | None:
    """Facts of the model of a finished cache, where training will need it again: for the CE-loss score."""
    if not evaluates_model(step.spec):
        return None
    source = model_of(manifest, step.activations) if step.cache is None else step.cache.model
    try:
        if source is None:
            raise InvalidInput("ModelUnknown", f"{store.uri} does not tell which it is")
        model = _localized(source, store, manifest.model["revision"], context)
        facts = model.inspect([hook.name for hook in manifest.hooks])
    except InvalidInput as error:
        raise InvalidInput(
            error.reason,
            f"{_scores(step.spec)} needs the model that the cache is of: {error.message}; leave it out, or bring the "
            "model",
            field="spec.evaluation.metrics",
        ) from error
    _check_head(step.spec, facts)
    index = CacheIndex.load(store)
    if index is None or not index.blocks:
        raise InvalidInput(
            "NoContexts",
            f"{_scores(step.spec)} needs the contexts that the cache is of, and {store.uri} holds none below tokens/ "
            "(a cache that was imported need not); leave it out",
            field="spec.evaluation.metrics",
        )
    return facts


def _localized(source: ModelSource, store: ObjectStore, revision: str | None, context: StepContext) -> LocalModel:
    """The model without its weights."""
    return localized(
        source,
        open_store=context.open_store,
        mirror=store,
        revision=revision,
        weights=False,
        should_stop=context.should_stop,
    )


def _scores(spec: SAETrainingJobSpec) -> str:
    """The metrics of a job that need the language model."""
    return " or ".join(metric for metric in spec.evaluation.metrics if metric in MODEL_METRICS)


def _check_held_out(spec: SAETrainingJobSpec, plan: TrainingPlan) -> None:
    if evaluates_model(spec) and plan.held_out_rows == 0:
        raise InvalidInput(
            "NoHeldOutContexts",
            f"{_scores(spec)} is taken on held-out activations, and there are none; raise heldOutTokens, or leave it "
            "out",
            field="spec.evaluation.heldOutTokens",
        )


def _check_head(spec: SAETrainingJobSpec, facts: ModelFacts) -> None:
    if evaluates_model(spec) and not facts.predicts_tokens:
        raise InvalidInput(
            "NoLanguageModelHead",
            f"{facts.name!r} predicts no tokens; leave {_scores(spec)} out",
            field="spec.evaluation.metrics",
        )
