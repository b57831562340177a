"""The local runner: the same manifests and the same steps as in a cluster, in this process, in dependency order."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sae_job.errors import InvalidInput, Stopped
from sae_job.reporting.log import kept_log
from sae_job.reporting.progress import ProgressReporter
from sae_job.steps.context import StepContext
from sae_job.steps.fields import fields_of_activations
from sae_job.steps.local_sweep import SweepOutcome, run_sweep, trials_of
from sae_job.steps.step import step_function, store_log
from sae_job.steps.stopping import stop_on_signals
from sae_job.storage.base import ObjectStore, StoreError
from sae_job.storage.open import open_store
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import cache_location, cache_of, live_location
from sae_operator.api.resources import ACTIVATION_CACHE, SAE_SWEEP, SAE_TRAINING_JOB, Resource
from sae_operator.api.steps import CacheStep, CacheStepName, Progress, StepResult, TrainStep, TrainStepName
from sae_operator.api.store import StoreLocation
from sae_operator.api.training_job import SAETrainingJobSpec

logger = logging.getLogger(__name__)

# Locally there is no API server to give one; markers tell runs apart by the hash of their spec.
LOCAL_UID = "local"

Listener = Callable[[Progress], None]


class Display(Protocol):
    """Shows a step while it runs; gives the function to call with each new state of its progress."""

    def __call__(self, title: str) -> AbstractContextManager[Listener]: ...


@contextmanager
def no_display(title: str) -> Iterator[Listener]:
    yield lambda state: None


@dataclass(frozen=True)
class JobOutcome:
    """What a training job left.

    Attributes:
        name: name of the resource.
        output: location of its results.
        result: the train step's result.
    """

    name: str
    output: StoreLocation
    result: StepResult


@dataclass(frozen=True)
class Outcomes:
    """What resources have left, in the order of the files."""

    jobs: list[JobOutcome] = field(default_factory=list)
    sweeps: list[SweepOutcome] = field(default_factory=list)


def in_dependency_order(resources: Sequence[Resource]) -> list[Resource]:
    """Caches before the jobs and sweeps that read them; otherwise as in the file.

    Raises:
        InvalidInput: a job's cacheRef names no cache of the file.
    """
    caches = [resource for resource in resources if resource.kind is ACTIVATION_CACHE]
    others = [resource for resource in resources if resource.kind is not ACTIVATION_CACHE]
    names = {(cache.namespace, cache.name) for cache in caches}
    for job in others:
        reference = job.spec.activations.cache_ref if job.kind is SAE_TRAINING_JOB else None
        if reference is not None and (job.namespace, reference.name) not in names:
            raise InvalidInput(
                "CacheNotFound",
                f"no ActivationCache named {reference.name!r} in the given files; add it, or use cache or uri instead",
                field=f"{job.name}: spec.activations.cacheRef.name",
            )
    return caches + others


class LocalRun:
    """Runs steps one after the other in this process."""

    def __init__(self, *, store_root: Path | None, display: Display, should_stop: Callable[[], bool]) -> None:
        self._store_root = store_root
        self._open_store = partial(open_store, local_root=store_root)
        self._display = display
        self._should_stop = should_stop

    def open_store(self, location: StoreLocation) -> ObjectStore:
        return self._open_store(location)

    def titled(self, prefix: str) -> LocalRun:
        """The same, with its steps shown behind this text instead of the job's name."""
        shown = self._display

        def display(title: str) -> AbstractContextManager[Listener]:
            return shown(f"{prefix}: {title.rpartition(' ')[2]}")

        return LocalRun(store_root=self._store_root, display=display, should_stop=self._should_stop)

    def _run(self, step: CacheStep | TrainStep) -> StepResult:
        if self._should_stop():
            raise Stopped("stopped before the next step")
        with self._display(f"{step.name} {step.step}") as listener:
            context = StepContext(
                reporter=ProgressReporter(step.step, listeners=(listener,)),
                should_stop=self._should_stop,
                open_store=self._open_store,
                now=time.time,
            )
            logger.info("step %s of %s", step.step, step.name)
            return step_function(step.step)(step, context)

    def cache(self, name: str, namespace: str, spec: ActivationCacheSpec) -> None:
        location = cache_location(spec, namespace)

        def run(step: CacheStepName) -> StepResult:
            return self._run(
                CacheStep(step=step, namespace=namespace, name=name, uid=LOCAL_UID, spec=spec, location=location)
            )

        if run("prepare").adopted:
            logger.info("the cache is there already: %s", location.uri)
            return
        run("cache")
        run("finalize")

    def training_job(
        self, name: str, namespace: str, spec: SAETrainingJobSpec, caches: dict[tuple[str, str], ActivationCacheSpec]
    ) -> JobOutcome:

        def train_step(step: TrainStepName) -> TrainStep:
            return local_train_step(step, name, namespace, spec, caches)

        with kept_log() as tail:
            first = self._run(train_step("preflight"))
            if first.adopted:
                logger.info("finished results are there already: %s", spec.output.uri)
                return JobOutcome(name=name, output=spec.output, result=first)
            try:
                if spec.activations.cache is not None:
                    with fields_of_activations(spec):
                        self.cache(name, namespace, spec.activations.cache)
                result = self._run(train_step("train"))
            except (InvalidInput, Stopped, StoreError) as error:
                # For log.txt alone: the caller tells the user.
                logger.info("%s", error)
                raise
            finally:
                store_log(train_step("train"), self._open_store, tail)
        return JobOutcome(name=name, output=spec.output, result=result)


