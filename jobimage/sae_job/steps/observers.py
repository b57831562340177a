"""Who records a training: lines of metrics in its output, and Weights & Biases where the job asks for it.

Opened on the first of several ranks alone, around everything from the training's first step to its results:

    with observed(step, output, plan, anew=False, now=context.now) as observers:
        trainer.observers = observers
        ... run the loop, leave SAEs, metrics.jsonl and results ...
"""

from __future__ import annotations

import json
import logging
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sae_job.errors import InvalidInput, Stopped
from sae_job.reporting.metrics_parts import PREFIX, MetricsParts, first_line_of, part_key
from sae_job.reporting.wandb_file import last_step, name_after, run_files
from sae_job.reporting.wandb_runs import RunOfSae, WandbRuns, run_id
from sae_job.saes.config import Layout
from sae_job.saes.files import SPARSITY_FILE
from sae_job.storage.base import ObjectNotFound, ObjectStore, StoreError
from sae_job.storage.file_store import FileStore
from sae_job.training.checkpoints import metrics_lines
from sae_job.training.observer import TrainingObserver
from sae_job.training.plan import TrainingPlan
from sae_operator.api.steps import TrainStep

logger = logging.getLogger(__name__)

WANDB_PREFIX = "wandb/"
# Which runs the job's SAEs have, so that all attempts go on with the same.
RUNS_KEY = f"{WANDB_PREFIX}runs.json"
_SALT_BYTES = 8


@contextmanager
def observed(
    step: TrainStep,
    output: ObjectStore,
    plan: TrainingPlan,
    *,
    anew: bool,
    now: Callable[[], float],
    new_salt: Callable[[], str] = lambda: secrets.token_hex(_SALT_BYTES),
) -> Iterator[Sequence[TrainingObserver]]:
    """The observers of a training, while the block runs.

    When it ends as it should, metrics.jsonl must be stored: its parts are removed.

    Args:
        step: the job.
        output: its output, which is claimed.
        plan: what is trained.
        anew: whether the training begins at its first step although an earlier one left results: its runs are new.
        now: seconds.
        new_salt: draws what tells a training that begins anew from those before it.

    Raises:
        StoreError: the store failed.
    """
    parts = MetricsParts(_Parts(output), lambda lines: metrics_lines([dict(line) for line in lines]), now)
    if step.spec.wandb is None:
        with _stored(parts):
            yield (parts,)
        return
    salt = _salt(output, anew=anew, new_salt=new_salt)
    with tempfile.TemporaryDirectory(prefix="wandb-", ignore_cleanup_errors=True) as folder, _stored(parts):
        runs = WandbRuns(
            step.spec.wandb,
            _runs(step, plan, salt),
            group=step.spec.wandb.group or step.name,
            directory=Path(folder),
            files=_WandbFiles(output),
            save_sae=partial(_save_sae, step.spec.sae_format),
            last_step=plan.steps,
            now=now,
        )
        try:
            yield (parts, runs)
        except Stopped:
            runs.close(stopped=True)
            raise
        except BaseException:
            runs.close(failed=True)
            raise
        runs.close()


def remove_metrics_parts(output: ObjectStore) -> None:
    """Remove parts of metrics.jsonl that an attempt left which ended right after its results were stored.

    Raises:
        StoreError: the store failed.
    """
    parts = _Parts(output)
    for start in parts.starts():
        parts.delete(part_key(start))


@contextmanager
def _stored(parts: MetricsParts) -> Iterator[None]:
    try:
        yield
    except BaseException:
        parts.close()
        raise
    try:
        parts.remove()
    except StoreError as error:
        # metrics.jsonl has all of their lines.
        logger.warning("parts of metrics.jsonl could not be removed: %s", error)


class _Parts:
    """Parts of metrics.jsonl in a job's output."""

    def __init__(self, output: ObjectStore) -> None:
        self._output = output

    def starts(self) -> list[int]:
        found = (first_line_of(info.key) for info in self._output.list(PREFIX))
        return [start for start in found if start is not None]

    def put(self, key: str, data: bytes) -> bool:
        try:
            self._output.put(key, data)
        except (StoreError, InvalidInput) as error:
            logger.warning("%s could not be stored, its lines come with the next part: %s", key, error)
            return False
        return True

    def delete(self, key: str) -> None:
        self._output.delete(key)


class _WandbFiles:
    """Files of runs in a job's output, below `wandb/`."""

    def __init__(self, output: ObjectStore) -> None:
        self._output = output
        # Folders that earlier attempts left.
        self._taken = {info.key.removeprefix(WANDB_PREFIX).partition("/")[0] for info in output.list(WANDB_PREFIX)}

    def last_step(self, id: str) -> int:
        keys = [info.key for info in self._output.list(WANDB_PREFIX) if info.key.endswith(f"/run-{id}.wandb")]
        return max((last_step(self._output.get(key)) for key in keys), default=-1)

    def store(self, folder: Path) -> bool:
        try:
            name = name_after(folder.name, self._taken)
            for file, path in run_files(folder):
                self._output.put_file(f"{WANDB_PREFIX}{name}/{file}", path)
        except (StoreError, InvalidInput) as error:
            logger.warning("files of %s could not be stored below %s: %s", folder.name, WANDB_PREFIX, error)
            return False
        return True


def _salt(output: ObjectStore, *, anew: bool, new_salt: Callable[[], str]) -> str:
    """What the ids of the runs are made of, drawn once for each training."""
    if not anew:
        try:
            return str(json.loads(output.get(RUNS_KEY))["salt"])
        except (ObjectNotFound, ValueError, KeyError):
            logger.info("runs of Weights & Biases are new: %s/%s tells of none", output.uri, RUNS_KEY)
    salt = new_salt()
    output.put(RUNS_KEY, (json.dumps({"salt": salt}) + "\n").encode())
    return salt


def _runs(step: TrainStep, plan: TrainingPlan, salt: str) -> list[RunOfSae]:
    spec, resolved = step.spec.to_manifest(), plan.record()
    saes = dict(zip((sae.name for sae in step.spec.saes), spec["saes"], strict=True))
    of_job: dict[str, Any] = {
        "namespace": step.namespace,
        "job": step.name,
        **{name: value for name, value in spec.items() if name != "saes"},
        "resolved": {name: value for name, value in resolved.items() if name != "saes"},
    }
    return [
        RunOfSae(
            sae=sae.name,
            id=run_id(step.uid, salt, sae.name),
            name=f"{step.name}/{sae.name}",
            configuration={**of_job, "sae": saes[sae.name], "resolved_sae": resolved["saes"][sae.name]},
            artifact=_artifact_name(step, sae.hook, sae.d_sae),
        )
        for sae in plan.saes
    ]


def _artifact_name(step: TrainStep, hook: str, d_sae: int) -> str:
    """`sae_<model>_<hook>_<d_sae>`, with a model's `/` as `__`; of a cache whose model is not known `cache`. Other
    characters that an artifact's name cannot have become `-`."""
    model = "cache" if step.cache is None else step.cache.model.name
    name = f"sae_{model}_{hook}_{d_sae}".replace("/", "__")
    return "".join(character if character.isalnum() or character in "._-" else "-" for character in name)


def _save_sae(layout: Layout, sae: Any, log10_frequencies: Any, folder: Path) -> tuple[list[Path], list[Path]]:
    folder.mkdir(parents=True, exist_ok=True)
    sae.save(FileStore(folder), "", log_sparsity=log10_frequencies, layout=layout)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [path for path in files if path.name != SPARSITY_FILE], [
        path for path in files if path.name == SPARSITY_FILE
    ]
