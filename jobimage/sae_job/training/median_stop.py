"""Median stop: SAEs of jobs that share a folder leave a figure there, and one that is worse than the median of the
others is given up.

An SAE leaves one object, once, which holds its figure and what was decided. A training that goes on from before that
takes both as they are: nothing is decided twice. A store that fails, after its own retries, stops no training: the SAEs
go on, and are not compared any more.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from sae_job.errors import InvalidInput
from sae_job.saes.trainable import Ranks
from sae_job.storage.base import ObjectNotFound, ObjectStore, PreconditionFailed, StoreError
from sae_job.training.plan import TrainingPlan
from sae_operator.api.identity import canonical_hash
from sae_operator.api.store import StoreLocation
from sae_operator.api.training_job import MedianStop

logger = logging.getLogger(__name__)

SUFFIX = ".json"
READERS = 16
# Metrics of which less is better.
_LOWER_IS_BETTER = ("mse", "dead_fraction")


@dataclass(frozen=True)
class Verdict:
    """What is decided of an SAE.

    Attributes:
        figure: its own.
        median: of the others' figures; None where there are none.
        others: how many they are.
        stopped: whether it is given up.
    """

    figure: float
    median: float | None
    others: int
    stopped: bool

    def reason(self, metric: str, tokens: int) -> str | None:
        """Why it is trained no further; None where it goes on."""
        if not self.stopped or self.median is None:
            return None
        word = "above" if metric in _LOWER_IS_BETTER else "below"
        return (
            f"stopped after {tokens} tokens: {metric} {self.figure:.4g} is {word} {self.median:.4g}, the median of "
            f"{self.others} other SAE{'' if self.others == 1 else 's'} (medianStop)"
        )


def judge(rule: MedianStop, figure: float, others: Sequence[float], *, may_stop: bool = True) -> Verdict:
    """Compare a figure with the others'. As good as the median is good enough."""
    median = statistics.median(others) if others else None
    worse = median is not None and (figure > median if rule.metric in _LOWER_IS_BETTER else figure < median)
    return Verdict(figure, median, len(others), may_stop and worse and len(others) >= rule.min_saes)


def owner_of(output: StoreLocation, identity: str) -> str:
    """What the names of a job's objects begin with: its output and what it trains, so that two jobs never share one and
    a job that is created anew finds its own."""
    return canonical_hash([output.endpoint_url, output.uri.rstrip("/"), identity])


class FigureFolder:
    """The folder of the figures.

    Args:
        store: the folder.
        owner: of this job, as `owner_of` gives it.
        rule: what is compared.
    """

    def __init__(self, store: ObjectStore, owner: str, rule: MedianStop) -> None:
        self._store = store
        self._owner = owner
        self._rule = rule

    def compare(self, figures: Mapping[str, float], *, tokens: int, may_stop: bool) -> dict[str, Verdict]:
        """Decide of SAEs of this job, which count among each other's others, and leave their figures.

        Args:
            figures: by SAE.
            tokens: that they were trained on.
            may_stop: False at the end of the training, when the figures are left for other jobs alone.

        Raises:
            StoreError, InvalidInput: the store failed.
        """
        keys = {f"{self._owner}-{sae}{SUFFIX}": sae for sae in figures}
        there = [info.key for info in self._store.list() if info.key.endswith(SUFFIX)]
        with ThreadPoolExecutor(READERS, thread_name_prefix="median-stop") as threads:
            records = dict(zip(there, threads.map(self._read, there), strict=True))
        earlier = {sae: record for key, sae in keys.items() if (record := records.get(key)) is not None}
        foreign = [record.figure for key, record in records.items() if record is not None and key not in keys]
        own = {sae: earlier[sae].figure if sae in earlier else figure for sae, figure in figures.items()}
        verdicts: dict[str, Verdict] = {}
        for key, sae in keys.items():
            if sae in earlier:
                verdicts[sae] = earlier[sae]
                continue
            siblings = [figure for other, figure in own.items() if other != sae]
            verdict = judge(self._rule, own[sae], [*foreign, *siblings], may_stop=may_stop)
            verdicts[sae] = self._leave(key, sae, verdict, tokens)
        return verdicts

    def _leave(self, key: str, sae: str, verdict: Verdict, tokens: int) -> Verdict:
        """Write what was decided; where it was before, that holds."""
        record = {
            "sae": sae,
            "metric": self._rule.metric,
            "figure": verdict.figure,
            "tokens": tokens,
            "median": verdict.median,
            "others": verdict.others,
            "stopped": verdict.stopped,
        }
        try:
            self._store.put(key, (json.dumps(record, allow_nan=False) + "\n").encode(), if_absent=True)
        except PreconditionFailed:
            # An attempt that still ran beside this one, or our own write whose answer was lost.
            return self._read(key) or verdict
        return verdict

    def _read(self, key: str) -> Verdict | None:
        """What an object says; None where it is gone, is of another metric, or is not ours to read."""
        try:
            value: Any = json.loads(self._store.get(key))
            if value["metric"] != self._rule.metric:
                return None
            median = value["median"]
            return Verdict(
                _finite(value["figure"]),
                None if median is None else _finite(median),
                int(_finite(value["others"])),
                value["stopped"] is True,
            )
        except ObjectNotFound:
            return None
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            logger.warning("%s/%s holds no figure of an SAE; it is left out", self._store.uri, key)
            return None


