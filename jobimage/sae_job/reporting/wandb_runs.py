"""Weights & Biases: one run per SAE, continued by the next attempt, and never a reason for a training to stop."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.reporting.wandb_artifacts import ArtifactUploads, SavesSae
from sae_job.reporting.wandb_rows import (
    HoldsTensors,
    Moment,
    Row,
    Window,
    evaluation_row,
    step_row,
    weight_distributions,
    window_row,
)
from sae_operator.api.training_job import WandbSettings

if TYPE_CHECKING:
    from wandb import Run

logger = logging.getLogger(__name__)

ENV_API_KEY = "WANDB_API_KEY"
# How long the server may take to answer at the start, and to take what is left at the end. Both are short beside the
# grace period of a pod; what is not taken is on disk and goes to the store.
INIT_SECONDS, FINISH_SECONDS = 20.0, 15.0
# Offline files are stored again when they have grown by a tenth: however often checkpoints come, no more than eleven
# times the last size is written.
_GROWTH = 1.1
_BINS = 64
# Of a histogram, as a share of the values' size: below it float32 tells nothing apart.
_LEAST_SPAN = 1e-5
# What a line of metrics.jsonl has besides figures.
_PLACE_OF_A_LINE = ("step", "tokens", "sae", "phase")


def check_wandb(settings: WandbSettings | None, env: Mapping[str, str]) -> None:
    """Whether runs can be logged here.

    Args:
        settings: `spec.wandb`; nothing is asked for when None.
        env: the environment of the pod.

    Raises:
        InvalidInput: the client is not installed, or there is no key.
    """
    if settings is None:
        return
    if find_spec("wandb") is None:
        raise InvalidInput(
            "WandbMissing",
            "the client of Weights & Biases is not installed; pip install 'sae-operator[wandb]', or leave wandb out",
            field="spec.wandb",
        )
    if settings.mode == "online" and not env.get(ENV_API_KEY):
        raise InvalidInput(
            "WandbKeyMissing",
            f"the environment variable {ENV_API_KEY} is not set; take it from a Secret in spec.run.env, or set mode: "
            "offline",
            field="spec.wandb",
        )


def run_id(uid: str, salt: str, sae: str) -> str:
    """Id of an SAE's run: the same in every attempt.

    Args:
        uid: of the job's resource.
        salt: drawn once for each training that begins anew, and stored beside its results.
        sae: name of the SAE.
    """
    return hashlib.sha256(f"{uid}\n{salt}\n{sae}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RunOfSae:
    """One SAE's run.

    Attributes:
        sae: its name.
        id: of the run.
        name: that people see.
        configuration: of the job and the SAE.
        artifact: name of its model artifact.
    """

    sae: str
    id: str
    name: str
    configuration: Mapping[str, Any]
    artifact: str


class RunFiles(Protocol):
    """Where files of runs that were not sent go."""

    def last_step(self, id: str) -> int:
        """The highest step that earlier attempts stored of a run; -1 when there is none."""
        ...

    def store(self, folder: Path) -> bool:
        """Store a run's folder; False when the store could not take it."""
        ...


@dataclass
class _Open:
    """A run in progress.

    Attributes:
        run: the client's.
        last: the highest step that it has.
        step: of the row that is being filled.
        row: its values.
        evaluated: whether the row has figures of an evaluation.
        stored_bytes: size of its file when it was last stored.
    """

    run: Run
    last: int
    step: int = -1
    row: Row = field(default_factory=dict)
    evaluated: bool = False
    stored_bytes: int = 0


