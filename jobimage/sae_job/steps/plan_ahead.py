"""What a job will come to, as far as this machine knows: for people, before anything is started."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from sae_job.activations.reader import reader_memory_bytes
from sae_job.reporting.progress import ProgressReporter
from sae_job.steps.context import StepContext
from sae_job.steps.local import local_train_step
from sae_job.steps.memory import has_gpu, mebibytes, memory_limit, training_processes
from sae_job.steps.preflight import Survey, survey
from sae_job.steps.training_memory import TrainingMemory
from sae_job.storage.open import open_store
from sae_job.text.plan import row_bytes
from sae_job.training.plan import resolve_plan
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import LIVE_SHARDS_IN_BUFFER, cache_of
from sae_operator.api.resources import Resource
from sae_operator.api.training_job import SAETrainingJobSpec


def look_ahead(
    job: Resource, caches: Mapping[tuple[str, str], ActivationCacheSpec], *, store_root: Path | None
) -> Survey:
    """What preflight will find, from a model and stores that are here; nothing is written.

    Args:
        job: a SAETrainingJob.
        caches: namespace and name -> spec of the caches that cacheRef may name.
        store_root: folder that stands in for `s3://`.

    Raises:
        InvalidInput: what cannot work, with the field to change.
    """
    step = local_train_step("preflight", job.name, job.namespace, job.spec, caches)
    opener = partial(open_store, local_root=store_root)
    context = StepContext(
        reporter=ProgressReporter("validate"), should_stop=lambda: False, open_store=opener, now=time.time
    )
    return survey(step, opener(step.activations), context)


def assume(job: Resource, caches: Mapping[tuple[str, str], ActivationCacheSpec], *, d_in: int) -> Survey | None:
    """What a job comes to if all of its hooks have this width; what a model takes is left out. None where its cache is
    described elsewhere, so that nobody here knows how many rows there are.

    Raises:
        InvalidInput: what cannot work.
    """
    spec: SAETrainingJobSpec = job.spec
    cache = cache_of(spec)
    if spec.activations.cache_ref is not None:
        cache = caches.get((job.namespace, spec.activations.cache_ref.name))
    if cache is None:
        return None
    widths = {hook.key: d_in for hook in cache.hooks}
    plan = resolve_plan(spec, cache_rows=cache.tokens, widths=widths, ranks=training_processes(spec))
    size = cache.tokens * row_bytes(widths, cache.storage.dtype)
    if spec.activations.live is None:
        rows = reader_memory_bytes(size, cache.storage.shard_bytes)
    else:
        rows = min(size, LIVE_SHARDS_IN_BUFFER * cache.storage.shard_bytes)
    memory = TrainingMemory.of(plan, rows=rows, processes=training_processes(spec) // spec.parallelism)
    memory.check(spec)
    return Survey(plan, memory, 0 if spec.activations.live is not None else size)


def describe(found: Survey, spec: SAETrainingJobSpec) -> list[str]:
    """The plan, a line for each part of it."""
    plan = found.plan
    lines = [f"{plan.tokens:,} tokens in {plan.steps:,} steps of {plan.batch_size:,}, {plan.held_out_rows:,} held out"]
    if found.bytes_to_cache:
        lines.append(f"cache of {found.bytes_to_cache / 1e9:,.2f} GB")
    for sae in plan.saes:
        target = f" -> {sae.d_out}" if sae.is_transcoder else ""
        lines.append(
            f"{sae.name}: {sae.spec.architecture.type}, {sae.d_in} x {sae.d_sae:,}{target}, "
            f"learning rate {sae.learning_rate.peak:.3g}"
        )
    lines.append("memory of a training pod:")
    lines += [f"  {line}" for line in found.memory.lines(gpu=has_gpu(spec.run))]
    limit = memory_limit(spec.run)
    lines.append(f"  {'limit':<21}{mebibytes(limit) if limit is not None else '      none'}")
    return lines
