"""`sae-job validate`: the cluster's checks, the plan as far as it is known here, and advice."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sae_job.commands.place import StoreRoot
from sae_job.commands.sweep_plan import Planned, advice_for_trials, describe_sweep, expanded
from sae_job.errors import InvalidInput
from sae_job.steps.advice import Advice, advice_for_cache, advice_for_job
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.manifest import load_manifests
from sae_operator.api.resources import ACTIVATION_CACHE, SAE_SWEEP, SAE_TRAINING_JOB, Resource
from sae_operator.api.training_job import SAETrainingJobSpec

Caches = dict[tuple[str, str], ActivationCacheSpec]
Files = Annotated[
    list[Path],
    typer.Option(
        "--filename", "-f", help="YAML file with one or more resources; may be given several times.", show_default=False
    ),
]


def validate(
    filename: Files,
    d_in: Annotated[
        int | None,
        typer.Option(
            "--d-in",
            min=1,
            help="Width of the hooks, where neither model nor cache is on this machine: shows the memory plan.",
            show_default=False,
        ),
    ] = None,
    store: StoreRoot = None,
) -> None:
    """Check manifests as the cluster would, with the same messages; nothing is started.

    Exit code 2 when something is wrong, with one line for each problem: file, resource, field, and the fix. Of a
    training job it also shows the steps, learning rates and memory that it comes to, where its model or cache is on
    this machine; of a sweep its trials, how they are packed into training jobs, and that of each kind of job. Settings
    that are known to end badly are told as warnings.
    """
    files = [(resource, file) for file in filename for resource in load_manifests(file)]
    resources = [resource for resource, _ in files]
    caches = {
        (resource.namespace, resource.name): resource.spec
        for resource in resources
        if resource.kind is ACTIVATION_CACHE
    }
    for resource, file in files:
        label = f"{resource.kind.kind}/{resource.name}"
        lines: list[str] = []
        if resource.kind is SAE_TRAINING_JOB:
            lines = _plan(resource, caches, label, d_in=d_in, store=store).lines
        elif resource.kind is SAE_SWEEP:
            trials = expanded(resource, str(file))
            lines = describe_sweep(resource, trials, partial(_plan, caches=caches, label=label, d_in=d_in, store=store))
        typer.echo(f"{label} is valid")
        for line in lines:
            typer.echo(f"  {line}")
        for warning in advice_for(resource):
            print(f"warning: {label}: {warning}", file=sys.stderr)


def advice_for(resource: Resource) -> list[Advice]:
    """Warnings about a resource."""
    if resource.kind is ACTIVATION_CACHE:
        return advice_for_cache(resource.spec)
    if resource.kind is SAE_SWEEP:
        return advice_for_trials(expanded(resource))
    return advice_for_job(resource.spec)


def _plan(job: Resource, caches: Caches, label: str, *, d_in: int | None, store: Path | None) -> Planned:
    """The plan's lines, or why there is none.

    Args:
        label: of the resource that the job is, or is one of.
    """
    asked_for = job.spec.training.tokens
    if importlib.util.find_spec("torch") is None:
        return Planned(["plan: pip install 'sae-operator[job]' to see it"], asked_for)
    if d_in is None and not _is_here(job.spec, caches, job.namespace, store):
        return Planned(["plan: the widths of its hooks are not known here; --d-in tells them"], asked_for)
    from sae_job.steps.model_evaluation import evaluates_model
    from sae_job.steps.plan_ahead import assume, describe, look_ahead

    try:
        found = look_ahead(job, caches, store_root=store) if d_in is None else assume(job, caches, d_in=d_in)
    except InvalidInput as error:
        told = str(error)
        message = told if job.kind.kind in label else f"the training job of {job.spec.saes[0].name}: {told}"
        raise InvalidInput(error.reason, message, field=label) from error
    if found is None:
        return Planned(["plan: its cache is described elsewhere, and the number of rows is not known here"], asked_for)
    lines = describe(found, job.spec)
    if d_in is not None and (job.spec.activations.live is not None or evaluates_model(job.spec)):
        lines.append("  without the language model, whose size is not known here")
    return Planned(lines, found.plan.tokens)


def _is_here(spec: SAETrainingJobSpec, caches: Caches, namespace: str, store: Path | None) -> bool:
    """Whether the job's model, or its finished cache, is on this machine."""
    activations = spec.activations
    if activations.uri is not None:
        return activations.uri.startswith("file://") or store is not None
    source = activations.cache or activations.live
    if activations.cache_ref is not None:
        source = caches.get((namespace, activations.cache_ref.name))
    return source is not None and Path(source.model.name).is_dir()
