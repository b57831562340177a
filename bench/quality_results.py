"""The results file of the quality benchmark: every run is added as soon as it is evaluated, and never done again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.machine import only_one_at


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        side: library.
        architecture: as the product calls it.
        tokens: rows trained on.
        batch: rows per step.
        learning_rate: peak.
        coefficient: weight of the sparsity penalty, where there is one: of the whole training, or where `steer` starts.
        seed: of the initial weights.
        steer: whether the coefficient is moved on the way until as many latents are active as are wanted.
    """

    side: str
    architecture: str
    tokens: int
    batch: int
    learning_rate: float
    coefficient: float | None
    seed: int
    steer: bool = False

    @property
    def name(self) -> str:
        coefficient = "" if self.coefficient is None else f"-c{self.coefficient:.4g}"
        steer = "-steered" if self.steer else ""
        return (
            f"{self.side}-{self.architecture}-{self.tokens}-{self.batch}-lr{self.learning_rate:.4g}{coefficient}"
            f"-seed{self.seed}{steer}"
        )


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        validation: `explained_variance`, `l0` and `dead_fraction` (latents that fire on no row) on validation rows.
        test: the same on test rows, and where it was asked for `ce_loss_score`; empty where nobody asked.
        cpu_seconds: of the training.
        coefficient: what steering came to.
    """

    run: Run
    validation: dict[str, float]
    test: dict[str, float]
    cpu_seconds: float
    coefficient: float | None


class Results:
    """A JSON file that several processes may add to.

    Args:
        path: the file; need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> dict[Run, Result]:
        return {result.run: result for result in (_result(entry) for entry in self._read()["runs"])}

    def facts(self) -> dict[str, Any]:
        return self._read()["facts"]

    def add_facts(self, facts: dict[str, Any]) -> None:
        with self._locked() as content:
            content["facts"].update(facts)

    def add(self, result: Result) -> None:
        """Add a run, or replace what is told of it."""
        with self._locked() as content:
            entry = asdict(result)
            content["runs"] = [known for known in content["runs"] if known["run"] != entry["run"]] + [entry]

    def _read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {"facts": {}, "runs": []}

    @contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        with only_one_at(self.path.parent):
            content = self._read()
            yield content
            partial = Path(f"{self.path}.partial")
            runs = ",\n  ".join(json.dumps(entry) for entry in content["runs"])
            partial.write_text(f'{{\n "facts": {json.dumps(content["facts"])},\n "runs": [\n  {runs}\n ]\n}}\n')
            os.replace(partial, self.path)


def _result(entry: dict[str, Any]) -> Result:
    told = {name: value for name, value in entry.items() if name != "run"}
    return Result(run=Run(**entry["run"]), **told)
