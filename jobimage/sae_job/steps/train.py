"""The step `train`: activations in, trained SAEs, results and a report out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch

from sae_job.activations.contexts import ContextReader
from sae_job.activations.reader import HeldOut
from sae_job.errors import InvalidInput, Stopped
from sae_job.evaluation.cross_entropy import CrossEntropy, cross_entropies
from sae_job.evaluation.metrics import HeldOutRows
from sae_job.reporting.report import render_report
from sae_job.steps.activation_sources import ActivationSource, open_source
from sae_job.steps.context import StepContext
from sae_job.steps.fields import fields_of_activations
from sae_job.steps.output_marker import RESULTS_KEY, claim_output, finished_results, result_of
from sae_job.storage.base import ObjectStore
from sae_job.text.plan import CacheIndex
from sae_job.text.usable import excluded_token_ids
from sae_job.training.checkpoints import Checkpoints, Snapshot, metrics_lines
from sae_job.training.loop import TrainingLoop
from sae_job.training.plan import TrainingPlan, resolve_plan, tokens_asked_for
from sae_job.training.trainer import Trainer, continues
from sae_operator.api.steps import CacheStep, StepResult, TrainStep
from sae_operator.api.training_job import SAETrainingJobSpec

logger = logging.getLogger(__name__)

METRICS_KEY, REPORT_KEY = "metrics.jsonl", "report.html"
# Tokens that the CE-loss score runs the whole model on, several times: enough for two digits, minutes on a CPU.
CROSS_ENTROPY_TOKENS = 8192
CROSS_ENTROPY_BATCH_TOKENS = 2048
PACKAGES = ("sae-operator", "torch", "safetensors")


def run_train(step: TrainStep | CacheStep, context: StepContext) -> StepResult:
    """Train the SAEs of a job, continuing from its last checkpoint, and leave them with their results in its output.

    Raises:
        InvalidInput: the spec does not fit the cache, the output is another job's, or all SAEs diverged.
        Stopped: asked to stop; a checkpoint is stored.
        StoreError: the store failed.
    """
    if not isinstance(step, TrainStep):
        raise TypeError(f"the train step is given a {type(step).__name__}")
    with fields_of_activations(step.spec):
        return _train(step, context)


def _train(step: TrainStep, context: StepContext) -> StepResult:
    spec = step.spec
    output = context.open_store(spec.output)
    claim_output(output, step)
    checkpoints = Checkpoints(output, keep=spec.checkpoints.keep)
    finished = finished_results(output)
    if finished is not None and finished["tokens"] >= tokens_asked_for(spec):
        logger.info("finished results are there already: %s/%s", output.uri, RESULTS_KEY)
        checkpoints.remove_all()
        return result_of("train", finished, adopted=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = open_source(step, context, device=device)
    plan = resolve_plan(spec, cache_rows=source.rows, widths=source.widths)
    left_over = None if finished is None else finished["tokens"]
    snapshot = _checkpoint(checkpoints, plan, left_over=left_over)
    if snapshot is not None:
        plan = plan.with_scales_of(snapshot.state["plan"])
    elif plan.needs_statistics:
        plan = plan.scaled_by(source.statistics(plan.hooks))
    try:
        data = source.open(plan)
        trainer = Trainer(
            plan,
            data.stream,
            {hook: HeldOutRows(rows, device=device) for hook, rows in data.held_out.activations.items()},
            metrics=frozenset(spec.evaluation.metrics),
            provenance={hook: source.provenance(hook) for hook in plan.hooks},
            device=device,
        )
        if snapshot is None:
            if left_over is not None:
                logger.info("the results there are of %d tokens: training again from the start", left_over)
            trainer.initialize()
        else:
            logger.info("continuing from the checkpoint of %d tokens", snapshot.tokens)
            trainer.restore(snapshot)
        logger.info("%d SAEs, %d steps of %d tokens on %s", len(plan.saes), plan.steps, plan.batch_size, device)
        loop = TrainingLoop(
            trainer,
            checkpoints,
            context.reporter,
            should_stop=context.should_stop,
            now=context.now,
            seconds_before=0.0 if snapshot is None else snapshot.state["seconds"],
            stored_tokens=None if snapshot is None else snapshot.tokens,
        )
        loop.run()
        seconds = loop.seconds
        if "ce_loss_score" in spec.evaluation.metrics:
            # The score takes minutes that must not cost the training when they are interrupted.
            checkpoints.write(trainer.snapshot({"seconds": seconds}))
    finally:
        source.close()
    densities = _leave_saes(output, trainer)
    scores = _cross_entropies(spec, trainer, source, data.held_out, device, should_stop=context.should_stop)
    results = _results(step, trainer, source, data.held_out, scores, seconds=seconds, device=device)
    _leave_results(output, spec, trainer, results, densities)
    checkpoints.remove_all()
    result = result_of("train", results, adopted=False)
    context.reporter.update(saes=result.saes)
    return result


def _checkpoint(checkpoints: Checkpoints, plan: TrainingPlan, *, left_over: int | None) -> Snapshot | None:
    """The checkpoint to go on from.

    Args:
        left_over: tokens of finished results: a checkpoint of as many is what their training left.
    """

    def fits(state: Mapping[str, Any]) -> bool:
        return state["plan"]["tokens"] != left_over and continues(plan, state)

    return checkpoints.newest(fits)


def _cross_entropies(
    spec: SAETrainingJobSpec,
    trainer: Trainer,
    source: ActivationSource,
    held_out: HeldOut,
    device: torch.device,
    *,
    should_stop: Callable[[], bool],
) -> dict[str, CrossEntropy]:
    """Cross-entropies on held-out contexts, where they are asked for.

    Raises:
        Stopped: asked to stop; the finished training is in a checkpoint.
    """
    if "ce_loss_score" not in spec.evaluation.metrics or not trainer.sound():
        return {}
    index = CacheIndex.load(source.store)
    sequence, position = held_out.sequence.long(), held_out.position.long()
    if index is None or len(sequence) == 0:
        raise InvalidInput(
            "NoHeldOutContexts",
            "ce_loss_score needs held-out contexts and the cache's tokens/ folder; hold out more, or drop the metric",
            field="spec.evaluation.metrics",
        )
    size = index.context_size
    count = min(int(sequence.max()) + 1, max(1, CROSS_ENTROPY_TOKENS // size))
    contexts = ContextReader(source.store, index).read(0, count)
    replaced = torch.zeros(contexts.shape, dtype=torch.bool)
    inside = sequence < count
    replaced[sequence[inside], position[inside]] = True
    model = source.whole_model()

    def stop_if_asked() -> None:
        if should_stop():
            raise Stopped(
                "stopped while the CE-loss score was taken; the training is done and stored in a checkpoint, and the "
                "next attempt takes the score",
                tokens=trainer.tokens,
            )

    return cross_entropies(
        model,
        contexts,
        replaced,
        {sae.name: (sae.plan.hook, sae.inference()) for sae in trainer.sound()},
        # What no SAE is trained on, where the spec names tokens.
        ignore_token_ids=excluded_token_ids(source.sampling, index.tokenizer.special_token_ids),
        batch_size=max(1, CROSS_ENTROPY_BATCH_TOKENS // size),
        between_batches=stop_if_asked,
    )


def _results(
    step: TrainStep,
    trainer: Trainer,
    source: ActivationSource,
    held_out: HeldOut,
    scores: Mapping[str, CrossEntropy],
    *,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    plan = trainer.plan
    return {
        "name": step.name,
        "namespace": step.namespace,
        "saes": [_sae_results(trainer, index, scores) for index in range(len(trainer.saes))],
        "tokens": plan.tokens,
        "held_out_tokens": len(held_out.sequence),
        "tokens_per_second": plan.tokens / seconds if seconds > 0 else None,
        "provenance": {
            **source.facts(),
            "spec": step.spec.to_manifest(),
            "resolved": plan.record(),
            "versions": {package: version(package) for package in PACKAGES},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        },
    }


def _sae_results(trainer: Trainer, index: int, scores: Mapping[str, CrossEntropy]) -> dict[str, Any]:
    sae, plan = trainer.saes[index], trainer.plan
    last = trainer.evaluation_after(plan.steps, sae.name)
    tenth = trainer.evaluation_after(plan.tenth_step, sae.name)
    score = scores.get(sae.name)
    return {
        "name": sae.name,
        "phase": "Succeeded" if sae.failure is None else "Failed",
        "message": sae.failure,
        "hook": sae.plan.hook,
        "architecture": sae.plan.spec.architecture.type,
        "d_in": sae.plan.d_in,
        "d_sae": sae.plan.d_sae,
        "explained_variance": last.get("explained_variance"),
        "explained_variance_at_10_percent": tenth.get("explained_variance"),
        "l0": last.get("l0"),
        "mse": last.get("mse"),
        "dead_fraction": last.get("dead_fraction"),
        "ce_loss_score": None if score is None else score.score,
        "ce_loss_clean": None if score is None else score.clean,
        "ce_loss_with_sae": None if score is None else score.spliced,
        "ce_loss_with_ablation": None if score is None else score.ablated,
        "loss": trainer.latest(sae.name).get("loss"),
    }


def _leave_saes(output: ObjectStore, trainer: Trainer) -> dict[str, list[float]]:
    """Write the SAEs and the metrics, before anything can go wrong with the score; returns their log10 densities."""
    densities: dict[str, list[float]] = {}
    for sae in trainer.sound():
        log_densities = sae.log_densities()
        sae.inference().save(output, sae.name, log_sparsity=log_densities)
        if log_densities is not None:
            densities[sae.name] = log_densities.tolist()
    output.put(METRICS_KEY, metrics_lines(trainer.lines))
    return densities


def _leave_results(
    output: ObjectStore,
    spec: SAETrainingJobSpec,
    trainer: Trainer,
    results: dict[str, Any],
    densities: dict[str, list[float]],
) -> None:
    """Write report and results; results.json last, since its presence means that all is there."""
    output.put(REPORT_KEY, render_report(results, trainer.lines, densities, spec.to_manifest()).encode())
    output.put(RESULTS_KEY, (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())
