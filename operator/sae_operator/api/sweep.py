"""SAESweep: a training job as a template, and a space of values for any of its fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from sae_operator.api.base import (
    ApiModel,
    Count,
    CountOrZero,
    Rule,
    TransitionRule,
    raised_only,
)
from sae_operator.api.run_settings import CpuStepSettings
from sae_operator.api.sae import PositiveNumber
from sae_operator.api.training_job import MedianStop, Metric, SAETrainingJobSpec

MAX_TRIALS = 5000
MAX_PARAMETERS = 16
# Longest list of values of one parameter, and of trials that are written out.
MAX_VALUES, MAX_LISTED_TRIALS = 64, 512
# `saes[0].architecture.k`; `saes[*]` are all of them.
PATH_PATTERN = r"^[a-z][A-Za-z0-9]*(\[([0-9]{1,2}|\*)\])?(\.[A-Za-z][A-Za-z0-9_-]*(\[([0-9]{1,2}|\*)\])?)*$"


def _json_value(value: Any) -> Any:
    """YAML has more than JSON: binary data, sets, keys that are numbers."""
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise PydanticCustomError("json_key", "keys of a value must be text; put them in quotes")
        return {key: _json_value(item) for key, item in value.items()}
    if value is not None and not isinstance(value, str | int | float):
        raise PydanticCustomError("json_value", "must be a number, a text, true or false, a list or a mapping")
    return value


FieldPath = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=PATH_PATTERN)]
# A number, a text, a truth value, a list or an object: whatever the field takes.
AnyValue = Annotated[Any, BeforeValidator(_json_value), WithJsonSchema({"x-kubernetes-preserve-unknown-fields": True})]

# Far beyond any setting, and exact in every parser.
Bound = Annotated[float, Field(ge=-1e12, le=1e12)]


class Range(ApiModel):
    """Numbers between two bounds, for method `random`."""

    RULES = (
        Rule("self.min < self.max", lambda r: r.min < r.max, "min must be less than max", "min"),
        Rule(
            "self.scale != 'log' || self.min > 0.0",
            lambda r: r.scale != "log" or r.min > 0,
            "scale log needs a min above 0",
            "min",
        ),
    )

    min: Bound
    """Lowest number."""
    max: Bound
    """Highest number."""
    scale: Literal["linear", "log"] = "linear"
    """`log`: every order of magnitude is equally likely."""
    whole: bool = False
    """Round to whole numbers."""


class Parameter(ApiModel):
    path: FieldPath
    """Field of `template`, e.g. `training.learningRate` or `saes[0].architecture.k`; `saes[*]` sets it in all SAEs.
    A field that the template leaves out may be set."""
    values: Annotated[list[AnyValue], Field(min_length=1, max_length=MAX_VALUES)] | None = None
    """Values that it takes."""
    range: Range | None = None
    """Range that values are drawn from; only for method `random`."""


class ListedTrial(ApiModel):
    values: Annotated[list[AnyValue], Field(min_length=1, max_length=MAX_PARAMETERS)]
    """One value for each of `parameters`, in their order."""


class Space(ApiModel):
    # What concerns values, of which CEL sees nothing, is for the expansion to check.
    RULES = (
        Rule(
            "(self.method == 'list') == has(self.trials)",
            lambda s: (s.method == "list") == (s.trials is not None),
            "trials belong to method list, which needs them",
            "trials",
        ),
        Rule(
            "(self.method == 'random') == has(self.count)",
            lambda s: (s.method == "random") == (s.count is not None),
            "count belongs to method random, which needs it",
            "count",
        ),
        Rule(
            "self.parameters.all(p, self.parameters.exists_one(q, q.path == p.path))",
            lambda s: len({p.path for p in s.parameters}) == len(s.parameters),
            "paths of parameters must be unique",
            "parameters",
        ),
    )

    method: Literal["grid", "list", "random"] = "grid"
    """`grid`: every combination of the parameters' values. `list`: the `trials` that are written out. `random`: `count`
    combinations drawn by `seed`, the same every time; a higher count keeps the earlier ones."""
    parameters: Annotated[list[Parameter], Field(min_length=1, max_length=MAX_PARAMETERS)]
    """Fields that vary."""
    trials: Annotated[list[ListedTrial], Field(min_length=1, max_length=MAX_LISTED_TRIALS)] | None = None
    """The trials of method `list`."""
    count: Annotated[Count, Field(le=MAX_TRIALS)] | None = None
    """Number of trials of method `random`."""
    seed: CountOrZero = 0
    """Seed of method `random`."""


class Objective(ApiModel):
    metric: Metric = "explained_variance"
    """Figure by which trials are ranked; it must be one of `template.evaluation.metrics`."""
    goal: Literal["maximize", "minimize"] = "maximize"
    """Whether higher or lower is better."""
    l0_at_most: PositiveNumber | None = None
    """Only trials with at most so many active latents can be the best; all when empty."""


class SAESweepSpec(ApiModel):
    RULES = (
        Rule(
            "!self.template.suspend && self.template.retry == 0",
            lambda s: not s.template.suspend and s.template.retry == 0,
            "the template's suspend and retry are the sweep's; set spec.suspend and spec.retry instead",
            "template",
        ),
        Rule(
            "!has(self.template.medianStop) || !has(self.medianStop)",
            lambda s: s.template.median_stop is None or s.median_stop is None,
            "only one of medianStop and template.medianStop may be set",
            "medianStop",
        ),
        Rule(
            "self.objective.metric in self.template.evaluation.metrics",
            lambda s: s.objective.metric in s.template.evaluation.metrics,
            "objective.metric must be one of template.evaluation.metrics",
            "objective.metric",
        ),
    )
    # The template has transition rules of its own: what is trained stays, run and tokens may change.
    TRANSITION_RULES = (
        raised_only("retry"),
        TransitionRule(
            "has(self.medianStop) == has(oldSelf.medianStop)"
            " && (!has(self.medianStop) || self.medianStop == oldSelf.medianStop)",
            "medianStop is immutable; create a new resource instead",
            "medianStop",
        ),
    )

    template: SAETrainingJobSpec
    """Spec of the trials' training jobs. Its `output.uri` is the sweep's folder: each trial has a folder of its own
    below it, and the report lies there."""
    space: Space
    """What varies. May be edited: new trials are trained, finished ones stay, and removed ones are given up; one that
    shares a job goes on with it."""
    trials_per_job: Annotated[Count, Field(le=16)] = 1
    """Trials that are packed into one training job where they differ only in what its SAEs may differ in: one read of
    the cache trains them all. At most 16 SAEs a job."""
    max_parallel: Annotated[Count, Field(le=1000)] = 4
    """Training jobs that may be unfinished at a time."""
    max_failed_trials: CountOrZero | None = None
    """Start no more trials once more than this many have failed; unlimited when empty."""
    objective: Objective = Field(default_factory=Objective)
    """Which trial is the best."""
    median_stop: MedianStop | None = None
    """Give up trials that are worse than the median of the others at a number of tokens; off when empty. Its `uri` is
    `<template.output.uri>/median-stop` when empty."""
    report: CpuStepSettings = Field(default_factory=CpuStepSettings)
    """Pod settings of the report."""
    suspend: bool = False
    """Suspend all training jobs of the sweep and begin no others."""
    retry: CountOrZero = 0
    """Raise this number to run failed trials again. One that failed in a job whose others were trained gets another
    job."""
