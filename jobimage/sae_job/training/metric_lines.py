"""The lines of metrics.jsonl while a training makes them, and what they tell of each SAE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sae_job.training.observer import Moment

Figures = dict[str, float | None]


class MetricLines:
    """What was logged and evaluated so far, in order.

    Attributes:
        lines: as they stand in metrics.jsonl.
    """

    def __init__(self, lines: Iterable[dict[str, Any]] = ()) -> None:
        self.lines: list[dict[str, Any]] = []
        self._latest: dict[str, Figures] = {}
        self._kernels: dict[str, str] = {}
        for line in lines:
            self._take(line)

    def add(self, sae: str, moment: Moment, figures: Mapping[str, Any]) -> None:
        """Note figures of an SAE: of a step, or below `evaluation`, `model_evaluation` or `window`."""
        line: dict[str, Any] = {"step": moment.step, "tokens": moment.tokens, "sae": sae}
        if moment.finetuning:
            line["phase"] = "finetuning"
        self._take(line | dict(figures))

    def _take(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        figures: dict[str, Any] = line.get("evaluation") or line.get("model_evaluation") or {}
        if "loss" in line:
            figures = {name: line[name] for name in ("loss", "learning_rate", "dead_features") if name in line}
        self._latest[line["sae"]] = self._latest.get(line["sae"], {}) | figures
        if "kernel" in line:
            self._kernels[line["sae"]] = line["kernel"]

    def latest(self, sae: str) -> Figures:
        """Loss, rate and dead latents last logged, and the figures last evaluated."""
        return self._latest.get(sae, {})

    def kernel(self, sae: str) -> str | None:
        """The implementation of the products that was told last."""
        return self._kernels.get(sae)

    def evaluation_after(self, steps_done: int, sae: str) -> Figures:
        """Figures of the evaluation after so many steps; empty when there is none."""
        for line in self.lines:
            if line["step"] == steps_done and line["sae"] == sae and "evaluation" in line:
                return line["evaluation"]
        return {}

    def last_evaluation(self, sae: str) -> Figures:
        """Figures of the last evaluation of an SAE, which of one that was stopped is not the job's last."""
        for line in reversed(self.lines):
            if line["sae"] == sae and "evaluation" in line:
                return line["evaluation"]
        return {}

    def last_tokens(self, sae: str) -> int:
        """Tokens of the last line of an SAE; 0 without one."""
        return max((line["tokens"] for line in self.lines if line["sae"] == sae), default=0)
