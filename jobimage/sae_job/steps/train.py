"""The step `train`: activations in, trained SAEs, results and a report out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch

from sae_job.activations.reader import HeldOut
from sae_job.errors import Stopped
from sae_job.evaluation.cross_entropy import Splice
from sae_job.evaluation.metrics import HeldOutRows
from sae_job.reporting.report import render_report
from sae_job.steps.activation_sources import ActivationSource, open_source
from sae_job.steps.context import StepContext
from sae_job.steps.fields import fields_of_activations
from sae_job.steps.model_evaluation import MODEL_FIGURES, ModelEvaluation, evaluates_model
from sae_job.steps.output_marker import RESULTS_KEY, claim_output, finished_results, result_of
from sae_job.storage.base import ObjectStore
from sae_job.training.checkpoints import Checkpoints, Snapshot, metrics_lines
from sae_job.training.loop import TrainingLoop
from sae_job.training.plan import TrainingPlan, resolve_plan, tokens_asked_for
from sae_job.training.trainer import Trainer, continues
from sae_operator.api.steps import CacheStep, StepResult, TrainStep
from sae_operator.api.training_job import SAETrainingJobSpec

logger = logging.getLogger(__name__)

METRICS_KEY, REPORT_KEY = "metrics.jsonl", "report.html"
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
        if evaluates_model(spec):
            # The score takes minutes that must not cost the training when they are interrupted.
            checkpoints.write(trainer.snapshot({"seconds": seconds}))
    finally:
        source.close()
    densities = _leave_saes(output, trainer)
    figures = {}
    if evaluates_model(spec):
        evaluation = ModelEvaluation(source, data.held_out, metrics=frozenset(spec.evaluation.metrics))
        figures = _model_figures(trainer, evaluation, should_stop=context.should_stop)
    results = _results(step, trainer, source, data.held_out, figures, seconds=seconds, device=device)
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


def _model_figures(
    trainer: Trainer, evaluation: ModelEvaluation, *, should_stop: Callable[[], bool]
) -> dict[str, dict[str, float | None]]:
    """What the SAEs cost the language model, where that is asked for.

    Raises:
        Stopped: asked to stop; the finished training is in a checkpoint.
    """

    def stop_if_asked() -> None:
        if should_stop():
            raise Stopped(
                "stopped while the CE-loss score was taken; the training is done and stored in a checkpoint, and the "
                "next attempt takes the score",
                tokens=trainer.tokens,
            )

    saes = {sae.name: Splice(sae.plan.hook, sae.inference(), sae.plan.spec.target_hook) for sae in trainer.sound()}
    return evaluation(saes, stop_if_asked)


def _results(
    step: TrainStep,
    trainer: Trainer,
    source: ActivationSource,
    held_out: HeldOut,
    figures: Mapping[str, Mapping[str, float | None]],
    *,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    plan = trainer.plan
    return {
        "name": step.name,
        "namespace": step.namespace,
        "saes": [_sae_results(trainer, index, figures) for index in range(len(trainer.saes))],
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


def _sae_results(trainer: Trainer, index: int, figures: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    sae, plan = trainer.saes[index], trainer.plan
    last = trainer.evaluation_after(plan.steps, sae.name)
    tenth = trainer.evaluation_after(plan.tenth_step, sae.name)
    of_model = figures.get(sae.name, {})
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
        **{name: of_model.get(name) for name in MODEL_FIGURES},
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