class WandbRuns:
    """An observer of a training that logs to Weights & Biases.

    Steps are those of metrics.jsonl. A row is handed over when the next one begins. An attempt that goes on from a
    checkpoint logs the lines of metrics.jsonl that the run lacks, and leaves out the steps that it has.

    Whatever goes wrong with the client or its network is told once, and ends logging, never the training: a server that
    does not answer at the start makes the runs offline ones.

    Args:
        settings: `spec.wandb`.
        runs: the SAEs' runs.
        group: of the runs.
        directory: for the client's files.
        files: where files go that are not sent.
        save_sae: writes an SAE for an artifact.
        last_step: number of steps of the training; the SAE that is evaluated then is the final one.
        now: seconds.
    """

    def __init__(
        self,
        settings: WandbSettings,
        runs: Sequence[RunOfSae],
        *,
        group: str,
        directory: Path,
        files: RunFiles,
        save_sae: SavesSae,
        last_step: int,
        now: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._descriptions = {run.sae: run for run in runs}
        self._group = group
        self._directory = directory
        self._files = files
        self._last_step = last_step
        self._now = now
        self._open: dict[str, _Open] = {}
        self._densities: dict[str, Any] = {}
        self._offline = settings.mode == "offline"
        self._done = False
        self._final: set[str] = set()
        self._artifacts = ArtifactUploads(directory / "artifacts", save_sae)

    def started(self, moment: Moment, lines: Sequence[Mapping[str, Any]]) -> None:
        """Open the runs, and log what they lack of the lines so far."""
        with self._no_harm():
            self._open_all()
        for line in lines:
            self._repeat(line)

    def logged(self, sae: str, moment: Moment, figures: Mapping[str, Any]) -> None:
        self._add(sae, moment, step_row(moment, figures))

    def evaluated(self, sae: str, moment: Moment, figures: Mapping[str, float | None], inference: HoldsTensors) -> None:
        if not self._wants(sae, moment):
            return
        with self._no_harm():
            row = evaluation_row(moment, figures)
            distributions = weight_distributions(inference)
            self._add(
                sae, moment, row | {name: _histogram(value) for name, value in distributions.items()}, evaluated=True
            )
            # Evaluated once more with the language model, it is the same SAE.
            if self._logs_artifacts and moment.step == self._last_step and sae not in self._final:
                self._final.add(sae)
                self._log_artifact(sae, inference, self._densities.get(sae), alias="final_model")

    def window(self, sae: str, moment: Moment, window: Window) -> None:
        self._densities[sae] = window.log10_frequencies
        if not self._wants(sae, moment):
            return
        with self._no_harm():
            density = {"plots/feature_density_line_chart": _histogram(window.log10_frequencies)}
            self._add(sae, moment, window_row(moment, window.figures()) | density)

    def phase(self, sae: str, moment: Moment, phase: str, message: str) -> None:
        with self._no_harm():
            if sae in self._open:
                self._open[sae].run.summary.update({"phase": phase, "message": message})

    def checkpointed(self, moment: Moment, saes: Mapping[str, tuple[Any, Any]]) -> None:
        with self._no_harm():
            # Where one hangs, more would only pile up.
            if self._logs_artifacts and not self._artifacts.busy:
                for name, (sae, log10_frequencies) in saes.items():
                    self._log_artifact(name, sae, log10_frequencies, alias=f"tokens-{moment.tokens}")
            if self._offline:
                for opened in self._open.values():
                    self._store(opened, grown=_GROWTH)

    def finished(self) -> None:
        self._done = True

    def close(self, *, stopped: bool = False, failed: bool = False) -> None:
        """End the runs: as finished ones after `finished`, otherwise as ones that failed, or, where the training was
        asked to stop, were preempted.

        Args:
            stopped: the attempt was asked to stop, perhaps after the training's end, before there were results.
            failed: it failed, perhaps as late.
        """
        complete = self._done and not stopped and not failed
        self._artifacts.wait(FINISH_SECONDS, self._now)
        with self._no_harm():
            for opened in self._open.values():
                # A row whose evaluation was cut off is logged by the attempt that makes it; so is the last one, which
                # the language model's figures may still be added to.
                if complete or (opened.evaluated and not self._done):
                    _hand_over(opened)
            # Side by side, because a server that does not answer makes each wait for its time.
            runs = list(self._open.values())
            with ThreadPoolExecutor(max_workers=max(1, len(runs))) as pool:
                in_time = list(pool.map(partial(self._finish, complete=complete, stopped=stopped), runs))
            if runs:
                import wandb

                # Files are whole only when the client's service has ended.
                wandb.teardown()
            for opened, sent in zip(runs, in_time, strict=True):
                if self._offline or not sent:
                    self._store(opened, grown=1.0)
        self._open = {}

    def _open_all(self) -> None:
        # Reports of the client's own errors go to its maker, and hold the end of the process up without a network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Where the root file system is read-only, the home directory may be as well.
        for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
            os.environ.setdefault(variable, str(self._directory))
        self._directory.mkdir(parents=True, exist_ok=True)
        import wandb

        try:
            opened = {sae: self._init(run) for sae, run in self._descriptions.items()}
        except wandb.Error as error:
            if self._offline:
                raise
            logger.warning(
                "Weights & Biases cannot be reached (%s): runs are logged offline, and stored below wandb/ of the "
                "output, for `wandb sync`",
                str(error).splitlines()[0],
            )
            self._offline = True
            # The client's service keeps what was half opened.
            wandb.teardown()
            opened = {sae: self._init(run) for sae, run in self._descriptions.items()}
        self._open = opened

    def _init(self, description: RunOfSae) -> _Open:
        import wandb

        settings = self._settings
        run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=self._group,
            tags=list(settings.tags),
            name=description.name,
            id=description.id,
            config=dict(description.configuration),
            resume="allow",
            reinit="create_new",
            mode="offline" if self._offline else "online",
            dir=str(self._directory),
            settings=wandb.Settings(
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        # A run that goes on at the server begins after its last step; offline ones always begin at 0.
        last = run.step - 1
        return _Open(run, max(last, self._files.last_step(description.id)) if self._offline else last)

    def _repeat(self, line: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl, where the run lacks it."""
        moment = _MomentOfLine(line["step"], line["tokens"])
        if (found := line.get("evaluation") or line.get("model_evaluation")) is not None:
            self._add(line["sae"], moment, evaluation_row(moment, found), evaluated=True)
        elif "window" in line:
            self._add(line["sae"], moment, window_row(moment, line["window"]))
        elif "loss" in line:
            figures = {name: value for name, value in line.items() if name not in _PLACE_OF_A_LINE}
            self._add(line["sae"], moment, step_row(moment, figures))

    @property
    def _logs_artifacts(self) -> bool:
        """Offline there is nothing to upload to, and the SAEs are in the output anyway."""
        return self._settings.log_artifacts and not self._offline

    def _wants(self, sae: str, moment: Moment) -> bool:
        return sae in self._open and moment.step > self._open[sae].last

    def _add(self, sae: str, moment: Moment, values: Row, *, evaluated: bool = False) -> None:
        """Add to the row of a step; the one before it is handed over."""
        if not self._wants(sae, moment):
            return
        opened = self._open[sae]
        if moment.step != opened.step:
            with self._no_harm():
                _hand_over(opened)
            opened.step, opened.row, opened.evaluated = moment.step, {}, False
        opened.row.update(values)
        opened.evaluated |= evaluated

    def _log_artifact(self, name: str, sae: Any, log10_frequencies: Any, *, alias: str) -> None:
        opened, description = self._open.get(name), self._descriptions[name]
        if opened is not None:
            metadata = dict(description.configuration)
            self._artifacts.start(opened.run, description.artifact, metadata, sae, log10_frequencies, alias=alias)

    def _finish(self, opened: _Open, *, complete: bool, stopped: bool) -> bool:
        """End a run; False when the server did not take all of it in time."""
        start = self._now()
        if stopped:
            opened.run.mark_preempting()
        opened.run.finish(exit_code=0 if complete else 1)
        in_time = self._now() - start < FINISH_SECONDS
        if not in_time:
            logger.warning(
                "Weights & Biases did not take all of run %s in time: its files are stored below wandb/ of the output, "
                "for `wandb sync`",
                opened.run.id,
            )
        return in_time

    def _store(self, opened: _Open, *, grown: float) -> None:
        """Store a run's files, if its log has grown by a factor."""
        path = Path(opened.run.settings.sync_file)
        size = path.stat().st_size if path.exists() else 0
        if size >= grown * opened.stored_bytes and size > opened.stored_bytes and self._files.store(path.parent):
            opened.stored_bytes = size

    def _no_harm(self) -> _NoHarm:
        return _NoHarm(self._give_up)

    def _give_up(self, error: Exception) -> None:
        logger.warning("logging to Weights & Biases ends, the training goes on: %s: %s", type(error).__name__, error)
        self._open = {}


class _NoHarm:
    """A block whose errors are handed to a function instead of ending the training."""

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self._on_error = on_error

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, Exception):
            self._on_error(error)
            return True
        return False


@dataclass(frozen=True)
class _MomentOfLine:
    step: int
    tokens: int


def _hand_over(opened: _Open) -> None:
    if opened.row:
        # Nothing is added to the row later; without `commit` the client would wait for the next step.
        opened.run.log(opened.row, step=opened.step, commit=True)
        opened.last = opened.step
        opened.row = {}


def _histogram(values: Tensor) -> Any:
    """Histogram of finite values, also of ones that are alike but for rounding, as norms of decoder rows are."""
    import numpy
    import wandb

    array = values.to(torch.float64).numpy()
    low, high = float(array.min()), float(array.max())
    least = _LEAST_SPAN * max(1.0, abs(low), abs(high))
    if high - low < least:
        low, high = low - least / 2, high + least / 2
    return wandb.Histogram(np_histogram=numpy.histogram(array, bins=_BINS, range=(low, high)))
