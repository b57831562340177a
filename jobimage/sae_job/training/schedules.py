"""Learning rate as a pure function of the step: resuming needs no state of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"]


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up, a main phase, and linear decay to 0.

    With W warm-up steps, D decay steps and T steps in all, the main phase has S = T − W − D steps. It begins at `peak`
    and, for the cosines, ends at `end`, from where the decay goes on; a constant one decays from `peak`. The first
    step uses peak / W, the last one a D-th of where the decay begins: neither is 0.

    Attributes:
        name: course of the main phase.
        peak: highest rate.
        end: where a cosine ends; not used by `constant`.
        warm_up_steps: W.
        decay_steps: D.
        total_steps: T.
        restart_cycles: cycles of `cosineannealingwarmrestarts`. When S is not divisible by them, the first ones are a
            step longer.

    Raises:
        ValueError: the name is unknown, the phases do not fit into the steps, or the decay would begin at 0.
    """

    name: ScheduleName
    peak: float
    end: float
    warm_up_steps: int
    decay_steps: int
    total_steps: int
    restart_cycles: int = 1

    def __post_init__(self) -> None:
        if self.name not in ("constant", "cosineannealing", "cosineannealingwarmrestarts"):
            raise ValueError(f"Unsupported scheduler: {self.name}")
        if self.main_steps < 0:
            raise ValueError(
                f"{self.warm_up_steps} warm-up and {self.decay_steps} decay steps are more than all {self.total_steps}"
            )
        if self.name != "constant" and self.decay_steps > 0 and self.end == 0:
            raise ValueError("a decay cannot begin at a learning rate of 0")
        if self.name == "cosineannealingwarmrestarts" and not 1 <= self.restart_cycles <= self.main_steps:
            raise ValueError(f"{self.restart_cycles} restart cycles do not fit into {self.main_steps} steps")

    @property
    def main_steps(self) -> int:
        """S: steps between warm-up and decay."""
        return self.total_steps - self.warm_up_steps - self.decay_steps

    def __call__(self, step: int) -> float:
        """The rate that step `step` (from 0) uses; 0 from `total_steps` on."""
        if step >= self.total_steps:
            return 0.0
        if step < self.warm_up_steps:
            return self.peak * (step + 1) / self.warm_up_steps
        if step >= self.total_steps - self.decay_steps:
            begin = self.peak if self.name == "constant" else self.end
            return begin * (1 - (step - (self.total_steps - self.decay_steps)) / self.decay_steps)
        if self.name == "constant":
            return self.peak
        done, length = self._within_cycle(step - self.warm_up_steps)
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * done / length)) / 2

    def _within_cycle(self, step: int) -> tuple[int, int]:
        """Steps done in the current cycle, and the cycle's length."""
        if self.name == "cosineannealing":
            return step, self.main_steps
        length, longer = divmod(self.main_steps, self.restart_cycles)
        if step < longer * (length + 1):
            return step % (length + 1), length + 1
        return (step - longer * (length + 1)) % length, length
