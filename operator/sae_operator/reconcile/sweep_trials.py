"""A sweep's trials in outline: what is kept of an expanded space, which is a hundredth of the trials' specs.

Making it costs some 0.4 ms a trial, so the shell keeps it for as long as the space stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_operator.api.activation_cache import Hook
from sae_operator.api.identity import canonical_hash, chosen, inline_cache_name
from sae_operator.api.sweep import Objective, SAESweepSpec
from sae_operator.api.sweep_expansion import (
    TrialJob,
    as_job,
    describe_parameters,
    group,
    join,
    shared_part,
    template_text,
    trial_with,
    walk,
)
from sae_operator.api.training_job import SAETrainingJobSpec

# A field of a training job's spec that follows the template: its path and its value.
Change = tuple[tuple[str, ...], Any]


@dataclass(frozen=True, slots=True)
class OutlinedTrial:
    """One trial.

    Attributes:
        values: of the space's parameters, in their order.
        kind: position in `Outline.kinds`: trials of one kind may share a job.
        saes: how many it has.
    """

    name: str
    values: tuple[Any, ...]
    kind: int
    saes: int


@dataclass(frozen=True, slots=True)
class TrialKind:
    """What trials that may share a job have in common.

    Attributes:
        tokens: tokens asked for, as a training job's status tells them.
        template: hash of what existing jobs take over when the template changes.
    """

    tokens: int
    template: str


@dataclass(frozen=True)
class Outline:
    """The trials of a sweep.

    Attributes:
        paths: of the space's parameters.
        trials: in the order of the space.
        positions: of each trial, by its name.
        kinds: see `OutlinedTrial.kind`.
        hooks: those that an inline cache asks for, by its name.
        samples: a spec for each of the different pod settings and models that trials have.
        digest: hash of the trials' names and of the objective: what the sweep's report is about.
        tokens: the most that a trial asks for.
    """

    paths: tuple[str, ...]
    trials: tuple[OutlinedTrial, ...]
    positions: Mapping[str, int]
    kinds: tuple[TrialKind, ...]
    hooks: Mapping[str, list[Hook]]
    samples: tuple[SAETrainingJobSpec, ...]
    digest: str
    tokens: int

    def kind_of(self, trial: str) -> TrialKind:
        return self.kinds[self.trials[self.positions[trial]].kind]

    def describe(self, trial: str) -> str:
        """A trial's parameters on one line."""
        return describe_parameters(self._parameters(trial))

    def groups(self, taken: Collection[str], trials_per_job: int) -> list[list[str]]:
        """Names of the trials that are to share a training job, for all that are not `taken`."""
        free = [trial for trial in self.trials if trial.name not in taken]
        found = group([trial.kind for trial in free], [trial.saes for trial in free], trials_per_job)
        return [[free[i].name for i in members] for members in found]

    def job(self, spec: SAESweepSpec, names: Sequence[str]) -> TrialJob:
        """The training job of some trials."""
        text = template_text(spec)
        trials = (trial_with(self._parameters(name), text) for name in names)
        return join(spec, [(trial.name, as_job(spec, trial, self.hooks)) for trial in trials])

    def _parameters(self, trial: str) -> dict[str, Any]:
        return dict(zip(self.paths, self.trials[self.positions[trial]].values, strict=True))


def outline(spec: SAESweepSpec) -> Outline:
    """The outline of a space.

    Raises:
        SweepInvalid: the space cannot be expanded.
    """
    collected = _Collected()
    for trial in walk(spec):
        single = as_job(spec, trial, {})
        collected.add(trial.name, tuple(trial.parameters.values()), single)
    return collected.outline(tuple(parameter.path for parameter in spec.space.parameters), spec.objective)


def following(spec: SAETrainingJobSpec) -> list[Change]:
    """What a training job takes over from the template when that changes: pod settings, and tokens that are raised."""
    return _following(spec.to_manifest())


def template_digest(spec: SAETrainingJobSpec) -> str:
    """Hash of what a training job takes over from the template. A field that a later version adds leaves it as it
    is."""
    return canonical_hash([[list(path), value] for path, value in _following(chosen(spec))])


def _following(manifest: Mapping[str, Any]) -> list[Change]:
    paths: list[tuple[str, ...]] = [("run",), ("parallelism",), ("training", "tokens")]
    cache = ("activations", "cache")
    paths += [(*cache, "run"), (*cache, "parallelism"), (*cache, "tokens"), ("activations", "live", "tokens")]
    found = ((path, _at(manifest, path)) for path in paths)
    return [(path, value) for path, value in found if value is not None]


def tokens_asked_for(manifest: Mapping[str, Any]) -> int:
    """Tokens that a training job's spec asks for; 0 is all that there are. As the reconcile of training jobs has it."""
    source = _at(manifest, ("activations", "cache")) or _at(manifest, ("activations", "live")) or {}
    return _at(manifest, ("training", "tokens")) or source.get("tokens") or 0


def _at(manifest: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = manifest
    for part in path:
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


@dataclass
class _Collected:
    """Trials while they are walked. Which share a cache, and so its hooks, is known when all have been."""

    names: list[str] = field(default_factory=list)
    values: list[tuple[Any, ...]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    hooks: dict[str, dict[str, Hook]] = field(default_factory=dict)
    kinds: dict[str, TrialKind] = field(default_factory=dict)
    samples: dict[str, SAETrainingJobSpec] = field(default_factory=dict)

    def add(self, name: str, values: tuple[Any, ...], single: SAETrainingJobSpec) -> None:
        manifest, cache = shared_part(single), single.activations.cache
        if cache is not None:
            del manifest["activations"]["cache"]["hooks"]
            self.hooks.setdefault(inline_cache_name(cache), {}).update({hook.key: hook for hook in cache.hooks})
        shared = canonical_hash(manifest)
        if shared not in self.kinds:
            self.kinds[shared] = TrialKind(tokens_asked_for(manifest), template_digest(single))
            self.samples.setdefault(_settings(single), single)
        self.names.append(name)
        self.values.append(values)
        self.sizes.append(len(single.saes))
        self.shared.append(shared)

    def outline(self, paths: tuple[str, ...], objective: Objective) -> Outline:
        positions = {shared: i for i, shared in enumerate(self.kinds)}
        trials = [
            OutlinedTrial(name, values, positions[shared], size)
            for name, values, size, shared in zip(self.names, self.values, self.sizes, self.shared, strict=True)
        ]
        return Outline(
            paths=paths,
            trials=tuple(trials),
            positions={name: i for i, name in enumerate(self.names)},
            kinds=tuple(self.kinds.values()),
            hooks={name: list(found.values()) for name, found in self.hooks.items()},
            samples=tuple(self.samples.values()),
            digest=canonical_hash([sorted(self.names), chosen(objective)]),
            tokens=max(kind.tokens for kind in self.kinds.values()),
        )


def _settings(spec: SAETrainingJobSpec) -> str:
    """Tells specs apart by what an administrator may refuse: pod settings and models."""
    source = spec.activations.cache or spec.activations.live
    run = spec.activations.cache.run.to_manifest() if spec.activations.cache is not None else None
    model = source.model.to_manifest() if source is not None else None
    return canonical_hash([spec.run.to_manifest(), run, model])