def _finite(value: Any) -> float:
    """A number of a record; ValueError where it is none that can be compared."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


class Comparison:
    """The one comparison of a job's SAEs, which all ranks come to after the same step.

    Args:
        rule: `spec.medianStop`.
        plan: the job.
        folder: of the figures; only the first rank needs it.
        ranks: the processes that train together.
    """

    def __init__(self, rule: MedianStop, plan: TrainingPlan, folder: FigureFolder | None, ranks: Ranks) -> None:
        self._rule = rule
        self._plan = plan
        self._folder = folder
        self._ranks = ranks
        self._step = next(_evaluations_from(plan, rule.after_tokens), None)

    def due_after(self, steps_done: int) -> bool:
        """Whether SAEs are compared by the evaluation after so many steps: the first one that counts."""
        return steps_done == self._step

    def reasons(self, figures: Mapping[str, Mapping[str, float | None]]) -> dict[str, str]:
        """Why SAEs are trained no further, of those that are not.

        Args:
            figures: of the evaluation, by SAE; the same on all ranks.
        """
        assert self._step is not None
        tokens = self._step * self._plan.batch_size
        found = {sae: named.get(self._rule.metric) for sae, named in figures.items()}
        own = {sae: value for sae, value in found.items() if value is not None and math.isfinite(value)}
        verdicts = self._agreed(list(own), self._verdicts(own, tokens) if self._ranks.index == 0 else {})
        reasons = {sae: verdict.reason(self._rule.metric, tokens) for sae, verdict in verdicts.items()}
        return {sae: reason for sae, reason in reasons.items() if reason is not None}

    def _verdicts(self, figures: Mapping[str, float], tokens: int) -> dict[str, Verdict]:
        assert self._folder is not None
        try:
            return self._folder.compare(figures, tokens=tokens, may_stop=self._step != self._plan.steps)
        except (StoreError, InvalidInput) as error:
            logger.warning("SAEs are not compared with the median of the others, and go on: %s", error)
            return {}

    def _agreed(self, saes: Sequence[str], verdicts: Mapping[str, Verdict]) -> dict[str, Verdict]:
        """The first rank's verdicts on all ranks, as numbers: on the CPU, where waiting for a store is no failure."""
        if self._ranks.size == 1 or not saes:
            return dict(verdicts)
        rows = [_numbers(verdicts.get(sae)) for sae in saes]
        first = self._ranks.gather(torch.tensor(rows, dtype=torch.float64))[: len(saes)]
        told = zip(saes, map(_verdict, first.tolist()), strict=True)
        return {sae: verdict for sae, verdict in told if verdict is not None}


def _evaluations_from(plan: TrainingPlan, tokens: int) -> Iterator[int]:
    """Steps after which held-out rows are evaluated, of those that come to so many tokens."""
    first = -(-tokens // plan.batch_size)
    return (step for step in range(first, plan.steps + 1) if plan.evaluates_after(step))


def _numbers(verdict: Verdict | None) -> tuple[float, float, float, float, float]:
    """A verdict for `gather`; whether there is one comes first."""
    if verdict is None:
        return (0.0, 0.0, 0.0, 0.0, 0.0)
    median = float("nan") if verdict.median is None else verdict.median
    return (1.0, verdict.figure, median, float(verdict.others), float(verdict.stopped))


def _verdict(numbers: Sequence[float]) -> Verdict | None:
    there, figure, median, others, stopped = numbers
    # Not a number is not itself.
    return Verdict(figure, median if median == median else None, int(others), stopped > 0) if there else None
