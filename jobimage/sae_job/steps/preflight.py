"""The step `preflight`: can this training job work, and what will it cost? Told before anything costs GPU time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sae_job.activations.manifest import CacheManifest, HookStatistics, read_manifest
from sae_job.activations.reader import reader_memory_bytes
from sae_job.errors import InvalidInput
from sae_job.models.facts import ModelFacts, check_batch_size, check_context_size
from sae_job.models.load import inspect_model
from sae_job.steps.context import StepContext
from sae_job.steps.output_marker import check_output, claim_output, finished_results, result_of
from sae_job.steps.prepare import cache_bytes, check_size, finished_manifest
from sae_job.storage.base import ObjectStore
from sae_job.training.plan import TrainingPlan, resolve_plan, tokens_asked_for
from sae_operator.api.activation_cache import ActivationCacheSpec, ModelSource
from sae_operator.api.steps import CacheStep, ExitCode, StepResult, TrainStep
from sae_operator.api.training_job import SAETrainingJobSpec

logger = logging.getLogger(__name__)

# A weight in float32, its gradient, and Adam's two moments.
_BYTES_PER_PARAMETER = 16
# What a checkpoint copies: the weight and the moments, and the weight of the SAE that is ready for use.
_CHECKPOINT_BYTES_PER_PARAMETER = 16
# Float32 arrays of [batch, d_sae] that a step holds at a time: pre-activations, and a penalty's or auxiliary loss's.
_LATENT_ARRAYS = 3
# Interpreter and libraries.
_PROCESS_BYTES = 2**30
# Suffixes of a Kubernetes quantity, from 10**-9 and from 2**10 on.
_DECIMAL_SUFFIXES = ("n", "u", "m", "", "k", "M", "G", "T", "P", "E")
_BINARY_SUFFIXES = ("Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def run_preflight(step: TrainStep | CacheStep, context: StepContext) -> StepResult:
    """Check a training job against its output, its cache and its model; claim the output.

    Results that a finished job of the same spec left are adopted.

    Raises:
        InvalidInput: what cannot work, with the field to change.
    """
    if not isinstance(step, TrainStep):
        raise TypeError(f"the preflight step is given a {type(step).__name__}")
    spec = step.spec
    output = context.open_store(spec.output)
    finished = finished_results(output) if check_output(output, step) else None
    if finished is not None and finished["tokens"] >= tokens_asked_for(spec):
        logger.info("finished results are there already below %s", output.uri)
        return result_of("preflight", finished, adopted=True)
    bytes_to_cache = 0
    manifest = _manifest(step, context.open_store(step.activations))
    if manifest is not None:
        statistics = {hook.name: hook for hook in manifest.hooks}
        rows = manifest.tokens if step.cache is None else step.cache.tokens
        facts = _inspect_scored(spec, manifest)
        reader = reader_memory_bytes(manifest.bytes, manifest.shard_bytes)
    else:
        assert step.cache is not None, "a cache without a spec has a manifest"
        facts = _inspect(spec, step.cache)
        statistics = _pretended_statistics(facts)
        rows = step.cache.tokens
        bytes_to_cache = cache_bytes(step.cache, facts)
        reader = reader_memory_bytes(bytes_to_cache, step.cache.storage.shard_bytes)
    plan = resolve_plan(spec, cache_rows=rows, statistics=statistics)
    _check_memory(spec, plan, reader)
    scored_model = facts.total_parameter_bytes if facts is not None and scores_with_model(spec) else 0
    memory = memory_bytes(plan, reader + scored_model)
    # Last, so that a spec that cannot work does not keep its mended successor from the output.
    claim_output(output, step)
    return StepResult(
        step="preflight",
        exit_code=ExitCode.DONE,
        reason="Completed",
        message=f"{len(plan.saes)} SAEs, {plan.tokens} tokens in {plan.steps} steps of {plan.batch_size}",
        adopted=False,
        plan={"bytes": bytes_to_cache, "gpuSeconds": None, "memoryBytes": memory},
    )


def _manifest(step: TrainStep, store: ObjectStore) -> CacheManifest | None:
    """The manifest of the cache; None when it is still to be built."""
    if step.cache is not None:
        with _fields_of_cache(step.spec):
            return finished_manifest(store, step.cache)
    try:
        return read_manifest(store)
    except InvalidInput as error:
        raise InvalidInput(error.reason, error.message, field="spec.activations.uri") from error


def _inspect(spec: SAETrainingJobSpec, cache: ActivationCacheSpec) -> ModelFacts:
    """Facts of the model, after checking what the cache asks of it."""
    with _fields_of_cache(spec):
        facts = inspect_model(cache.model, [hook.name for hook in cache.hooks])
        check_context_size(facts, cache.context_size)
        check_batch_size(cache.model, cache.context_size)
        check_size(cache, facts)
    _check_head(spec, facts)
    return facts


def _inspect_scored(spec: SAETrainingJobSpec, manifest: CacheManifest) -> ModelFacts | None:
    """Facts of the model of a finished cache, where training will need it again: for the CE-loss score."""
    if not scores_with_model(spec):
        return None
    source = ModelSource.model_validate(manifest.spec["model"])
    hooks = [hook.name for hook in manifest.hooks]
    try:
        facts = inspect_model(source, hooks, revision=manifest.model["revision"])
    except InvalidInput as error:
        raise InvalidInput(
            error.reason,
            f"ce_loss_score needs the model that the cache is of: {error.message}; leave it out, or bring the model",
            field="spec.evaluation.metrics",
        ) from error
    _check_head(spec, facts)
    return facts


def scores_with_model(spec: SAETrainingJobSpec) -> bool:
    """Whether the training pod loads the whole language model."""
    return "ce_loss_score" in spec.evaluation.metrics


def _check_head(spec: SAETrainingJobSpec, facts: ModelFacts) -> None:
    if scores_with_model(spec) and not facts.predicts_tokens:
        raise InvalidInput(
            "NoLanguageModelHead",
            f"{facts.name!r} predicts no tokens; leave ce_loss_score out",
            field="spec.evaluation.metrics",
        )


@contextmanager
def _fields_of_cache(spec: SAETrainingJobSpec) -> Iterator[None]:
    """Errors about a cache's spec, told with the path that they have from the training job."""
    try:
        yield
    except InvalidInput as error:
        if not error.field:
            raise
        below = error.field.removeprefix("spec.")
        if spec.activations.cache is not None:
            raise InvalidInput(error.reason, error.message, field=f"spec.activations.cache.{below}") from error
        name = spec.activations.cache_ref.name if spec.activations.cache_ref else ""
        raise InvalidInput(
            error.reason,
            f"spec.{below} of ActivationCache {name!r}: {error.message}",
            field="spec.activations.cacheRef",
        ) from error


