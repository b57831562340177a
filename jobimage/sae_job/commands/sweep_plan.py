"""What `sae-job validate` tells of a sweep: trials, how they are packed, and what jobs of each kind come to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from sae_job.steps.advice import Advice, advice_for_job
from sae_operator.api.manifest import ManifestError
from sae_operator.api.resources import SAE_TRAINING_JOB, Resource
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.api.sweep_expansion import SweepInvalid, Trial, TrialJob, expand, pack
from sae_operator.api.training_job import SAETrainingJobSpec

SHOWN_TRIALS = 5
SHOWN_KINDS = 4


class Planned(NamedTuple):
    """What one training job comes to.

    Attributes:
        lines: to show.
        tokens: that it trains on; None where that is not known here.
    """

    lines: list[str]
    tokens: int | None


def expanded(sweep: Resource, source: str = "") -> list[Trial]:
    """The trials of a sweep.

    Raises:
        ManifestError: its space is not valid.
    """
    try:
        return expand(sweep.spec)
    except SweepInvalid as error:
        label = f"{sweep.kind.kind}/{sweep.name}"
        raise ManifestError([replace(found, source=source, resource=label) for found in error.problems]) from error


def describe_sweep(sweep: Resource, trials: Sequence[Trial], plan: Callable[[Resource], Planned]) -> list[str]:
    """The sweep's lines: first its size, then one plan for each kind of job.

    Args:
        plan: of a training job.
    """
    spec: SAESweepSpec = sweep.spec
    jobs = pack(spec, trials)
    lines = [_size(spec, trials, jobs)]
    lines += [f"{trial.name}: {trial.describe()}" for trial in trials[:SHOWN_TRIALS]]
    if len(trials) > SHOWN_TRIALS:
        lines.append(f"... and {len(trials) - SHOWN_TRIALS:,} more")
    kinds: dict[str, list[TrialJob]] = {}
    for job in jobs:
        kinds.setdefault(_kind(job.spec), []).append(job)
    total: int | None = 0
    for number, alike in enumerate(kinds.values()):
        planned = plan(Resource(SAE_TRAINING_JOB, alike[0].folder, sweep.namespace, alike[0].spec))
        total = None if total is None or planned.tokens is None else total + planned.tokens * len(alike)
        if number < SHOWN_KINDS:
            lines.append(f"{_jobs(len(alike))} like that of {alike[0].trials[0]}:")
            lines += [f"  {line}" for line in planned.lines]
    if len(kinds) > SHOWN_KINDS:
        lines.append(f"... and {len(kinds) - SHOWN_KINDS} other kinds of job")
    if total is not None:
        lines.append(f"all together: {total:,} tokens read, once for all SAEs of a job")
    return lines


def _size(spec: SAESweepSpec, trials: Sequence[Trial], jobs: Sequence[TrialJob]) -> str:
    largest = max(len(job.trials) for job in jobs)
    trained = sum(len(job.spec.saes) for job in jobs)
    packed = "one trial each" if largest == 1 else f"up to {largest} trials each"
    count = f"{len(trials):,} trial{'' if len(trials) == 1 else 's'}"
    if trained != len(trials):
        count += f" with {trained:,} SAEs"
    return f"{count} in {_jobs(len(jobs))}, {packed}; at most {spec.max_parallel} at a time in a cluster"


def _jobs(number: int) -> str:
    return f"{number:,} training job{'' if number == 1 else 's'}"


def _kind(spec: SAETrainingJobSpec) -> str:
    """What two jobs of the same size and length have in common: all but the values that change neither."""
    manifest = spec.to_manifest()
    del manifest["output"]
    for key in ("learningRate", "learningRateEnd", "adamBeta1", "adamBeta2"):
        manifest["training"].pop(key, None)
    sizes = ("hook", "targetHook", "dSae", "expansionFactor")
    manifest["saes"] = sorted(
        json.dumps([sae["architecture"]["type"], *(sae.get(key) for key in sizes)]) for sae in manifest["saes"]
    )
    return json.dumps(manifest, sort_keys=True)


def advice_for_trials(trials: Iterable[Trial]) -> list[Advice]:
    """Warnings about a sweep's trials: each once, with the field's path in the template."""
    found: dict[Advice, list[str]] = {}
    for trial in trials:
        for advice in advice_for_job(trial.spec):
            found.setdefault(advice, []).append(trial.name)
    return [
        Advice(
            advice.field.replace("spec.", "spec.template.", 1),
            f"{advice.message} ({len(names)} trial{'' if len(names) == 1 else 's'}, e.g. {names[0]})",
        )
        for advice, names in found.items()
    ]
