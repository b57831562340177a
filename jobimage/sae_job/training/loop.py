"""The training from wherever it stands to its end: steps, progress, checkpoints, stopping."""

from __future__ import annotations

import logging
from collections.abc import Callable
from queue import SimpleQueue

from sae_job.errors import Stopped
from sae_job.reporting.progress import ProgressReporter
from sae_job.training.checkpoint_writer import CheckpointWriter
from sae_job.training.checkpoints import Checkpoints, Snapshot
from sae_job.training.trainer import Trainer
from sae_operator.api.steps import SaeProgress

logger = logging.getLogger(__name__)


class TrainingLoop:
    """Runs a trainer to its end.

    Args:
        trainer: initialised, or restored from a checkpoint.
        checkpoints: where checkpoints go; None on ranks that write none.
        reporter: where progress is told.
        should_stop: looked at between steps.
        now: seconds.
        seconds_before: seconds of training in earlier attempts.
        stored_tokens: tokens of the checkpoint that the trainer was restored from.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints | None,
        reporter: ProgressReporter,
        *,
        should_stop: Callable[[], bool],
        now: Callable[[], float],
        seconds_before: float = 0.0,
        stored_tokens: int | None = None,
    ) -> None:
        self._trainer = trainer
        self._checkpoints = checkpoints
        self._reporter = reporter
        self._should_stop = should_stop
        self._now = now
        self._start = now() - seconds_before
        self._stored_tokens = stored_tokens
        self._stored: SimpleQueue[Snapshot] = SimpleQueue()

    @property
    def seconds(self) -> float:
        """Seconds of training, earlier attempts included, waiting between them not."""
        return self._now() - self._start

    def run(self) -> None:
        """Train to the end.

        Raises:
            Stopped: asked to stop; a checkpoint is stored.
            InvalidInput: every SAE has failed, or activations cannot be read.
            StoreError: a checkpoint could not be written.
        """
        trainer, plan = self._trainer, self._trainer.plan
        trainer.begin()
        self._reporter.update(
            tokens=trainer.tokens,
            total_tokens=plan.tokens,
            saes=sae_progress(trainer),
            checkpoint_tokens=self._stored_tokens,
        )
        with CheckpointWriter(self._checkpoints, self._on_stored) as writer:
            last = self._now()
            while not trainer.finished:
                if self._should_stop():
                    self._stop(writer)
                lines = len(trainer.record.lines)
                trainer.step()
                saes = sae_progress(trainer) if len(trainer.record.lines) > lines else None
                self._reporter.update(tokens=trainer.tokens, saes=saes)
                if plan.checkpoints_after(trainer.steps_done) and not trainer.finished:
                    # All ranks, after the same step: a step that broke an SAE must not be stored as a good one.
                    trainer.settle()
                    self._submit(writer)
                    last = self._now()
                elif self._is_due(last, writer):
                    self._submit(writer)
                    last = self._now()
                self._tell_stored()
        self._tell_stored()
        for observer in trainer.observers:
            observer.finished()

    def _is_due(self, last: float, writer: CheckpointWriter) -> bool:
        """Whether a checkpoint by time is due. This rank alone decides: a snapshot changes nothing, and where a step
        has broken an SAE, it waits until all ranks have seen it."""
        every = self._trainer.plan.checkpoint_every_seconds
        return (
            self._checkpoints is not None
            and every is not None
            and self._now() - last >= every
            and not self._trainer.finished
            and not writer.busy
            and not self._trainer.unsettled
        )

    def _submit(self, writer: CheckpointWriter) -> None:
        if self._checkpoints is not None:
            writer.submit(self._trainer.snapshot({"seconds": self.seconds}))

    def _on_stored(self, snapshot: Snapshot) -> None:
        """In the writer's thread."""
        self._stored_tokens = snapshot.tokens
        self._stored.put(snapshot)
        self._reporter.update(checkpoint_tokens=snapshot.tokens)
        logger.info("checkpoint of %d tokens stored", snapshot.tokens)

    def _tell_stored(self) -> None:
        """Tell observers, in the training's own thread, which checkpoints are stored by now."""
        while not self._stored.empty():
            snapshot = self._stored.get()
            for observer in self._trainer.observers:
                observer.checkpointed(snapshot.moment, snapshot.saes)

    def _stop(self, writer: CheckpointWriter) -> None:
        trainer = self._trainer
        trainer.settle()
        writer.wait()
        if self._stored_tokens != trainer.tokens and trainer.steps_done > 0:
            self._submit(writer)
            writer.wait()
        self._tell_stored()
        if trainer.steps_done == 0:
            raise Stopped("stopped before the first step")
        done = f"{trainer.tokens} of {trainer.plan.tokens}"
        raise Stopped(
            f"stopped after {done} tokens; a checkpoint is stored, and training goes on from there",
            tokens=self._stored_tokens,
        )


def sae_progress(trainer: Trainer) -> list[SaeProgress]:
    """The latest figures of each SAE."""
    return [
        SaeProgress.model_validate(
            {"name": sae.name, "phase": sae.phase, "message": sae.message, **trainer.record.latest(sae.name)}
        )
        for sae in trainer.saes
    ]
