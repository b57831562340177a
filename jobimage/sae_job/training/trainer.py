"""Trains n SAEs on each batch of one stream of activations."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.evaluation.metrics import HeldOutRows
from sae_job.saes.config import Provenance
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS, normalize_rows
from sae_job.training.checkpoints import Snapshot, random_states, restore_random_states
from sae_job.training.plan import TrainingPlan
from sae_job.training.sae_training import SaeTraining, is_finite, sample_rows

logger = logging.getLogger(__name__)


class ActivationStream(Protocol):
    """Batches in an order that depends on nothing but the data and a seed."""

    @property
    def training_rows(self) -> int:
        """Rows of one epoch."""
        ...

    def next_batch(self) -> dict[str, Tensor]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """The training of a job, step by step.

    Of a batch the SAEs share nothing but its scaling or normalisation: on a CPU, each SAE's weights are bit for bit
    what training it alone gives (with the same number of threads).

    Args:
        plan: the job.
        stream: batches of `plan.batch_size` rows per hook, in raw scale.
        held_out: hook -> held-out rows, in raw scale.
        metrics: which figures of evaluations are kept.
        provenance: hook -> what saved SAEs tell of its activations.
        device: where the SAEs lie.
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
    ) -> None:
        self.plan = plan
        self.steps_done = 0
        self.lines: list[dict[str, Any]] = []
        self._latest: dict[str, dict[str, float | None]] = {}
        self.saes = [
            SaeTraining(sae, plan, index, provenance=provenance[sae.hook], device=device)
            for index, sae in enumerate(plan.saes)
        ]
        self._stream = stream
        self._held_out = held_out
        self._metrics = metrics
        self._device = device
        self._scales = {sae.hook: sae.scale for sae in plan.saes}
        # Batches are copied into the same memory each time: fresh pages cost as much as the work on them.
        self._seen: dict[str, Tensor] = {}

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.steps_done * self.plan.batch_size

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.plan.steps

    def sound(self) -> list[SaeTraining]:
        """The SAEs that have not failed."""
        return [sae for sae in self.saes if sae.failure is None]

    def initialize(self) -> None:
        """Set initial weights from the first rows of the stream, which are then trained on as well."""
        start = self._stream.state()
        wanted = max(sample_rows(sae.plan.d_sae) for sae in self.saes)
        # No more than one pass over short data: a repeated row tells nothing new.
        batches = -(-min(wanted, self._stream.training_rows) // self.plan.batch_size)
        parts: dict[str, list[Tensor]] = {hook: [] for hook in self.plan.hooks}
        for _ in range(batches):
            batch = self._stream.next_batch()
            for hook, rows in parts.items():
                rows.append(batch[hook].clone())
        self._stream.restore(start)
        for hook, rows in parts.items():
            sample = self._as_seen(hook, torch.cat(rows).to(self._device, torch.float32))
            for sae in self.saes:
                if sae.plan.hook == hook:
                    sae.initialize(sample)

    def step(self) -> None:
        """Train every sound SAE on the next batch, and log and evaluate where it is due.

        Raises:
            InvalidInput: no SAE is left to train, or activations cannot be read.
        """
        batch = self._stream.next_batch()
        seen = {hook: self._copy(hook, batch[hook]) for hook in self.plan.hooks}
        for sae in self.sound():
            sae.step(seen[sae.plan.hook], self.steps_done)
        self.steps_done += 1
        if self.plan.logs_after(self.steps_done):
            self._log()
        if self.plan.evaluates_after(self.steps_done):
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
        return rows.mul_(self._scales[hook])

    def _log(self) -> None:
        for sae in self.sound():
            if not sae.check():
                continue
            self._add_line(sae, sae.log_line())

    def _evaluate(self) -> None:
        for sae in self.sound():
            if not sae.check_weights(self.steps_done):
                continue
            figures = sae.evaluate(self._held_out[sae.plan.hook])
            if not is_finite(figures):
                sae.diverged(self.steps_done)
                continue
            kept = {name: value for name, value in figures.items() if name in self._metrics}
            self._add_line(sae, {"evaluation": kept})
            told = ", ".join(f"{name} {value:.4g}" for name, value in kept.items() if value is not None)
            logger.info("%s after %d of %d tokens: %s", sae.name, self.tokens, self.plan.tokens, told)

    def _add_line(self, sae: SaeTraining, figures: Mapping[str, Any]) -> None:
        line = {"step": self.steps_done, "tokens": self.tokens, "sae": sae.name, **figures}
        self.lines.append(line)
        self._note_latest(line)

    def _note_latest(self, line: dict[str, Any]) -> None:
        figures = line.get("evaluation") or {"loss": line["loss"]}
        self._latest[line["sae"]] = self._latest.get(line["sae"], {}) | figures

    def latest(self, sae: str) -> dict[str, float | None]:
        """The training loss last logged, and the figures last evaluated."""
        return self._latest.get(sae, {})

    def _end_when_all_failed(self) -> None:
        if not self.sound():
            raise InvalidInput(
                "TrainingDiverged",
                "; ".join(f"SAE {sae.name!r}: {sae.failure}" for sae in self.saes),
                field="spec.training.learningRate",
            )

    def evaluation_after(self, steps_done: int, sae: str) -> dict[str, float | None]:
        """Figures of the evaluation after so many steps; empty when there is none."""
        for line in self.lines:
            if line["step"] == steps_done and line["sae"] == sae and "evaluation" in line:
                return line["evaluation"]
        return {}

    def snapshot(self, extra: Mapping[str, Any]) -> Snapshot:
        """Copies of all that the training goes on from.

        Args:
            extra: JSON-able state of the caller, stored beside the trainer's.
        """
        for sae in self.sound():
            sae.check_weights(self.steps_done)
        return Snapshot(
            tokens=self.tokens,
            state={
                "plan": self.plan.record(),
                "steps_done": self.steps_done,
                "stream": self._stream.state(),
                "failures": {sae.name: sae.failure for sae in self.saes},
                **extra,
            },
            tensors={sae.name: sae.tensors() for sae in self.saes},
            random=random_states(),
            metrics=list(self.lines),
            saes={sae.name: (sae.inference(), sae.log_densities()) for sae in self.sound()},
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot of a training that `continues` this one."""
        for sae in self.saes:
            sae.restore(snapshot.tensors[sae.name], snapshot.state["failures"][sae.name])
        self._stream.restore(snapshot.state["stream"])
        restore_random_states(snapshot.random)
        self.steps_done = snapshot.state["steps_done"]
        self.lines = list(snapshot.metrics)
        for line in self.lines:
            self._note_latest(line)


def continues(plan: TrainingPlan, state: Mapping[str, Any]) -> bool:
    """Whether a training stopped with this state can go on under this plan: same SAEs, batches and held-out rows.

    The number of steps may differ: raised tokens lengthen a training that is not finished. Then learning rates follow
    the new plan from where it stands. Scales may differ too: they are taken over from the state.
    """
    before, now = state["plan"], plan.record()
    same = ("batch_size", "held_out_rows", "normalization")
    fixed = ("hook", "d_in", "d_sae")
    return (
        all(before.get(key) == now[key] for key in same)
        and before["saes"].keys() == now["saes"].keys()
        and all(before["saes"][name][key] == sae[key] for name, sae in now["saes"].items() for key in fixed)
        and state["steps_done"] <= plan.steps
    )
