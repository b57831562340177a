"""A sweep's trials, and the training jobs that they are packed into: pure functions of the spec.

A trial is called by a hash of its values, and its folder by a hash of the trials in its job: an edited space keeps what
it has in common with the one before, and a sweep that is created anew finds what it has trained.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from sae_operator.api.activation_cache import MAX_HOOKS, ActivationCacheSpec, Hook
from sae_operator.api.base import MAX_NAME_LENGTH
from sae_operator.api.identity import canonical_hash, inline_cache_name
from sae_operator.api.problems import Problem, describe_errors
from sae_operator.api.sae import SaeSpec
from sae_operator.api.sweep import MAX_TRIALS, Parameter, Range, SAESweepSpec, Space
from sae_operator.api.training_job import SAETrainingJobSpec

# 40 bits: among 5,000 trials two share a name with probability 1e-5, which is told as a duplicate.
HASH_LENGTH = 10
TRIAL_PREFIX = "t-"
TRIAL_NAME_LENGTH = len(TRIAL_PREFIX) + HASH_LENGTH
MAX_SAES = 16
MAX_SAE_NAME = 63
# Of an address; those of trials lie below the sweep's.
MAX_URI_LENGTH = 1024
# What is not a trial's to choose.
RESERVED_FIELDS = ("output", "suspend", "retry", "medianStop")
# Settings of `training` that an SAE may have for itself: trials that differ in them alone share a job.
OWN_SETTINGS = ("learning_rate", "adam_beta1", "adam_beta2")
# Folder of the median rule's figures, below the sweep's.
MEDIAN_STOP = "/median-stop"
SHOWN_PROBLEMS = 5
# Draws for one new trial of a random search before its space counts as exhausted.
DRAWS_PER_TRIAL = 100


class SweepInvalid(Exception):
    """A space that cannot be expanded.

    Attributes:
        problems: what is wrong, each with the field's path.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Trial:
    """One point of the space.

    Attributes:
        name: `t-` and a hash of the parameters.
        parameters: value by path, in the order of `space.parameters`.
        spec: the template with these values.
    """

    name: str
    parameters: Mapping[str, Any]
    spec: SAETrainingJobSpec

    def describe(self) -> str:
        """The parameters on one line."""
        return describe_parameters(self.parameters)


@dataclass(frozen=True)
class TrialJob:
    """One training job.

    Attributes:
        folder: name of its folder below the sweep's output.
        trials: names of its trials.
        spec: its spec; an SAE's name is its trial's, followed by its name in the template where that has several.
    """

    folder: str
    trials: tuple[str, ...]
    spec: SAETrainingJobSpec