@dataclass(frozen=True)
class _SweepRunner:
    """A local run as a sweep needs it."""

    local: LocalRun
    caches: dict[tuple[str, str], ActivationCacheSpec]

    def step(self, name: str, namespace: str, spec: SAETrainingJobSpec) -> TrainStep:
        return local_train_step("train", name, namespace, spec, self.caches)

    def open(self, location: StoreLocation) -> ObjectStore:
        return self.local.open_store(location)

    def run(self, name: str, namespace: str, spec: SAETrainingJobSpec, *, title: str) -> None:
        self.local.titled(title).training_job(name, namespace, spec, self.caches)


def local_train_step(
    step: TrainStepName,
    name: str,
    namespace: str,
    spec: SAETrainingJobSpec,
    caches: Mapping[tuple[str, str], ActivationCacheSpec],
) -> TrainStep:
    """A step of a training job as it runs in this process."""
    cache, location = _activations_of(spec, namespace, caches)
    return TrainStep(
        step=step, namespace=namespace, name=name, uid=LOCAL_UID, spec=spec, activations=location, cache=cache
    )


def _activations_of(
    spec: SAETrainingJobSpec, namespace: str, caches: Mapping[tuple[str, str], ActivationCacheSpec]
) -> tuple[ActivationCacheSpec | None, StoreLocation]:
    """The spec of a job's cache, where it is known, and the folder; of a live source, what it would be as a cache, and
    the folder of its contexts."""
    activations = spec.activations
    if activations.live is not None:
        return cache_of(spec), live_location(spec)
    cache = activations.cache
    if activations.cache_ref is not None:
        cache = caches[namespace, activations.cache_ref.name]
    if cache is not None:
        return cache, cache_location(cache, namespace)
    assert activations.uri is not None
    return None, StoreLocation(
        uri=activations.uri,
        endpoint_url=activations.endpoint_url,
        region=activations.region,
        secret_ref=activations.secret_ref,
    )


def read_results(output: StoreLocation, *, store_root: Path | None) -> dict[str, Any]:
    """results.json of a finished job."""
    return json.loads(open_store(output, local_root=store_root).get("results.json"))


def run_resources(
    resources: Sequence[Resource], *, store_root: Path | None = None, display: Display = no_display
) -> Outcomes:
    """Run resources to their end, continuing where an earlier run was interrupted.

    Args:
        resources: validated resources, e.g. of one file.
        store_root: folder that stands in for `s3://`: `s3://bucket/key` is `store_root/bucket/key`.
        display: shows each step's progress.

    Raises:
        ManifestError: a sweep's space is not valid: nothing has been run.
        InvalidInput: the specification or the data is wrong.
        Stopped: SIGTERM or Ctrl-C; what was done is stored, and the same call continues.
        StoreError: the object store failed.
    """
    outcomes = Outcomes()
    ordered = in_dependency_order(resources)
    caches: dict[tuple[str, str], ActivationCacheSpec] = {
        (resource.namespace, resource.name): resource.spec for resource in ordered if resource.kind is ACTIVATION_CACHE
    }
    trials = [trials_of(resource, caches) if resource.kind is SAE_SWEEP else [] for resource in ordered]
    with stop_on_signals() as stop:
        local = LocalRun(store_root=store_root, display=display, should_stop=stop)
        for resource, expanded in zip(ordered, trials, strict=True):
            if resource.kind is ACTIVATION_CACHE:
                local.cache(resource.name, resource.namespace, resource.spec)
            elif resource.kind is SAE_SWEEP:
                sweep = run_sweep(resource, expanded, _SweepRunner(local, caches), uid=LOCAL_UID)
                outcomes.sweeps.append(sweep)
            else:
                outcomes.jobs.append(local.training_job(resource.name, resource.namespace, resource.spec, caches))
    return outcomes
