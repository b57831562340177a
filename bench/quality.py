"""How good SAEs are that the product and its peers train on the same rows, each with the learning rate that suits it.

    python bench/quality.py [--only SIDE/ARCHITECTURE ...] [--minutes M] [--jobs N] [--work DIR] [--out FILE]
                            [--every-peer] [--longer] [--quick]

Residual stream after layer 15 of SmolLM2-135M, 4,608 latents, 32 active (for architectures with a penalty its
coefficient is searched until 32 are active, within 5 %), 356,352 tokens in batches of 256 for every side. Learning
rates are picked for each side on validation rows with one seed: its default and three times more and less, and on while
the best is the outermost. Then the best peer (`--every-peer`: all of them) and the product are trained with three other
seeds, and evaluated on test rows; `--longer` trains both once more on 1.5 million tokens, in several epochs.

Every training is a process of its own in the environment of its library, and its result is written at once: what is in
the file is not done again. Trainings run with one thread at the lowest priority, N at a time.
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bench.machine import machine
from bench.peers import DICTIONARY_LEARNING, SAE_LENS_NEWEST, SPARSIFY, peer_environment
from bench.quality_data import FULL, QUICK, QualityData, ensure_data
from bench.quality_evaluation import PlainSae, cross_entropy_figures, held_out_figures
from bench.quality_plan import (
    D_SAE,
    SEEDS,
    SIDES_OF,
    SWEEP_SEED,
    K,
    Plan,
    best_rate,
    counts,
    default_rate,
    lengthen,
    repeat,
    sweep,
)
from bench.quality_results import Result, Results, Run
from bench.quality_table import write_table
from sae_job.evaluation.metrics import HeldOutRows
from sae_job.training.plan import default_batch_size, default_learning_rate
from tests.testbed.paths import CHECKOUT

PEERS = {"saelens": SAE_LENS_NEWEST, "sparsify": SPARSIFY, "dictionary_learning": DICTIONARY_LEARNING}
LONG_TOKENS = 1_500_160
OUT = CHECKOUT / "docs" / "benchmarks" / "quality.json"


class OutOfTime(Exception):
    """The minutes that were given are over."""


class Bench:
    """Runs trainings and evaluates them.

    Args:
        work: folder of data and trained SAEs.
        results: where results go.
        data: rows.
        jobs: trainings at a time.
        deadline: `time.monotonic()` after which nothing is begun.
    """

    def __init__(self, work: Path, results: Results, data: QualityData, *, jobs: int, deadline: float) -> None:
        self._saes = work / "saes"
        self._saes.mkdir(parents=True, exist_ok=True)
        self.results, self.data = results, data
        self._jobs, self._deadline = jobs, deadline
        self._validation: HeldOutRows | None = None
        self._test: HeldOutRows | None = None

    def carry_out(self, plans: Iterable[Plan]) -> None:
        """Let all plans come to their ends, the first ones first.

        Raises:
            OutOfTime: something is left to do.
        """
        waiting: list[tuple[Plan, Run]] = []
        for plan in plans:
            self._advance(plan, None, waiting)
        running: dict[subprocess.Popen[bytes], tuple[Plan, Run]] = {}
        late = False
        while waiting or running:
            late = late or time.monotonic() > self._deadline
            while waiting and len(running) < self._jobs and not late:
                plan, run = waiting.pop(0)
                if self._facts_of(run).exists():  # trained, but never evaluated: that was interrupted
                    self._advance(plan, self._evaluated(run), waiting)
                else:
                    running[self._start(run)] = (plan, run)
            if late and not running:
                raise OutOfTime
            for process in [process for process in running if process.poll() is not None]:
                plan, run = running.pop(process)
                if process.returncode != 0:
                    raise RuntimeError(f"{run.name} ended with {process.returncode}; see {self._saes}/{run.name}.log")
                self._advance(plan, self._evaluated(run), waiting)
            time.sleep(0.5)

    def _advance(self, plan: Plan, result: Result | None, waiting: list[tuple[Plan, Run]]) -> None:
        """Tell a plan what came of its run, and go on through runs that are known already to the next new one."""
        known = self.results.all()
        try:
            run = next(plan) if result is None else plan.send(result)
            while run in known:
                run = plan.send(known[run])
        except StopIteration:
            return
        waiting.append((plan, run))

    def _start(self, run: Run) -> subprocess.Popen[bytes]:
        setting = {
            "architecture": run.architecture,
            "d_in": self.data.rows("train").shape[1],
            "d_sae": D_SAE,
            "k": K,
            "batch": run.batch,
            "steps": run.tokens // run.batch,
            "learning_rate": run.learning_rate,
            "coefficient": run.coefficient or 0.0,
            "seed": run.seed,
            "quality": True,
            "steer": run.steer,
        }
        python = Path(sys.executable) if run.side == "ours" else PEERS[run.side].python()
        environment = peer_environment() | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if run.side == "ours":
            environment["PYTHONPATH"] = f"{CHECKOUT}/jobimage:{CHECKOUT}/operator"
        with open(self._saes / f"{run.name}.log", "w") as log:
            return subprocess.Popen(
                [
                    *("nice", "-n", "19", os.fspath(python), os.fspath(Path(__file__).with_name("quality_worker.py"))),
                    *(run.side, json.dumps(setting), os.fspath(self.data.folder / "train.npy")),
                    os.fspath(self._saes / run.name),
                ],
                env=environment,
                stdout=log,
                stderr=log,
            )

    def _facts_of(self, run: Run) -> Path:
        """What a worker leaves last."""
        return self._saes / f"{run.name}.json"

    def sae(self, run: Run) -> PlainSae:
        return PlainSae(self._saes / run.name, K)

    def _evaluated(self, run: Run) -> Result:
        facts = json.loads(self._facts_of(run).read_text())
        sae = self.sae(run)
        self._validation = self._validation or self._held_out("validation")
        test: dict[str, float] = {}
        if run.seed in SEEDS:
            self._test = self._test or self._held_out("test")
            test = held_out_figures(sae, self._test)
        validation = held_out_figures(sae, self._validation)
        result = Result(run, validation, test, facts["cpu_seconds"], facts["coefficient"])
        self.results.add(result)
        told = ", ".join(f"{name} {value:.4f}" for name, value in (test or validation).items())
        print(f"{run.name}: {told} ({facts['cpu_seconds']:.0f} CPU-s)", file=sys.stderr, flush=True)
        return result

    def _held_out(self, part: str) -> HeldOutRows:
        return HeldOutRows(torch.from_numpy(self.data.rows(part).copy()), device="cpu")

    def score(self, architecture: str) -> None:
        """Add cross-entropies to the results on test rows that have none."""
        missing = {
            run.name: result
            for run, result in self.results.all().items()
            if run.architecture == architecture and result.test and "ce_loss_score" not in result.test
        }
        missing = {name: result for name, result in missing.items() if (self._saes / f"{name}.json").exists()}
        if not missing:
            return
        found = cross_entropy_figures(self.data, {name: self.sae(result.run) for name, result in missing.items()})
        for name, result in missing.items():
            score = found[name]
            assert score.score is not None
            figures = {
                "ce_loss_score": score.score,
                "ce_loss_with_sae": score.spliced,
                "ce_loss_clean": score.clean,
                "ce_loss_with_ablation": score.ablated,
            }
            result.test.update(figures)
            self.results.add(result)
            print(f"{name}: CE-loss score {score.score:.4f}", file=sys.stderr, flush=True)


def of(results: Results, base: Run) -> list[Result]:
    """Results of a side's architecture at its length."""
    return [
        result
        for run, result in results.all().items()
        if (run.side, run.architecture, run.tokens) == (base.side, base.architecture, base.tokens)
    ]


