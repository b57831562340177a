"""The training from wherever it stands to its end: steps, progress, checkpoints, stopping."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sae_job.errors import Stopped
from sae_job.reporting.progress import ProgressReporter
from sae_job.training.checkpoint_writer import CheckpointWriter
from sae_job.training.checkpoints import Checkpoints
from sae_job.training.trainer import Trainer
from sae_operator.api.steps import SaeProgress

logger = logging.getLogger(__name__)


class TrainingLoop:
    """Runs a trainer to its end.

    Args:
        trainer: initialised, or restored from a checkpoint.
        checkpoints: where checkpoints go.
        reporter: where progress is told.
        should_stop: looked at between steps.
        now: seconds.
        seconds_before: seconds of training in earlier attempts.
        stored_tokens: tokens of the checkpoint that the trainer was restored from.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints,
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
                lines = len(trainer.lines)
                trainer.step()
                saes = sae_progress(trainer) if len(trainer.lines) > lines else None
                self._reporter.update(tokens=trainer.tokens, saes=saes)
                due = plan.checkpoint_every_seconds is not None and (
                    self._now() - last >= plan.checkpoint_every_seconds and not trainer.finished and not writer.busy
                )
                if due or plan.checkpoints_after(trainer.steps_done):
                    last = self._now()
                    writer.submit(trainer.snapshot({"seconds": self.seconds}))

    def _on_stored(self, tokens: int) -> None:
        self._stored_tokens = tokens
        self._reporter.update(checkpoint_tokens=tokens)
        logger.info("checkpoint of %d tokens stored", tokens)

    def _stop(self, writer: CheckpointWriter) -> None:
        trainer = self._trainer
        writer.wait()
        if self._stored_tokens != trainer.tokens and trainer.steps_done > 0:
            writer.submit(trainer.snapshot({"seconds": self.seconds}))
            writer.wait()
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
        SaeProgress(
            name=sae.name,
            phase="Running" if sae.failure is None else "Failed",
            message=sae.failure,
            **trainer.latest(sae.name),
        )
        for sae in trainer.saes
    ]
