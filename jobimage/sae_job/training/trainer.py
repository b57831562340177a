"""Trains n SAEs on each batch of one stream of activations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, get_args

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.evaluation.cross_entropy import Splice
from sae_job.evaluation.metrics import HeldOutRows
from sae_job.saes.base import SAE
from sae_job.saes.config import Provenance
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS, normalize_rows
from sae_job.saes.step_memory import StepMemory
from sae_job.saes.trainable import ONE_PROCESS, Ranks
from sae_job.training.bad_rows import LocatedStream, check_held_out, check_rows
from sae_job.training.checkpoints import Snapshot, random_states, restore_random_states
from sae_job.training.median_stop import Comparison
from sae_job.training.metric_lines import MetricLines
from sae_job.training.observer import Moment, SparsityWindow, TrainingObserver
from sae_job.training.plan import SaePlan, TrainingPlan
from sae_job.training.ranks import whole_batch
from sae_job.training.sae_training import SaeTraining, is_finite, sample_rows
from sae_job.training.variance import batch_variance
from sae_operator.api.training_job import Metric

logger = logging.getLogger(__name__)

# Steps after which losses are looked at even where no line of metrics is due: to find the rows that broke one, the
# places of the stream are kept until then.
MOST_STEPS_UNCHECKED = 1000


# Figures of evaluations that are kept only where the job asks for them; others always are.
METRICS = frozenset(get_args(Metric))

# Figures by SAE; called with SAEs and where they go in the model, and with what is called in between and may raise.
ModelFigures = Callable[[Mapping[str, Splice], Callable[[], None]], Mapping[str, Mapping[str, float | None]]]


class _Interrupted(Exception):
    """An evaluation was cut off because the training is asked to stop."""


class ActivationStream(LocatedStream, Protocol):
    """Batches in an order that depends on nothing but the data and a seed."""

    @property
    def training_rows(self) -> int:
        """Rows of one epoch."""
        ...

    def state(self) -> dict[str, Any]: ...


class Trainer:
    """The training of a job, step by step.

    Of a batch the SAEs share its scaling or normalisation, and, since they step one after another, the memory that a
    step writes: on a CPU, each SAE's weights are bit for bit what training it alone gives (with the same number of
    threads).

    Of several ranks each has its own rows of every batch. What is computed of them is summed, so that weights,
    counters, failures and figures are the same on all; only the first one observes and takes snapshots.

    Args:
        plan: the job.
        stream: batches of `plan.batch_size / ranks.size` rows per hook, in raw scale.
        held_out: hook -> held-out rows, in raw scale; of all hooks of the plan the same rows.
        metrics: which figures of evaluations are kept.
        provenance: hook -> what saved SAEs tell of its activations.
        device: where the SAEs lie.
        ranks: the processes that train together.
        starts: SAE -> saved SAE whose weights it begins with, as `load_starts` gives them.
        observers: who is told what happens.

    Attributes:
        record: the lines of metrics.jsonl so far.
        observers: as given; may be set until `begin`.
        of_model: what SAEs cost the language model, where it is evaluated during the training; on the first rank only.
        comparison: with SAEs of other jobs, where the job asks for it; on all ranks.
        should_stop: looked at within an evaluation, of a training in one process: what is left of it is done by the
            next `step`, or, after a snapshot in between, by the next attempt.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        stream: ActivationStream,
        held_out: Mapping[str, HeldOutRows],
        *,
        metrics: frozenset[str],
        provenance: Mapping[str, Provenance],
        device: torch.device,
        ranks: Ranks = ONE_PROCESS,
        starts: Mapping[str, SAE] | None = None,
        observers: Sequence[TrainingObserver] = (),
    ) -> None:
        self.plan = plan
        self.steps_done = 0
        self.record = MetricLines()
        self.observers = observers
        memory = StepMemory()
        self.saes = [
            SaeTraining(
                sae, plan, index, provenance=_provenance(sae, provenance), device=device, ranks=ranks, memory=memory
            )
            for index, sae in enumerate(plan.saes)
        ]
        self._stream = stream
        self._held_out = held_out
        self._metrics = metrics
        self._device = device
        self._ranks = ranks
        self._starts = starts or {}
        # Batches are copied into the same memory each time: fresh pages cost as much as the work on them.
        self._seen: dict[str, Tensor] = {}
        # Step -> where the stream stood before it, of steps whose losses nobody has looked at yet.
        self._places: dict[int, dict[str, Any]] = {}
        self.of_model: ModelFigures | None = None
        self.comparison: Comparison | None = None
        self.should_stop: Callable[[], bool] = lambda: False
        # Whether an evaluation that is due after the last step was interrupted.
        self._unevaluated = False

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.steps_done * self.plan.batch_size

    @property
    def finished(self) -> bool:
        """Whether all steps and evaluations are done, or no SAE is left to train."""
        return (self.steps_done >= self.plan.steps and not self._unevaluated) or not self.running()

    @property
    def moment(self) -> Moment:
        finetuning = self.steps_done > 0 and self.plan.is_finetuning(self.steps_done - 1)
        return Moment(self.steps_done, self.tokens, finetuning)

    def running(self) -> list[SaeTraining]:
        """The SAEs that are still trained."""
        return [sae for sae in self.saes if sae.phase == "Running"]

    def sound(self) -> list[SaeTraining]:
        """The SAEs that have not failed; those that were stopped early are among them."""
        return [sae for sae in self.saes if sae.phase != "Failed"]

    def initialize(self) -> None:
        """Set initial weights: of saved SAEs, or from the first rows of the stream, which are then trained on too.

        Raises:
            InvalidInput: these rows cannot be read, or are not finite.
        """
        for sae in self.saes:
            if sae.name in self._starts:
                sae.start_from(self._starts[sae.name])
        fresh = [sae for sae in self.saes if sae.name not in self._starts]
        if not fresh:
            return
        start = self._stream.state()
        wanted = max(sample_rows(sae.plan.d_sae) for sae in fresh)
        # No more than one pass over short data: a repeated row tells nothing new.
        batches = -(-min(wanted, self._stream.training_rows) // self.plan.batch_size)
        hooks = tuple(dict.fromkeys(hook for sae in fresh for hook in (sae.plan.hook, sae.plan.target_hook)))
        parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
        places: list[dict[str, Any]] = []
        for _ in range(batches):
            places.append(self._stream.state())
            batch = self._stream.next_batch()
            for hook, rows in parts.items():
                # The rows of all ranks, in the order of one process: all begin with the weights that one would have.
                rows.append(whole_batch(batch[hook].to(self._device, torch.float32, copy=True), self._ranks))
        self._stream.restore(start)
        samples = {hook: self._as_seen(hook, torch.cat(rows)) for hook, rows in parts.items()}
        if not all(bool(torch.isfinite(sample).all()) for sample in samples.values()):
            for step, place in enumerate(places):
                self._check_rows(step, place)
        for sae in fresh:
            sae.initialize(samples[sae.plan.hook], samples[sae.plan.target_hook])

    def begin(self) -> None:
        """Tell observers where the training stands; once, before the first step of this attempt.

        Raises:
            InvalidInput: all SAEs have failed in an earlier attempt.
        """
        self._end_when_all_failed()
        for observer in self.observers:
            observer.started(self.moment, self.record.lines)

    def step(self) -> None:
        """Train every running SAE on the next batch, and log and evaluate where it is due; only evaluate where the last
        step's evaluation was interrupted.

        Raises:
            InvalidInput: all SAEs have failed, or activations cannot be read or are not finite.
        """
        if self._unevaluated:
            self._evaluate()
            self._end_when_all_failed()
            return
        self._places[self.steps_done] = self._stream.state()
        batch = self._stream.next_batch()
        seen = {hook: self._copy(hook, batch[hook]) for hook in self.plan.hooks}
        for sae in self.running():
            sae.step(seen[sae.plan.hook], seen[sae.plan.target_hook], self.steps_done)
        self.steps_done += 1
        # Asking a GPU at every step would hold it up; there the check waits.
        if self._device.type == "cpu" or len(self._places) >= MOST_STEPS_UNCHECKED:
            self.settle()
        self._tell_windows()
        if self.plan.logs_after(self.steps_done):
            self._log()
        if self.plan.evaluates_after(self.steps_done) or self.plan.evaluates_model_after(self.steps_done):
            self._evaluate()
        self._end_when_all_failed()

    def _copy(self, hook: str, rows: Tensor) -> Float32[Tensor, "batch d_in"]:
        if hook not in self._seen:
            self._seen[hook] = torch.empty(rows.shape, dtype=torch.float32, device=self._device)
        return self._as_seen(hook, self._seen[hook].copy_(rows, non_blocking=True))

    def _as_seen(self, hook: str, rows: Float32[Tensor, "rows d_in"]) -> Float32[Tensor, "rows d_in"]:
        """Raw rows as the hook's SAEs see them; the rows are overwritten."""
        if self.plan.normalization in RUN_TIME_NORMALIZATIONS:
            return normalize_rows(rows, self.plan.normalization, out=rows)[0]
        return rows.mul_(self.plan.scales[hook])

    def settle(self) -> None:
        """Look at the losses of the steps that nobody has looked at yet, and freeze SAEs whose are not finite.

        Ranks do it after the same steps.

        Raises:
            InvalidInput: the activations of a step that broke one are not finite themselves.
        """
        bad = {sae.name: step for sae in self.running() if (step := sae.first_bad_step()) is not None}
        for step in sorted(set(bad.values())):
            self._check_rows(step, self._places[step])
        for sae in self.running():
            if sae.name in bad:
                sae.fail_at(bad[sae.name])
                self._tell_phase(sae)
        self._places.clear()

    def _check_rows(self, step: int, place: dict[str, Any]) -> None:
        check_rows(self._stream, place, self.plan.hooks, step=step, steps=self.plan.steps, ranks=self._ranks)

    @property
    def unsettled(self) -> bool:
        """Whether a loss is not finite that `settle` has not seen."""
        return any(sae.first_bad_step() is not None for sae in self.running())

    def _log(self) -> None:
        self.settle()
        variances: dict[str, float] = {}
        for sae in self.running():
            figures = sae.log_line(told_kernel=self.record.kernel(sae.name))
            figures = self._with_explained_variance(sae, figures, variances)
            self.record.add(sae.name, self.moment, figures)
            for observer in self.observers:
                observer.logged(sae.name, self.moment, figures)

    def _with_explained_variance(
        self, sae: SaeTraining, figures: dict[str, float | str], variances: dict[str, float]
    ) -> dict[str, float | str]:
        """A log line with the part of the batch's variance that the SAE explained, where its loss tells.

        Args:
            variances: of the batch, by hook, as far as they are known by now.
        """
        if self.plan.settings.mse_loss_normalization != "none":
            return figures
        hook = sae.plan.target_hook
        if hook not in variances:
            variances[hook] = batch_variance(self._seen[hook], self._ranks)
        if variances[hook] <= 0:
            return figures
        return {**figures, "explained_variance": 1 - float(figures["mse_loss"]) / variances[hook]}

    def _tell_windows(self) -> None:
        for sae in self.running():
            window = sae.closed_window()
            if window is None and self.steps_done == self.plan.steps:
                window = sae.last_window()
            if window is not None:
                self._tell_window(sae, window)

    def _tell_window(self, sae: SaeTraining, window: SparsityWindow) -> None:
        self.record.add(sae.name, self.moment, {"window": window.figures()})
        for observer in self.observers:
            observer.window(sae.name, self.moment, window)

    def _evaluate(self) -> None:
        """Evaluate what is due after the last step: all of it, or, where that is interrupted, nothing."""
        self.settle()
        # On all ranks: the language model's figures are taken on the first one alone.
        for sae in self.running():
            if not sae.check_weights(self.steps_done):
                self._tell_phase(sae)
        try:
            found = self._measure() if self.plan.evaluates_after(self.steps_done) else {}
            of_model = self._measure_with_model()
        except _Interrupted:
            self._unevaluated = True
            return
        self._unevaluated = False
        reasons: Mapping[str, str] = {}
        if self.comparison is not None and self.comparison.due_after(self.steps_done):
            reasons = self.comparison.reasons(found)
        for sae in self.running():
            if sae.name in of_model:
                self.record.add(sae.name, self.moment, {"model_evaluation": of_model[sae.name]})
                for observer in self.observers:
                    observer.evaluated(sae.name, self.moment, of_model[sae.name], sae.inference())
            if sae.name in found:
                self._tell_evaluation(sae, found[sae.name], worse_than_others=reasons.get(sae.name))

    def tell_of_model(self, figures: Mapping[str, Mapping[str, float | None]]) -> None:
        """Tell observers what the SAEs cost the language model at the end, which no line of metrics has."""
        for sae in self.sound():
            for observer in self.observers:
                if sae.name in figures:
                    observer.evaluated(sae.name, self.moment, figures[sae.name], sae.inference())

    def _measure(self) -> dict[str, dict[str, float | None]]:
        """Figures of the running SAEs on held-out rows."""
        found: dict[str, dict[str, float | None]] = {}
        for sae in self.running():
            figures = self._agreed(
                sae.evaluate(
                    sae.inference(),
                    self._held_out[sae.plan.hook],
                    self._held_out[sae.plan.target_hook],
                    between_chunks=self._stop_if_asked,
                )
            )
            if not is_finite(figures):
                for hook in (sae.plan.hook, sae.plan.target_hook):
                    check_held_out(self._held_out[hook].activations, hook)
                sae.diverged(self.steps_done)
                self._tell_phase(sae)
                continue
            found[sae.name] = figures
        return found

    def _measure_with_model(self) -> Mapping[str, Mapping[str, float | None]]:
        """What the running SAEs cost the language model, where that is due."""
        if self.of_model is None or not self.plan.evaluates_model_after(self.steps_done):
            return {}
        splices = {
            sae.name: Splice(sae.plan.hook, sae.inference(), sae.plan.spec.target_hook) for sae in self.running()
        }
        return self.of_model(splices, self._stop_if_asked)

    def _stop_if_asked(self) -> None:
        # Several ranks must do the same after each step; there an evaluation is waited for.
        if self._ranks.size == 1 and self.should_stop():
            raise _Interrupted

    def _tell_evaluation(
        self, sae: SaeTraining, figures: dict[str, float | None], *, worse_than_others: str | None
    ) -> None:
        kept = {name: value for name, value in figures.items() if name in self._metrics or name not in METRICS}
        self.record.add(sae.name, self.moment, {"evaluation": kept})
        told = ", ".join(
            f"{name} {value:.4g}" for name, value in kept.items() if name in self._metrics and value is not None
        )
        logger.info("%s after %d of %d tokens: %s", sae.name, self.tokens, self.plan.tokens, told)
        if self.observers:
            inference = sae.inference()
            for observer in self.observers:
                observer.evaluated(sae.name, self.moment, kept, inference)
        if self.steps_done < self.plan.steps:
            sae.stop_if_hopeless(figures, tokens=self.tokens, otherwise=worse_than_others)
        if sae.stopped is not None:
            window = sae.last_window()
            if window is not None:
                self._tell_window(sae, window)
            self._tell_phase(sae)

    def _agreed(self, figures: dict[str, float | None]) -> dict[str, float | None]:
        """The first rank's figures: what is decided by them must be the same on all, to the last bit."""
        if self._ranks.size == 1:
            return figures
        numbers = [float("nan") if value is None else value for value in figures.values()]
        first = self._ranks.gather(torch.tensor(numbers, dtype=torch.float64, device=self._device))[: len(numbers)]
        return {
            name: None if value is None else told
            for (name, value), told in zip(figures.items(), first.tolist(), strict=True)
        }

    def _tell_phase(self, sae: SaeTraining) -> None:
        for observer in self.observers:
            observer.phase(sae.name, self.moment, sae.phase, sae.message or "")

    def _end_when_all_failed(self) -> None:
        if not self.sound():
            raise InvalidInput(
                "TrainingDiverged",
                "; ".join(f"SAE {sae.name!r}: {sae.failure}" for sae in self.saes),
                field="spec.training.learningRate",
            )

    def tokens_of(self, sae: str) -> int:
        """Tokens that an SAE was trained on: fewer than the job's where it was stopped or failed, as far as its lines
        tell."""
        (training,) = (entry for entry in self.saes if entry.name == sae)
        if training.phase == "Running":
            return self.tokens
        return self.record.last_tokens(sae)

    def snapshot(self, extra: Mapping[str, Any]) -> Snapshot:
        """Copies of all that the training goes on from; changes nothing.

        An SAE whose weights are not finite is not among those that are ready for use, and one that has failed has no
        tensors: there is nothing to go on from.

        Args:
            extra: JSON-able state of the caller, stored beside the trainer's.
        """
        return Snapshot(
            tokens=self.tokens,
            state={
                "plan": self.plan.record(),
                "steps_done": self.steps_done,
                "stream": self._stream.state(),
                "failures": {sae.name: sae.failure for sae in self.saes},
                "stopped": {sae.name: sae.stopped for sae in self.saes},
                "unevaluated": self._unevaluated,
                **extra,
            },
            tensors={sae.name: sae.tensors() for sae in self.sound()},
            random=random_states(),
            metrics=list(self.record.lines),
            saes={sae.name: (sae.inference(), sae.log_densities()) for sae in self.sound() if sae.weights_are_finite()},
            moment=self.moment,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of a training that `continues` this one."""
        for sae in self.saes:
            sae.failure = snapshot.state["failures"][sae.name]
            sae.stopped = snapshot.state["stopped"][sae.name]
            if sae.phase != "Failed":
                sae.restore(snapshot.tensors[sae.name])
        self._stream.restore(snapshot.state["stream"])
        restore_random_states(snapshot.random)
        self.steps_done = snapshot.state["steps_done"]
        self._unevaluated = snapshot.state["unevaluated"]
        self.record = MetricLines(snapshot.metrics)


def _provenance(plan: SaePlan, of_hooks: Mapping[str, Provenance]) -> Provenance:
    """What a saved SAE tells of its activations; a transcoder of its target's hook, too."""
    source = of_hooks[plan.hook]
    if not plan.is_transcoder:
        return source
    target = of_hooks[plan.target_hook]
    return replace(source, hook_name_out=target.hook_name, hook_head_index_out=target.hook_head_index)
