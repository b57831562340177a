"""Spaces become trials, and trials training jobs: the same each time, and an edit keeps what it does not touch."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sae_operator.api.base import MAX_NAME_LENGTH, NAME_PATTERN
from sae_operator.api.identity import inline_cache_name, training_identity
from sae_operator.api.problems import describe_errors
from sae_operator.api.sweep import MAX_TRIALS, SAESweepSpec
from sae_operator.api.sweep_expansion import (
    MAX_SAES,
    SweepInvalid,
    Trial,
    expand,
    job_name,
    pack,
    trial_of,
)
from sae_operator.api.training_job import SAETrainingJobSpec
from sae_operator.reconcile.sweep_trials import outline
from tests.specs import CACHE_SPEC, JOB_SPEC, edited

K, RATE = "saes[0].architecture.k", "training.learningRate"


def sweep(*parameters: dict[str, Any], edits: dict[str, Any] | None = None, **space: Any) -> SAESweepSpec:
    """A sweep over these parameters; `edits` are of the template, what begins with '.' of the sweep itself."""
    changes = {
        path.removeprefix(".") if path.startswith(".") else f"template.{path}": value
        for path, value in (edits or {}).items()
    }
    made = {"template": JOB_SPEC, "space": {"parameters": list(parameters), **space}}
    return SAESweepSpec.model_validate(edited(made, changes))


def values(path: str, *found: Any) -> dict[str, Any]:
    return {"path": path, "values": list(found)}


def between(path: str, low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"path": path, "range": {"min": low, "max": high, **more}}


def described(trials: list[Trial]) -> list[str]:
    return [trial.describe() for trial in trials]


def problems(spec: SAESweepSpec) -> list[tuple[str, str]]:
    with pytest.raises(SweepInvalid) as raised:
        expand(spec)
    return [(problem.field, problem.message) for problem in raised.value.problems]


# Trials


def test_a_grid_holds_every_combination_in_the_order_of_its_values() -> None:
    trials = expand(sweep(values(K, 8, 16), values(RATE, 0.001, 0.01, 0.1)))
    assert described(trials)[:4] == [
        f"{K}=8, {RATE}=0.001",
        f"{K}=8, {RATE}=0.01",
        f"{K}=8, {RATE}=0.1",
        f"{K}=16, {RATE}=0.001",
    ]
    assert len(trials) == 6
    assert [trial.spec.saes[0].architecture.k for trial in trials] == [8, 8, 8, 16, 16, 16]
    assert trials[1].spec.training.learning_rate == 0.01


def test_a_list_holds_what_is_written() -> None:
    listed = [{"values": [8, 0.1]}, {"values": [32, 0.001]}]
    trials = expand(sweep({"path": K}, {"path": RATE}, method="list", trials=listed))
    assert described(trials) == [f"{K}=8, {RATE}=0.1", f"{K}=32, {RATE}=0.001"]


def test_a_field_that_the_template_leaves_out_may_be_set() -> None:
    trial, *_ = expand(sweep(values("training.finetuning.method", "scale"), values("training.finetuning.tokens", 64)))
    assert trial.spec.training.finetuning is not None
    assert trial.spec.training.finetuning.method == "scale"


def test_whole_objects_and_lists_are_values_too() -> None:
    topk, batchtopk = {"type": "topk", "k": 4}, {"type": "batchtopk", "k": 4}
    trials = expand(sweep(values("saes[0].architecture", topk, batchtopk)))
    assert [trial.spec.saes[0].architecture.type for trial in trials] == ["topk", "batchtopk"]
    assert described(trials)[0] == 'saes[0].architecture={"type": "topk", "k": 4}'


def test_all_saes_can_be_set_at_once() -> None:
    two = [{**JOB_SPEC["saes"][0], "name": name} for name in ("a", "b")]
    spec = sweep(values("saes[*].architecture.k", 1, 2), edits={"saes": two})
    trials = expand(spec)
    assert [[sae.architecture.k for sae in trial.spec.saes] for trial in trials] == [[1, 1], [2, 2]]
    job, *_ = pack(spec, trials)
    assert [sae.name for sae in job.spec.saes] == [f"{trials[0].name}-a", f"{trials[0].name}-b"]
    assert {trial_of(sae.name) for sae in job.spec.saes} == {trials[0].name}


def test_a_name_is_the_trials_own_whatever_else_is_in_the_space() -> None:
    narrow, wide = expand(sweep(values(K, 8, 16))), expand(sweep(values(K, 32, 16, 4)))
    assert narrow[1].name == wide[1].name
    assert len({trial.name for trial in [*narrow, *wide]}) == 4
    # A number is the same however it is written.
    assert expand(sweep(values(RATE, 1)))[0].name == expand(sweep(values(RATE, 1.0)))[0].name
    # Another template is no other trial: what it trains is told by its marker in the store.
    assert expand(sweep(values(K, 8), edits={"run": {"backoffLimit": 9}}))[0].name == narrow[0].name


def test_random_numbers_lie_in_their_range() -> None:
    spec = sweep(
        between(RATE, 1e-5, 1e-1, scale="log"),
        between(K, 1, 500, whole=True),
        values("training.adamBeta1", 0.0, 0.9),
        method="random",
        count=400,
    )
    trials = expand(spec)
    rates = [trial.parameters[RATE] for trial in trials]
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    # Every order of magnitude is as likely: a quarter of the draws each.
    for exponent in range(-5, -1):
        assert 60 < sum(10**exponent <= rate < 10 ** (exponent + 1) for rate in rates) < 140
    assert all(isinstance(trial.parameters[K], int) for trial in trials)
    assert {trial.parameters["training.adamBeta1"] for trial in trials} == {0.0, 0.9}


@given(st.integers(0, 2**40), st.integers(1, 30), st.integers(1, 30))
def test_more_random_trials_keep_the_earlier_ones(seed: int, first: int, second: int) -> None:
    few, many = sorted((first, second))
    one, other = (
        expand(sweep(between(RATE, 1e-5, 1e-1, scale="log"), method="random", count=count, seed=seed))
        for count in (few, many)
    )
    assert described(other)[:few] == described(one)


def test_another_seed_draws_other_trials() -> None:
    drawn = [
        described(expand(sweep(between(RATE, 0.1, 0.2), method="random", count=5, seed=seed))) for seed in (1, 2, 1)
    ]
    assert drawn[0] == drawn[2]
    assert not set(drawn[0]) & set(drawn[1])


def test_random_trials_differ_until_there_are_no_others() -> None:
    trials = expand(sweep(values(K, 1, 2, 3, 4), method="random", count=4))
    assert sorted(trial.parameters[K] for trial in trials) == [1, 2, 3, 4]
    found = problems(sweep(values(K, 1, 2, 3, 4), method="random", count=5))
    assert found[0][0] == "spec.space.count"
    assert "the 4 different trials" in found[0][1]


# What is wrong


@pytest.mark.parametrize(
    ("parameter", "field", "words"),
    [
        (values("saes[0].architecture.q", 1), "spec.template.saes[0].architecture.q", "unknown field 'q'"),
        (values("saes[1].seed", 1), "spec.template.saes[1].seed", "must name one of 1 items"),
        (values("saes.seed", 1), "spec.template.saes.seed", "must name one of 1 items, e.g. [0], not 'seed'"),
        (values("training.tokens.x", 1), "spec.template.training.tokens.x", "holds 'x' nowhere"),
        (values("training[0]", 1), "spec.template.training[0]", "what precedes it is no list"),
        (values(K, 8, "many"), "spec.template.saes[0].architecture.k", "must be a whole number"),
        (values("output.uri", "s3://else/where"), "spec.space.parameters[0].path", "is the sweep's own to set"),
        (values("suspend", True), "spec.space.parameters[0].path", "is the sweep's own to set"),
        (values("saes[0].name", "a"), "spec.space.parameters[0].path", "is the sweep's own to set"),
    ],
)
def test_a_problem_names_the_field(parameter: dict[str, Any], field: str, words: str) -> None:
    edits = {"training": {"tokens": 100}} if "tokens" in parameter["path"] else None
    (found,) = problems(sweep(parameter, edits=edits))
    assert found[0] == field
    assert words in found[1]


@pytest.mark.parametrize(
    ("parameter", "space", "words"),
    [
        (between(K, 1, 5), {}, "needs values with method grid; a range is only for method random"),
        ({"path": K}, {}, "needs values with method grid"),
        (values(K, 1, 2) | between(K, 1, 2), {}, "needs values with method grid"),
        ({"path": K}, {"method": "random", "count": 2}, "needs either values or a range with method random"),
        (
            values(K, 1, 2) | between(K, 1, 2),
            {"method": "random", "count": 2},
            "needs either values or a range with method random",
        ),
        (values(K, 1, 2), {"method": "list", "trials": [{"values": [3]}]}, "takes neither values nor a range"),
        (between(K, 1, 2), {"method": "list", "trials": [{"values": [3]}]}, "takes neither values nor a range"),
    ],
)
def test_values_and_ranges_must_suit_the_method(parameter: dict[str, Any], space: dict[str, Any], words: str) -> None:
    (found,) = problems(sweep(parameter, **space))
    assert found[0] == "spec.space.parameters[0]"
    assert words in found[1]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1: "a", "b": "c"}, "keys of a value must be text"),
        ([{"deep": b"bytes"}], "must be a number, a text, true or false, a list or a mapping"),
        ({"a"}, "must be a number, a text, true or false, a list or a mapping"),
    ],
)
def test_what_only_yaml_has_is_no_value(value: Any, words: str) -> None:
    with pytest.raises(ValidationError) as raised:
        sweep(values("run.nodeSelector", value))
    (found,) = describe_errors(raised.value, SAESweepSpec)
    assert found.field == "spec.space.parameters[0].values[0]"
    assert words in found.message


def test_a_trial_without_the_objectives_metric_is_refused() -> None:
    (found,) = problems(sweep(values("evaluation.metrics", ["explained_variance"], ["l0"])))
    assert found[0] == "spec.template.evaluation.metrics"
    assert found[1].startswith("must name explained_variance, the sweep's objective.metric (in the trial")
    found_too = problems(sweep(values("evaluation", {"metrics": ["mse"]})))
    assert found_too[0][0] == "spec.template.evaluation.metrics"


def test_addresses_of_trials_may_be_no_longer_than_others() -> None:
    longest = f"s3://saes/{'o' * 1002}"
    stop = {".medianStop": {"afterTokens": 100}}
    (job,) = pack(spec := sweep(values(K, 1), edits={"output.uri": longest, **stop}), expand(spec))
    assert SAETrainingJobSpec.model_validate(job.spec.to_manifest()) == job.spec
    (found,) = problems(sweep(values(K, 1), edits={"output.uri": f"{longest}o"}))
    assert found[0] == "spec.template.output.uri"
    assert "at most 1012 characters in a sweep" in found[1]


def test_numbers_that_are_drawn_lie_in_their_range_when_rounded() -> None:
    trial, *_ = expand(sweep(between("training.batchSize", 1000001, 1000002, whole=True), method="random", count=1))
    assert trial.parameters["training.batchSize"] in (1000001, 1000002)
    for low, high in ((0.12345671, 0.12345674), (0.12345678, 0.12345679)):
        (trial,) = expand(sweep(between(RATE, low, high), method="random", count=1))
        assert low <= trial.parameters[RATE] <= high


def test_a_problem_that_many_trials_have_is_told_once_with_the_first() -> None:
    (found,) = problems(sweep(values(RATE, *(i / 100 for i in range(1, 60))), values(K, 8, 5000)))
    assert f"(in the trial {RATE}=0.01, {K}=5000)" in found[1]


def test_what_holds_another_parameter_is_refused() -> None:
    (found,) = problems(sweep(values("saes[0].architecture", {"type": "topk", "k": 1}), values(K, 1)))
    assert found == (
        "spec.space.parameters[0].path",
        f"saes[0].architecture holds {K}, which varies, too; vary only one of them",
    )


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ("saes[*].seed", "saes[0].seed"),
        ("saes[0]", "saes[*].seed"),
        ("saes[*].architecture", K),
        ("saes", "saes[*].seed"),
        ("saes[00].seed", "saes[0].seed"),
    ],
)
def test_all_items_hold_each_one(outer: str, inner: str) -> None:
    found = problems(sweep(values(outer, 1), values(inner, 2)))
    assert f"{outer} holds {inner}, which varies, too; vary only one of them" in [message for _, message in found]


def test_the_same_trial_twice_is_refused() -> None:
    (found,) = problems(sweep(values(K, 8, 8)))
    assert found == ("spec.space", f"holds the trial {K}=8 twice; remove one")


def test_a_list_needs_a_value_for_each_parameter() -> None:
    (found,) = problems(
        sweep({"path": K}, {"path": RATE}, method="list", trials=[{"values": [1, 0.1]}, {"values": [1]}])
    )
    assert found == ("spec.space.trials[1].values", "must have one value for each of the 2 parameters, in their order")


def test_a_grid_that_explodes_is_counted_and_not_made() -> None:
    (found,) = problems(sweep(*(values(f"training.x{i}", *range(64)) for i in range(16))))
    assert str(64**16) in found[1]
    assert f"at most {MAX_TRIALS}" in found[1]


def test_names_of_several_saes_leave_room_for_the_trials() -> None:
    two = [{**JOB_SPEC["saes"][0], "name": name} for name in ("a" * 51, "b")]
    (found,) = problems(sweep(values("training.adamBeta1", 0.5), edits={"saes": two}))
    assert found[0] == "spec.template.saes[0].name"
    assert "at most 50 characters" in found[1]


# Jobs


def test_trials_that_differ_only_in_their_saes_share_jobs() -> None:
    spec = sweep(values(K, *range(1, 8)), edits={".trialsPerJob": 3})
    trials = expand(spec)
    jobs = pack(spec, trials)
    assert [len(job.trials) for job in jobs] == [3, 3, 1]
    assert [name for job in jobs for name in job.trials] == [trial.name for trial in trials]
    assert [sae.name for sae in jobs[0].spec.saes] == list(jobs[0].trials)
    assert jobs[0].spec.output.uri == f"s3://saes/out/{jobs[0].folder}"


def test_learning_rates_are_an_saes_own_and_batch_sizes_are_not() -> None:
    spec = sweep(values(RATE, 0.1, 0.2), values("training.batchSize", 64, 128), edits={".trialsPerJob": 16})
    jobs = pack(spec, expand(spec))
    assert [job.spec.training.batch_size for job in jobs] == [64, 128]
    assert all(job.spec.training.learning_rate is None for job in jobs)
    assert [sae.training.learning_rate for sae in jobs[0].spec.saes] == [0.1, 0.2]


def test_an_saes_own_setting_goes_before_the_trainings() -> None:
    spec = sweep(values(RATE, 0.1, 0.2), edits={"saes.0.training": {"learningRate": 0.5}})
    assert [job.spec.saes[0].training.learning_rate for job in pack(spec, expand(spec))] == [0.5, 0.5]


def test_all_trials_share_one_cache_with_the_hooks_of_all() -> None:
    hooks = [f"transformer.h.{i}" for i in (3, 5, 7)]
    spec = sweep(values("activations.cache.hooks[0].name", *hooks), values(K, 8, 16), edits={".trialsPerJob": 16})
    jobs = pack(spec, expand(spec))
    (job,) = jobs
    cache = job.spec.activations.cache
    assert cache is not None
    assert [hook.name for hook in cache.hooks] == hooks
    assert [sae.hook for sae in job.spec.saes] == [hook for hook in hooks for _ in (8, 16)]


def test_a_trial_is_the_same_training_whatever_hooks_others_have() -> None:
    wide = sweep(values("activations.cache.hooks[0].name", "transformer.h.3", "transformer.h.5"))
    narrow = sweep(values("activations.cache.hooks[0].name", "transformer.h.3"))
    one, other = pack(wide, expand(wide))[0], pack(narrow, expand(narrow))[0]
    assert one.folder == other.folder
    assert training_identity(one.spec) == training_identity(other.spec)


def test_more_hooks_than_a_cache_may_have_are_refused_unless_they_lie_elsewhere() -> None:
    name, uri = "activations.cache.hooks[0].name", "activations.cache.storage.uri"
    names = [f"transformer.h.{i}" for i in range(17)]
    (found,) = problems(sweep(values(name, *names)))
    assert found[0] == "spec.template.activations.cache.hooks"
    assert found[1].startswith("are 17 of one cache in all trials together; at most 16 are allowed")
    places = [{"values": [each, f"s3://saes/{i // 16}"]} for i, each in enumerate(names)]
    spec = sweep({"path": name}, {"path": uri}, edits={".trialsPerJob": 16}, method="list", trials=places)
    jobs = pack(spec, expand(spec))
    caches = [job.spec.activations.cache for job in jobs]
    assert [len(cache.hooks) for cache in caches if cache is not None] == [16, 1]
    assert outline(spec).job(spec, jobs[0].trials) == jobs[0]


def test_other_contexts_are_another_cache() -> None:
    spec = sweep(values("activations.cache.contextSize", 64, 128), edits={".trialsPerJob": 16})
    caches = [job.spec.activations.cache for job in pack(spec, expand(spec))]
    assert len({inline_cache_name(cache) for cache in caches if cache is not None}) == 2


def test_jobs_that_stop_by_the_median_share_a_folder() -> None:
    spec = sweep(values(K, 1, 2), edits={".medianStop": {"afterTokens": 100}})
    stops = [job.spec.median_stop for job in pack(spec, expand(spec))]
    assert [stop.uri if stop is not None else None for stop in stops] == ["s3://saes/out/median-stop"] * 2


@given(st.data())
def test_packing_leaves_nothing_out_and_what_is_taken_changes_no_other_job(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 500), min_size=1, max_size=20, unique=True))
    batches = data.draw(st.lists(st.sampled_from([64, 128, 256]), min_size=1, max_size=3, unique=True))
    size = data.draw(st.integers(1, 16))
    saes = [{**JOB_SPEC["saes"][0], "name": f"s{i}"} for i in range(data.draw(st.integers(1, 5)))]
    spec = sweep(
        values("saes[*].architecture.k", *counts),
        values("training.batchSize", *batches),
        edits={"saes": saes, ".trialsPerJob": size},
    )
    trials = expand(spec)
    jobs = pack(spec, trials)
    assert sorted(name for job in jobs for name in job.trials) == sorted(trial.name for trial in trials)
    assert all(len(job.spec.saes) <= MAX_SAES for job in jobs)
    assert all(len(job.trials) <= size for job in jobs)
    assert len({job.folder for job in jobs}) == len(jobs)
    # Jobs are made in order: what is left is packed as it was.
    made = data.draw(st.integers(0, len(jobs)))
    taken = {name for job in jobs[:made] for name in job.trials}
    assert pack(spec, trials, taken) == jobs[made:]
    # The operator's outline says the same, with no spec kept.
    sketched = outline(spec)
    assert [tuple(names) for names in sketched.groups(taken, size)] == [job.trials for job in jobs[made:]]
    if jobs:
        assert sketched.job(spec, jobs[-1].trials) == jobs[-1]
    assert [trial.name for trial in sketched.trials] == [trial.name for trial in trials]


@given(st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda name: len(name) <= MAX_NAME_LENGTH), st.uuids())
def test_names_of_jobs_are_valid_and_a_sweeps_own(name: str, uid: Any) -> None:
    source = random.Random(name)
    trials = [f"t-{source.randrange(16**10):010x}" for _ in range(3)]
    made = job_name(name, str(uid), trials)
    assert len(made) <= MAX_NAME_LENGTH
    assert made[0].isalnum()
    assert made.startswith(name[:20].rstrip("-"))
    assert made == job_name(name, str(uid), trials)
    assert made != job_name(name, str(uid), trials[:2])
    assert made != job_name(name, f"{uid}0", trials)


def test_what_the_operator_keeps_tells_what_is_passed_on() -> None:
    spec = sweep(values("run.image", "a:1", "b:1"), values("training.tokens", 100, 200), values(K, 1, 2))
    sketched = outline(spec)
    assert len(sketched.kinds) == 4
    assert sketched.tokens == 200
    assert sorted({sample.run.image for sample in sketched.samples if sample.run.image}) == ["a:1", "b:1"]
    assert len({kind.template for kind in sketched.kinds}) == 4
    assert CACHE_SPEC["tokens"] == outline(sweep(values(K, 1))).tokens