def describe_parameters(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={_written(value)}" for path, value in parameters.items())


def trial_of(sae_name: str) -> str:
    """Name of the trial that an SAE of a sweep's job belongs to."""
    return sae_name[:TRIAL_NAME_LENGTH]


def job_name(sweep_name: str, sweep_uid: str, trials: Sequence[str]) -> str:
    """Name of the SAETrainingJob of some trials: the same each time, and no other sweep's."""
    tail = canonical_hash([sweep_uid, *trials])[:HASH_LENGTH]
    return f"{sweep_name[: MAX_NAME_LENGTH - HASH_LENGTH - 1].rstrip('-')}-{tail}"


# Expansion


def expand(spec: SAESweepSpec) -> list[Trial]:
    """The trials, in order; each has been validated.

    Raises:
        SweepInvalid: a path names nothing, a trial's spec is not valid, two trials are the same, or there are too many.
    """
    return list(walk(spec))


def walk(spec: SAESweepSpec) -> Iterator[Trial]:
    """The same one by one, for who keeps less of them than their specs. All have to be walked before any is made: what
    is wrong with some is told at the end.

    Raises:
        SweepInvalid: as `expand`.
    """
    paths = [parameter.path for parameter in spec.space.parameters]
    problems = [*_path_problems(paths), *_value_problems(spec.space), *_folder_problems(spec)]
    if problems:
        raise SweepInvalid(problems)
    _check_number(spec)
    text = template_text(spec)
    names: set[str] = set()
    # A problem that many trials have is told once.
    found: dict[tuple[str, str], Problem] = {}
    hooks: dict[str, set[str]] = {}
    for values in _assignments(spec):
        parameters = dict(zip(paths, values, strict=True))
        result = _trial(parameters, text)
        if isinstance(result, Trial) and spec.objective.metric not in result.spec.evaluation.metrics:
            message = f"must name {spec.objective.metric}, the sweep's objective.metric"
            result = [Problem("", "", "spec.template.evaluation.metrics", message)]
        if isinstance(result, list):
            for problem in result:
                where = f" (in the trial {describe_parameters(parameters)})"
                found.setdefault((problem.field, problem.message), replace(problem, message=problem.message + where))
            continue
        if result.name in names:
            message = f"holds the trial {result.describe()} twice; remove one"
            raise SweepInvalid([Problem("", "", "spec.space", message)])
        names.add(result.name)
        cache = result.spec.activations.cache
        if cache is not None:
            hooks.setdefault(inline_cache_name(cache), set()).update(hook.key for hook in cache.hooks)
        if not found:
            yield result
    if found:
        raise SweepInvalid(list(found.values())[:SHOWN_PROBLEMS])
    most = max((len(keys) for keys in hooks.values()), default=0)
    if most > MAX_HOOKS:
        message = (
            f"are {most} of one cache in all trials together; at most {MAX_HOOKS} are allowed: take fewer, or vary"
            " activations.cache.storage.uri with them"
        )
        raise SweepInvalid([Problem("", "", "spec.template.activations.cache.hooks", message)])


def template_text(spec: SAESweepSpec) -> str:
    """The template as `trial_with` takes it."""
    return json.dumps(spec.template.to_manifest())


def trial_with(parameters: Mapping[str, Any], template: str) -> Trial:
    """One trial of a space that has been walked before."""
    result = _trial(parameters, template)
    if isinstance(result, list):
        raise SweepInvalid(result)
    return result


def _check_number(spec: SAESweepSpec) -> None:
    """Counted before anything is made: sixteen parameters of 64 values are more than there are atoms."""
    space = spec.space
    if space.method == "list":
        wrong = [i for i, trial in enumerate(space.trials or ()) if len(trial.values) != len(space.parameters)]
        if wrong:
            message = f"must have one value for each of the {len(space.parameters)} parameters, in their order"
            raise SweepInvalid([Problem("", "", f"spec.space.trials[{i}].values", message) for i in wrong[:5]])
        return
    if space.method == "grid":
        number = math.prod(len(parameter.values or ()) for parameter in space.parameters)
        if number > MAX_TRIALS:
            message = f"has {number} trials; at most {MAX_TRIALS} are allowed: take fewer values, or method random"
            raise SweepInvalid([Problem("", "", "spec.space", message)])


def _assignments(spec: SAESweepSpec) -> Iterator[Sequence[Any]]:
    """The values of each trial, in the order of the parameters."""
    space = spec.space
    if space.method == "list":
        yield from (trial.values for trial in space.trials or ())
    elif space.method == "grid":
        yield from itertools.product(*(parameter.values or () for parameter in space.parameters))
    else:
        yield from _drawn(space.parameters, space.count or 0, space.seed)


def _drawn(parameters: Sequence[Parameter], count: int, seed: int) -> Iterator[list[Any]]:
    """Different random trials; the first ones do not depend on `count`."""
    seen: set[str] = set()
    for number in range(count):
        for attempt in range(DRAWS_PER_TRIAL):
            source = random.Random(f"{seed}/{number}/{attempt}")
            values = [_draw(parameter, source) for parameter in parameters]
            if (key := _key(values)) not in seen:
                seen.add(key)
                yield values
                break
        else:
            message = f"is more than the {len(seen)} different trials that could be drawn; lower it, or use method grid"
            raise SweepInvalid([Problem("", "", "spec.space.count", message)])


def _draw(parameter: Parameter, source: random.Random) -> Any:
    if parameter.values is not None:
        return source.choice(parameter.values)
    assert parameter.range is not None
    return _number_in(parameter.range, source.random())


def _number_in(bounds: Range, share: float) -> float | int:
    if bounds.scale == "log":
        low, high = math.log(bounds.min), math.log(bounds.max)
        value = math.exp(low + share * (high - low))
    else:
        value = bounds.min + share * (bounds.max - bounds.min)
    if bounds.whole:
        return round(min(max(value, bounds.min), bounds.max))
    # Six digits are all that anybody reads, and leave room for as many trials.
    return min(max(float(f"{value:.6g}"), bounds.min), bounds.max)


def _path_problems(paths: Sequence[str]) -> Iterator[Problem]:
    for i, path in enumerate(paths):
        field = f"spec.space.parameters[{i}].path"
        segments = _segments(path)
        if segments[0] in RESERVED_FIELDS or (segments[0] == "saes" and segments[-1] == "name"):
            yield Problem("", "", field, f"{path} is the sweep's own to set; vary another field")
        for other in paths:
            if other != path and _holds(segments, _segments(other)):
                yield Problem("", "", field, f"{path} holds {other}, which varies, too; vary only one of them")


def _holds(outer: Sequence[str | int], inner: Sequence[str | int]) -> bool:
    """Whether one path leads to, or past, the other; `*` is any item of a list."""
    pairs = zip(outer, inner, strict=False)
    return len(outer) <= len(inner) and all(one == other or "*" in (one, other) for one, other in pairs)


def _folder_problems(spec: SAESweepSpec) -> Iterator[Problem]:
    """Addresses below the sweep's folder must not be too long, either."""
    longest = MAX_URI_LENGTH - max(HASH_LENGTH + 1, len(MEDIAN_STOP))
    if len(_folder(spec)) > longest:
        message = f"must be at most {longest} characters in a sweep, whose trials have folders below it"
        yield Problem("", "", "spec.template.output.uri", message)


def _value_problems(space: Space) -> Iterator[Problem]:
    """Which parameters must have values, and which a range, is the method's to say."""
    words = {
        "grid": "needs values with method grid; a range is only for method random",
        "random": "needs either values or a range with method random",
        "list": "takes neither values nor a range with method list, whose trials hold the values",
    }
    for i, parameter in enumerate(space.parameters):
        given = (parameter.values is not None, parameter.range is not None)
        right = {"grid": given == (True, False), "random": given.count(True) == 1, "list": given == (False, False)}
        if not right[space.method]:
            yield Problem("", "", f"spec.space.parameters[{i}]", words[space.method])


def _segments(path: str) -> list[str | int]:
    """`saes[*].architecture.k` as `saes`, `*`, `architecture`, `k`."""
    return [int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", path)]


def _trial(parameters: Mapping[str, Any], template: str) -> Trial | list[Problem]:
    document = json.loads(template)
    for path, value in parameters.items():
        problem = _set(document, path, value)
        if problem is not None:
            return [Problem("", "", f"spec.template.{path}", problem)]
    try:
        spec = SAETrainingJobSpec.model_validate(document, by_alias=True, by_name=False)
    except ValidationError as error:
        return describe_errors(error, SAETrainingJobSpec, root="spec.template")
    name = TRIAL_PREFIX + canonical_hash({path: _plain(value) for path, value in parameters.items()})[:HASH_LENGTH]
    if len(spec.saes) > 1:
        longest = MAX_SAE_NAME - TRIAL_NAME_LENGTH - 1
        message = f"must be at most {longest} characters in a sweep, whose trials' names precede it"
        long = [i for i, sae in enumerate(spec.saes) if len(sae.name) > longest]
        if long:
            return [Problem("", "", f"spec.template.saes[{i}].name", message) for i in long]
    return Trial(name, parameters, spec)


def _set(document: dict[str, Any], path: str, value: Any) -> str | None:
    """Sets a field; returns what is wrong with the path."""
    places: list[Any] = [document]
    *parents, last = _segments(path)
    for segment in parents:
        found: list[Any] = []
        for place in places:
            if isinstance(place, dict) and isinstance(segment, str) and segment != "*":
                found.append(place.setdefault(segment, {}))
            elif isinstance(place, list) and _items(place, segment):
                found += [place[i] for i in _items(place, segment)]
            else:
                return _missing(place, segment)
        places = found
    for place in places:
        if isinstance(place, dict) and isinstance(last, str) and last != "*":
            place[last] = value
        elif isinstance(place, list) and _items(place, last):
            for i in _items(place, last):
                place[i] = value
        else:
            return _missing(place, last)
    return None


def _items(place: Sequence[Any], segment: str | int) -> Sequence[int]:
    """The items of a list that a segment names."""
    if segment == "*":
        return range(len(place))
    return [segment] if isinstance(segment, int) and segment < len(place) else []


def _missing(place: Any, segment: str | int) -> str:
    if isinstance(place, list):
        return f"must name one of {len(place)} items, e.g. [0], not '{segment}'"
    return f"holds '{segment}' nowhere: what precedes it is no {'list' if isinstance(segment, int) else 'mapping'}"


def _plain(value: Any) -> Any:
    """32.0 in YAML is 32 to the API server."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _key(values: Sequence[Any]) -> str:
    return json.dumps(_plain(list(values)), sort_keys=True)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# Packing


def pack(spec: SAESweepSpec, trials: Sequence[Trial], taken: Collection[str] = ()) -> list[TrialJob]:
    """Training jobs for the trials whose names are not `taken`, in the order of the trials.

    Trials share a job when they differ only in their SAEs (or in what an SAE may have for itself), at most
    `trialsPerJob` of them and 16 SAEs. Inline caches with the same contexts ask for the hooks of all trials, so that
    the model runs once.
    """
    hooks = hooks_by_cache(trial.spec for trial in trials)
    singles = [as_job(spec, trial, hooks) for trial in trials if trial.name not in taken]
    sizes = [len(single.saes) for single in singles]
    names = [trial.name for trial in trials if trial.name not in taken]
    kinds = [json.dumps(shared_part(single), sort_keys=True) for single in singles]
    groups = group(kinds, sizes, spec.trials_per_job)
    return [join(spec, [(names[i], singles[i]) for i in members]) for members in groups]


def group(kinds: Sequence[Hashable], sizes: Sequence[int], trials_per_job: int) -> list[list[int]]:
    """Which trials share a job: their positions, in order.

    Args:
        kinds: what must be equal for two trials to share one.
        sizes: SAEs of each trial.
        trials_per_job: how many may share one.
    """
    groups: list[list[int]] = []
    # The job of a kind that may take more, and its SAEs.
    open_jobs: dict[Hashable, tuple[list[int], int]] = {}
    for i, (kind, size) in enumerate(zip(kinds, sizes, strict=True)):
        members, saes = open_jobs.get(kind, ([], 0))
        if not members or len(members) >= trials_per_job or saes + size > MAX_SAES:
            members, saes = [], 0
            groups.append(members)
        members.append(i)
        open_jobs[kind] = members, saes + size
    return groups


def as_job(spec: SAESweepSpec, trial: Trial, hooks: Mapping[str, list[Hook]]) -> SAETrainingJobSpec:
    """A trial as a training job of its own, whose shared part is as little its own as possible.

    Args:
        hooks: those that an inline cache asks for, by its name; its own where that is not there.
    """
    made = trial.spec
    cache = made.activations.cache
    saes = made.saes
    if cache is not None:
        saes = [_with_hook(sae, cache) for sae in saes]
        cache = cache.model_copy(update={"hooks": hooks.get(inline_cache_name(cache), cache.hooks)})
        made = made.model_copy(update={"activations": made.activations.model_copy(update={"cache": cache})})
    defaults = type(made.training)()
    own = {name: getattr(made.training, name) for name in OWN_SETTINGS}
    own = {name: value for name, value in own.items() if value != getattr(defaults, name)}
    training = made.training.model_copy(update={name: getattr(defaults, name) for name in own})
    single = len(saes) == 1
    saes = [
        sae.model_copy(
            update={
                "name": trial.name if single else f"{trial.name}-{sae.name}",
                "training": sae.training.model_copy(
                    update={name: value for name, value in own.items() if getattr(sae.training, name) is None}
                ),
            }
        )
        for sae in saes
    ]
    stop = spec.median_stop
    if stop is not None and stop.uri is None:
        stop = stop.model_copy(update={"uri": f"{_folder(spec)}{MEDIAN_STOP}"})
    changes: dict[str, Any] = {"saes": saes, "training": training, "suspend": spec.suspend, "retry": 0}
    if stop is not None:
        changes["median_stop"] = stop
    return made.model_copy(update=changes)


def _with_hook(sae: SaeSpec, cache: ActivationCacheSpec) -> SaeSpec:
    return sae if sae.hook is not None else sae.model_copy(update={"hook": cache.hooks[0].key})


def hooks_by_cache(specs: Iterable[SAETrainingJobSpec]) -> dict[str, list[Hook]]:
    """The hooks of all trials, by the name of their cache."""
    found: dict[str, dict[str, Hook]] = {}
    for made in specs:
        cache = made.activations.cache
        if cache is not None:
            found.setdefault(inline_cache_name(cache), {}).update({hook.key: hook for hook in cache.hooks})
    return {name: list(hooks.values()) for name, hooks in found.items()}


def shared_part(job: SAETrainingJobSpec) -> dict[str, Any]:
    """What trials must have in common to share a job."""
    manifest = job.to_manifest()
    del manifest["saes"]
    return manifest


def join(spec: SAESweepSpec, members: Sequence[tuple[str, SAETrainingJobSpec]]) -> TrialJob:
    """The training job of trials that share one, each with its name."""
    names = tuple(name for name, _ in members)
    folder = canonical_hash(list(names))[:HASH_LENGTH]
    first = members[0][1]
    output = first.output.model_copy(update={"uri": f"{_folder(spec)}/{folder}"})
    saes = [sae for _, single in members for sae in single.saes]
    return TrialJob(folder, names, first.model_copy(update={"saes": saes, "output": output}))


def _folder(spec: SAESweepSpec) -> str:
    return spec.template.output.uri.rstrip("/")