def coefficient_of(results: list[Result], rate: float) -> float | None:
    """What the search came to at a rate: that of steering that ended near the target, or of the run nearest to it."""
    found = [result for result in results if (result.run.learning_rate, result.run.seed) == (rate, SWEEP_SEED)]
    steered = [result.coefficient for result in found if result.run.steer and counts(result)]
    if steered:
        return steered[0]
    fixed = [result for result in found if result.run.coefficient is not None and not result.run.steer]
    if not fixed:
        return None
    return min(fixed, key=lambda result: abs(result.validation["l0"] - K)).run.coefficient


def compare(bench: Bench, architecture: str, sides: Sequence[str], tokens: int, options: argparse.Namespace) -> None:
    """Everything of one architecture; see the module's docstring."""
    batch = default_batch_size(tokens)
    ours = default_learning_rate(batch, tokens // batch, architecture)
    bases = {side: Run(side, architecture, tokens, batch, 0.0, None, 0) for side in sides}
    bench.carry_out(sweep(base, default_rate(side, architecture, ours=ours)) for side, base in bases.items())
    if options.sweep_only:
        return
    swept = {side: of(bench.results, base) for side, base in bases.items()}
    rates = {side: rate for side, found in swept.items() if (rate := best_rate(found)) is not None}

    def quality(side: str) -> float:
        return max(
            result.validation["explained_variance"]
            for result in swept[side]
            if result.run.learning_rate == rates[side] and counts(result)
        )

    peers = sorted((side for side in rates if side != "ours"), key=quality, reverse=True)
    compared = [*(["ours"] if "ours" in rates else []), *(peers if options.every_peer else peers[:1])]
    bench.carry_out(repeat(bases[side], rates[side], coefficient_of(swept[side], rates[side])) for side in compared)
    if options.longer:
        bench.carry_out(longer(bench, bases[side], rates[side]) for side in compared[:2])
    bench.score(architecture)


def longer(bench: Bench, base: Run, rate: float) -> Plan:
    """The longer training of a side: the batch that the product takes by default, and the rate that was picked, times
    the root of the larger batch and the root of the shorter number of steps."""
    batch = default_batch_size(LONG_TOKENS)
    steps_ratio = (LONG_TOKENS / batch) / (base.tokens / base.batch)
    scaled = rate * (batch / base.batch / steps_ratio) ** 0.5
    run = Run(base.side, base.architecture, LONG_TOKENS // batch * batch, batch, 0.0, None, 0)
    return lengthen(run, scaled, coefficient_of(of(bench.results, base), rate), SEEDS[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="SIDE/ARCHITECTURE", help="may be given several times")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing after so many minutes")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--work", type=Path, help="folder for data and SAEs; a temporary one when left out")
    parser.add_argument("--out", type=Path, help="results file (default: docs/benchmarks/quality.json)")
    parser.add_argument("--every-peer", action="store_true", help="three seeds of every peer, not of the best alone")
    parser.add_argument("--sweep-only", action="store_true", help="only pick learning rates")
    parser.add_argument("--longer", action="store_true", help="also train on 1.5 million tokens")
    parser.add_argument("--quick", action="store_true", help="few tokens, TopK of the product and sparsify")
    options = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * options.minutes
    only = options.only or (["ours/topk", "sparsify/topk"] if options.quick else None)
    with tempfile.TemporaryDirectory(prefix="sae-bench-") as scratch:
        work = (options.work or Path(scratch)).absolute()
        results = Results(options.out or (Path(scratch) / "quality.json" if options.quick else OUT))
        rows = QUICK if options.quick else FULL
        data = ensure_data(work, rows)
        bench = Bench(work, results, data, jobs=options.jobs, deadline=deadline)
        results.add_facts({"data": data.facts(), "machine": machine()})
        try:
            for architecture, sides in SIDES_OF.items():
                chosen = [side for side in sides if only is None or f"{side}/{architecture}" in only]
                if chosen:
                    compare(bench, architecture, chosen, rows.train, options)
        except OutOfTime:
            print("quality: the time is over; the same command goes on from here", file=sys.stderr)
        figures = write_table(results, None if options.quick else results.path.with_suffix(".md"))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
