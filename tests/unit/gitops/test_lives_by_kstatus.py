"""kstatus of every version of an object in whole lives: Current when it is done, Failed when it has failed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.gitops.kstatus import kstatus
from tests.unit.gitops.lives import LIVES, Life, Version, WatchedCluster, Weather, lead, name_of
from tests.unit.reconcile.fake_cluster import CACHE, JOB
from tests.unit.reconcile.specs import cache_spec, job_spec


def judge(versions: Sequence[Version]) -> None:
    """The rules that hold for the versions of one object."""
    failures = 0
    for before, version in pairwise([None, *versions]):
        assert version is not None
        status = kstatus(version.resource)
        told = f"{status}, {version}"
        if version.written_by != "operator":
            assert status == "InProgress", f"a change is never taken for done before the operator has seen it: {told}"
            continue
        assert version.done or status != "Current", f"it is Current before it is done: {told}"
        assert (status == "Failed") == (version.phase == "Failed"), told
        earlier = kstatus(before.resource) if before is not None else "InProgress"
        if status == "Failed" and earlier != "Failed" and not _was_failed(versions, version):
            failures += 1
        assert failures <= version.failed_jobs, f"it is Failed and no Job has failed for it: {told}"
        if earlier in ("Current", "Failed"):
            assert status == earlier, f"what has ended changes although nobody asked for it: {told}"


def _was_failed(versions: Sequence[Version], version: Version) -> bool:
    """Whether the object had failed already when the version before this one was written by a user."""
    seen = [found for found in versions[: versions.index(version)] if found.written_by == "operator"]
    return bool(seen) and seen[-1].phase == "Failed"


def judge_all(cluster: WatchedCluster) -> None:
    for kind, name in cluster.resources:
        judge(cluster.of(kind, name))


@pytest.mark.parametrize("life", LIVES, ids=name_of)
def test_a_life_is_told_as_it_is(life: Life) -> None:
    cluster = lead(life)
    judge_all(cluster)
    kind = JOB if cluster.of(JOB) else CACHE
    last = [cluster.of(kind, name)[-1] for found, name in cluster.resources if found == kind]
    assert {kstatus(version.resource) for version in last} == {LIVES[life]}


def test_the_lives_come_through_every_phase() -> None:
    phases = {(version.kind, version.phase) for life in LIVES for version in lead(life).versions}
    expected: dict[str, set[str]] = {
        JOB: {"Preflight", "WaitingForCache", "Queued", "Running", "Succeeded", "Failed", "Suspended"},
        CACHE: {"Preparing", "Queued", "Caching", "Finalizing", "Ready", "Failed", "Suspended"},
    }
    assert {(kind, phase) for kind, told in expected.items() for phase in told} <= phases


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"observedGeneration": 1, "phase": "Running"}, "Current before it is done"),
        (
            {"observedGeneration": 1, "phase": "Running", "conditions": [{"type": "Stalled", "status": "True"}]},
            "Failed",
        ),
        (
            {"observedGeneration": 1, "phase": "Failed", "conditions": [{"type": "Ready", "status": "False"}]},
            "InProgress",
        ),
        (
            {"observedGeneration": 1, "phase": "Failed", "conditions": [{"type": "Stalled", "status": "True"}]},
            "no Job has failed",
        ),
    ],
)
def test_the_judge_finds_what_is_wrong(wrong: dict[str, Any], message: str) -> None:
    resource = {"kind": JOB, "metadata": {"name": "sae", "generation": 1}, "spec": {}, "status": wrong}
    with pytest.raises(AssertionError, match=message):
        judge([Version(resource, "operator", done=False, failed_jobs=0)])


@pytest.mark.parametrize("truth", ["Ready", "Stalled"])
def test_the_judge_finds_an_end_that_is_taken_back(truth: str) -> None:
    def version(*conditions: tuple[str, str]) -> Version:
        phase = "Failed" if ("Stalled", "True") in conditions else "Running"
        status = {
            "observedGeneration": 1,
            "phase": phase,
            "conditions": [{"type": kind, "status": truth} for kind, truth in conditions],
        }
        resource = {"kind": JOB, "metadata": {"name": "sae", "generation": 1}, "spec": {}, "status": status}
        return Version(resource, "operator", done=True, failed_jobs=1)

    judge([version((truth, "True"))])
    with pytest.raises(AssertionError, match="although nobody asked"):
        judge([version((truth, "True")), version(("Reconciling", "True"))])


@pytest.mark.parametrize(
    ("kind", "spec", "step", "change"),
    [
        (JOB, job_spec(), "train", {"retry": 1}),
        (CACHE, cache_spec(), "cache", {"retry": 1}),
        (CACHE, cache_spec(), "cache", {"tokens": 900}),
    ],
    ids=["a job's retry", "a cache's retry", "a cache's tokens"],
)
def test_a_failure_for_which_more_is_asked_already_is_no_end(
    kind: str, spec: dict[str, Any], step: str, change: dict[str, Any]
) -> None:
    weather = Weather(broken={step}, exit_code=1)
    cluster = WatchedCluster(weather)
    cluster.create(kind, "it", spec)
    cluster.run_until(lambda: any(f"-{step}-" in pod for pod in cluster.pods))
    cluster.edit(kind, "it", **change)
    cluster.run_until(lambda: cluster.status(kind, "it").get("jobName", "").endswith("-2"))
    weather.broken = set()
    cluster.run()
    assert {kstatus(version.resource) for version in cluster.of(kind, "it")} == {"InProgress", "Current"}
    judge_all(cluster)


ACTIONS = st.one_of(
    st.tuples(st.just("wait"), st.integers(1, 12)),
    st.tuples(st.sampled_from(["suspend", "resume", "retry", "more tokens", "extend the cache", "mend"]), st.just(0)),
    st.tuples(st.just("break"), st.sampled_from([("preflight",), ("train",), ("cache",), ("prepare",), ("finalize",)])),
)


@settings(max_examples=50)
@given(st.lists(ACTIONS, max_size=12), st.sampled_from([1, 2]))
def test_random_lives_are_told_as_they_are(actions: list[tuple[str, Any]], exit_code: int) -> None:
    weather = Weather(exit_code=exit_code)
    cluster = WatchedCluster(weather)
    cluster.create(JOB, "sae", job_spec())
    cluster.create(CACHE, "acts", cache_spec(storage={"uri": "s3://saes/own"}))
    retry, tokens = 0, 1000
    for action, value in actions:
        match action:
            case "wait":
                cluster.wait(value)
            case "break":
                weather.broken = set(value)
            case "mend":
                weather.broken = set()
            case "suspend" | "resume":
                cluster.edit(JOB, "sae", suspend=action == "suspend")
                cluster.edit(CACHE, "acts", suspend=action == "suspend")
            case "retry":
                retry += 1
                cluster.edit(JOB, "sae", retry=retry)
                cluster.edit(CACHE, "acts", retry=retry)
            case "more tokens":
                tokens += 500
                cluster.edit(JOB, "sae", training={"tokens": tokens})
            case _:
                tokens += 500
                cluster.edit(CACHE, "acts", tokens=tokens)
    judge_all(cluster)
    # Whatever has been: without obstacles everything comes to its end.
    weather.broken = set()
    cluster.run(400)
    cluster.edit(JOB, "sae", retry=retry + 1, suspend=False)
    cluster.edit(CACHE, "acts", retry=retry + 1, suspend=False)
    cluster.run(400)
    judge_all(cluster)
    for kind, name in ((JOB, "sae"), (CACHE, "acts")):
        assert kstatus(cluster.of(kind, name)[-1].resource) == "Current"