def _pretended_statistics(facts: ModelFacts) -> dict[str, HookStatistics]:
    """Statistics of activations that nobody has seen yet: widths are right; what follows from the rest is not told."""
    return {
        hook: HookStatistics(name=hook, d_in=d_in, mean=[0.0] * d_in, mean_norm=1.0, mean_squared_norm=1.0)
        for hook, d_in in facts.d_in.items()
    }


def memory_bytes(plan: TrainingPlan, held_bytes: int) -> int:
    """What the training pod needs, device and host together: weights with gradients and moments, a checkpoint of them,
    a step, and `held_bytes` of the reader's shards and of a language model."""
    weights = _parameters(plan) * (_BYTES_PER_PARAMETER + _CHECKPOINT_BYTES_PER_PARAMETER)
    return _PROCESS_BYTES + held_bytes + weights + _LATENT_ARRAYS * _latent_bytes(plan)


def _parameters(plan: TrainingPlan) -> int:
    return sum(2 * sae.d_in * sae.d_sae + sae.d_in + sae.d_sae for sae in plan.saes)


def _latent_bytes(plan: TrainingPlan) -> int:
    return max(sae.d_sae for sae in plan.saes) * plan.batch_size * 4


def _check_memory(spec: SAETrainingJobSpec, plan: TrainingPlan, reader: int) -> None:
    """Raises InvalidInput when a pod without a GPU cannot even hold the weights, one step and the shards it reads."""
    limits = spec.run.resources.limits
    if "memory" not in limits or any("gpu" in name for name in limits):
        return
    training = _parameters(plan) * _BYTES_PER_PARAMETER + _latent_bytes(plan)
    limit = quantity_bytes(limits["memory"])
    if limit < training + reader:
        raise InvalidInput(
            "NotEnoughMemory",
            f"weights and one step alone take {training >> 20} MiB and the shards in use {reader >> 20} MiB, the limit "
            f"is {limit >> 20} MiB; raise it, or lower batchSize, dSae, the number of SAEs or the cache's shardBytes",
            field="spec.run.resources.limits.memory",
        )


def quantity_bytes(quantity: int | str) -> int:
    """A Kubernetes quantity of memory in bytes: `1536Mi`, `2G`, `1e9`, `4096`."""
    text = str(quantity)
    number = text.rstrip("numkKMGTPEi")
    suffix = text[len(number) :]
    if suffix in _BINARY_SUFFIXES:
        return int(float(number) * 2 ** (10 * (_BINARY_SUFFIXES.index(suffix) + 1)))
    return int(float(number) * 10.0 ** (3 * (_DECIMAL_SUFFIXES.index(suffix) - 3)))
