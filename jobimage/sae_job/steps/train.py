"""The step `train`: activations in, trained SAEs, results and a report out, in one process or several together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from sae_job.errors import PeerLost, Stopped
from sae_job.evaluation.cross_entropy import Splice
from sae_job.evaluation.metrics import HeldOutRows
from sae_job.steps.activation_sources import ActivationSource, OpenActivations, open_source
from sae_job.steps.context import StepContext
from sae_job.steps.fields import fields_of_activations
from sae_job.steps.figure_folder import comparison_of
from sae_job.steps.model_evaluation import ModelEvaluation, evaluates_model
from sae_job.steps.observers import observed, remove_metrics_parts
from sae_job.steps.output_marker import RESULTS_KEY, claim_output, finished_results, result_of
from sae_job.steps.train_results import Training, leave_results, leave_saes, results_of
from sae_job.storage.base import ObjectStore
from sae_job.training.checkpoints import Checkpoints, Snapshot
from sae_job.training.continuation import continues
from sae_job.training.loop import TrainingLoop
from sae_job.training.place import Place
from sae_job.training.plan import TrainingPlan, resolve_plan, tokens_asked_for
from sae_job.training.ranks import DistributedRanks, OnlyProcess, SharedStream, joined
from sae_job.training.trainer import Trainer
from sae_job.training.warm_start import load_starts
from sae_operator.api.steps import CacheStep, ExitCode, StepResult, TrainStep

logger = logging.getLogger(__name__)

Peers = DistributedRanks | OnlyProcess


def run_train(step: TrainStep | CacheStep, context: StepContext) -> StepResult:
    """Train the SAEs of a job, continuing from its last checkpoint, and leave them with their results in its output.

    Of several processes the first one alone writes; the others end when it has, and as it does.

    Raises:
        InvalidInput: the spec does not fit the cache, the output is another job's, or all SAEs diverged.
        Stopped: asked to stop; a checkpoint is stored.
        StoreError: the store failed.
        PeerLost: another process ended.
    """
    if not isinstance(step, TrainStep):
        raise TypeError(f"the train step is given a {type(step).__name__}")
    device = _device(context.place)
    with fields_of_activations(step.spec), _peers(context.place, device) as ranks:
        if isinstance(ranks, DistributedRanks) and ranks.index > 0:
            return _train_beside(step, context, ranks, device)
        try:
            result = _train(step, context, ranks, device)
        except BaseException as error:
            ranks.conclude(error)
            raise
        ranks.conclude(None)
        return result


def _device(place: Place) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", place.local_index)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _peers(place: Place, device: torch.device) -> Iterator[Peers]:
    if place.size == 1:
        yield OnlyProcess()
        return
    with joined(place, device) as ranks:
        yield ranks


def _train_beside(step: TrainStep, context: StepContext, ranks: DistributedRanks, device: torch.device) -> StepResult:
    """The part of a process that is not the first one."""
    try:
        job = _begin(step, context, ranks, device)
        if isinstance(job, _Job):
            try:
                job.loop.run()
            finally:
                job.source.close()
    except Stopped as stopped:
        logger.info("%s", stopped)
    outcome = ranks.await_conclusion(context.should_stop)
    if outcome == Stopped.__name__:
        raise Stopped("stopped with the first process, which stores a checkpoint")
    if outcome:
        raise PeerLost(f"the first process ended with {outcome}")
    return StepResult(step=step.step, exit_code=ExitCode.DONE, reason="Completed")


def _train(step: TrainStep, context: StepContext, ranks: Peers, device: torch.device) -> StepResult:
    """The part of the first process, or of the only one."""
    job = _begin(step, context, ranks, device)
    if isinstance(job, StepResult):
        return job
    with observed(step, job.output, job.trainer.plan, anew=job.anew, now=context.now) as observers:
        job.trainer.observers = observers
        return _run(step, context, job, ranks, device)


def _run(step: TrainStep, context: StepContext, job: _Job, ranks: Peers, device: torch.device) -> StepResult:
    """Train, and leave what comes of it."""
    spec, trainer, output = step.spec, job.trainer, job.output
    trainer.should_stop = context.should_stop
    evaluation: ModelEvaluation | None = None
    if evaluates_model(spec):
        evaluation = ModelEvaluation(job.source, job.data.held_out, metrics=frozenset(spec.evaluation.metrics))
        trainer.of_model = evaluation
    try:
        job.loop.run()
        seconds = job.loop.seconds
        if evaluation is not None:
            # The score takes minutes that must not cost the training when they are interrupted.
            job.checkpoints.write(trainer.snapshot({"seconds": seconds}))
    finally:
        job.source.close()
    densities = leave_saes(output, trainer, spec.sae_format)
    figures: dict[str, dict[str, float | None]] = {}
    if evaluation is not None:
        figures = _model_figures(trainer, evaluation, lambda: context.should_stop() or ranks.stop_wanted())
        trainer.tell_of_model(figures)
    training = Training(trainer, job.source, job.data.held_out, seconds, device, ranks.size)
    failed = [sae.name for sae in trainer.saes if sae.phase == "Failed"]
    results = results_of(step, training, figures, _last_good(job.checkpoints, failed))
    leave_results(output, step, trainer, results, densities)
    job.checkpoints.remove_all(keep=failed)
    result = result_of("train", results, adopted=False)
    context.reporter.update(saes=result.saes)
    return result


@dataclass(frozen=True)
class _Job:
    """A training that is ready to run.

    Attributes:
        anew: whether it begins although there are results, of fewer tokens.
    """

    output: ObjectStore
    checkpoints: Checkpoints
    source: ActivationSource
    data: OpenActivations
    trainer: Trainer
    loop: TrainingLoop
    anew: bool


def _begin(step: TrainStep, context: StepContext, ranks: Peers, device: torch.device) -> _Job | StepResult:
    """Make everything ready, on all processes alike; a result where there are finished ones already."""
    spec, first = step.spec, ranks.index == 0
    output = context.open_store(spec.output)
    checkpoints = Checkpoints(output, keep=spec.checkpoints.keep, layout=spec.sae_format)

    def claim() -> dict[str, Any] | None:
        claim_output(output, step)
        return finished_results(output)

    # All look before the first one changes anything.
    finished, _ = ranks.together(claim)
    if finished is not None and finished["tokens"] >= tokens_asked_for(spec):
        logger.info("finished results are there already: %s/%s", output.uri, RESULTS_KEY)
        if first:
            checkpoints.remove_all(keep=[sae["name"] for sae in finished["saes"] if sae["phase"] == "Failed"])
            remove_metrics_parts(output)
        return result_of("train", finished, adopted=True)
    left_over = None if finished is None else finished["tokens"]

    def planned() -> tuple[ActivationSource, TrainingPlan]:
        source = open_source(step, context, device=device)
        return source, resolve_plan(spec, cache_rows=source.rows, widths=source.widths, ranks=ranks.size)

    (source, plan), _ = ranks.together(planned)
    # The first one removes checkpoints that cannot be used; then all find the same.
    snapshot = ranks.in_turn(lambda: _checkpoint(checkpoints, plan, left_over=left_over), early=first)

    def opened() -> tuple[TrainingPlan, OpenActivations]:
        if snapshot is not None:
            scaled = plan.with_scales_of(snapshot.state["plan"])
        else:
            scaled = plan.scaled_by(source.statistics(plan.hooks)) if plan.needs_statistics else plan
        return scaled, source.open(scaled, replace(context.place, index=ranks.index, size=ranks.size))

    try:
        # What is fetched for a pod is fetched by its first process.
        plan, data = ranks.in_turn(opened, early=context.place.local_index == 0)
        stream, should_stop = data.stream, context.should_stop
        if isinstance(ranks, DistributedRanks):
            stream = SharedStream(data.stream, ranks, context.should_stop)
            should_stop = stream.should_stop
        starts, _ = ranks.together(lambda: load_starts(plan, context.open_store) if snapshot is None else {})
        trainer = Trainer(
            plan,
            stream,
            {hook: HeldOutRows(rows, device=device) for hook, rows in data.held_out.activations.items()},
            metrics=frozenset(spec.evaluation.metrics),
            provenance={hook: source.provenance(hook) for hook in plan.hooks},
            device=device,
            ranks=ranks,
            starts=starts,
        )
        trainer.comparison = comparison_of(step, plan, output, context, ranks)
        if snapshot is None:
            if left_over is not None:
                logger.info("the results there are of %d tokens: training again from the start", left_over)
            trainer.initialize()
            if isinstance(ranks, DistributedRanks):
                for sae in trainer.saes:
                    sae.take(ranks.broadcast_)
        else:
            logger.info("continuing from the checkpoint of %d tokens", snapshot.tokens)
            trainer.restore(snapshot)
    except BaseException:
        source.close()
        raise
    text = "%d SAEs, %d steps of %d tokens on %s in %d processes"
    logger.info(text, len(plan.saes), plan.steps, plan.batch_size, device, ranks.size)
    loop = TrainingLoop(
        trainer,
        checkpoints if first else None,
        context.reporter,
        should_stop=should_stop,
        now=context.now,
        seconds_before=0.0 if snapshot is None else snapshot.state["seconds"],
        stored_tokens=None if snapshot is None else snapshot.tokens,
    )
    anew = snapshot is None and left_over is not None
    return _Job(output, checkpoints, source, data, trainer, loop, anew)


def _checkpoint(checkpoints: Checkpoints, plan: TrainingPlan, *, left_over: int | None) -> Snapshot | None:
    """The checkpoint to go on from.

    Args:
        left_over: tokens of finished results: a checkpoint of as many is what their training left.
    """

    def fits(state: Mapping[str, Any]) -> bool:
        return state["plan"]["tokens"] != left_over and continues(plan, state)

    return checkpoints.newest(fits)


def _last_good(checkpoints: Checkpoints, failed: list[str]) -> dict[str, str]:
    """Folders in the output with the last good weights of SAEs that failed."""
    found = {name: checkpoints.last_good(name) for name in failed}
    return {name: f"checkpoints/{tokens}/{name}" for name, tokens in found.items() if tokens is not None}


def _model_figures(
    trainer: Trainer, evaluation: ModelEvaluation, should_stop: Callable[[], bool]
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
