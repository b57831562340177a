"""Conditions, progress and the parts of a status."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest

from sae_operator.api.status import ActivationCacheStatus, ProgressStatus, SaeStatus, SAETrainingJobStatus
from sae_operator.api.steps import Progress, SaeProgress, StepResult
from sae_operator.reconcile.attempts import JOB_DELETED, kept, merge_failed_pods, recreations, with_deleted_job
from sae_operator.reconcile.cache import reconcile_cache
from sae_operator.reconcile.conditions import Finding, Standing, build_conditions
from sae_operator.reconcile.diagnosis import Failure
from sae_operator.reconcile.observed import (
    Defaults,
    InvalidSpec,
    Metadata,
    ObservedCache,
    ObservedTrainingJob,
    PodFacts,
    SpecProblem,
)
from sae_operator.reconcile.progress import merge_checkpoint, merge_progress, merge_saes, reports, summarize
from sae_operator.reconcile.rounds import Round, current_round
from sae_operator.reconcile.training_job import reconcile_training_job
from tests.unit.reconcile.fake_cluster import CACHE, SETTINGS, FakeCluster, kstatus
from tests.unit.reconcile.specs import cache_spec

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(seconds=60)
METADATA = Metadata(name="sae", namespace="lab", uid="01234567-89ab-cdef-0123-456789abcdef", generation=4)
INVALID = InvalidSpec((SpecProblem("spec.saes[0].architecture.k", "k must be at most dSae"),))


def pod(name: str, index: int | None = None, running: bool = True) -> PodFacts:
    return PodFacts(name=name, job_name="j", step="cache", index=index, running=running)


def said(tokens: int, total: int = 100, rate: float = 10.0, at: str = "2026-01-01T00:00:00Z") -> Progress:
    return Progress(step="cache", tokens=tokens, total_tokens=total, tokens_per_second=rate, updated_at=at)


def test_transition_times_are_kept_while_a_status_stays() -> None:
    working = Standing("working", "Queued", "a")
    first = build_conditions((), working, [Finding("Unschedulable", "r", "m")], 1, NOW)
    second = build_conditions(
        first, Standing("working", "Working", "b"), [Finding("Unschedulable", "r", "n")], 2, LATER
    )
    assert [c.last_transition_time for c in second] == ["2026-01-01T00:00:00Z"] * 4
    assert [c.observed_generation for c in second] == [2] * 4
    done = build_conditions(second, Standing("done", "Completed", "c"), [], 2, LATER)
    assert [(c.type, c.status, c.last_transition_time) for c in done] == [
        ("Ready", "True", "2026-01-01T00:01:00Z"),
        ("Reconciling", "False", "2026-01-01T00:01:00Z"),
        ("Stalled", "False", "2026-01-01T00:00:00Z"),
    ]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("working", "InProgress"), ("paused", "InProgress"), ("done", "Current"), ("failed", "Failed")],
)
def test_kstatus_reads_every_standing(kind: Literal["working", "paused", "done", "failed"], expected: str) -> None:
    conditions = build_conditions((), Standing(kind, "R", "m"), [], 3, NOW)
    status = ActivationCacheStatus(conditions=conditions, observed_generation=3).to_manifest()
    assert kstatus(3, status) == expected
    assert kstatus(4, status) == "InProgress"


def test_one_condition_per_type() -> None:
    findings = [Finding("OOMKilled", "OOMKilled", "first"), Finding("OOMKilled", "OOMKilled", "second")]
    conditions = build_conditions((), Standing("working", "R", "m"), findings, 1, NOW)
    assert [c.message for c in conditions if c.type == "OOMKilled"] == ["first"]


def test_progress_is_the_sum_of_the_pods_by_index() -> None:
    pods = [pod("a-old", 0, running=False), pod("a", 0), pod("b", 1)]
    told = {
        "a-old": said(40, at="2026-01-01T00:00:00Z"),
        "a": said(50, at="2026-01-01T00:00:09Z"),
        "b": said(20, rate=5.0),
    }
    merged = merge_progress(pods, told, None, total_tokens=None, now=NOW)
    assert (merged.tokens, merged.total_tokens, merged.percent) == (70, 200, 35)
    assert (merged.tokens_per_second, merged.eta_seconds) == (15, 9)


def test_unchanged_progress_is_not_written_again() -> None:
    before = merge_progress([pod("a")], {"a": said(40)}, None, total_tokens=100, now=NOW)
    assert merge_progress([pod("a")], {"a": said(40)}, before, total_tokens=100, now=LATER) is before
    # An operator that has just started has heard of nobody yet.
    assert merge_progress([pod("a")], {}, before, total_tokens=100, now=LATER) is before


def test_percent_is_rounded_down_and_bounded() -> None:
    nearly = merge_progress([pod("a")], {"a": said(999, 1000)}, None, total_tokens=None, now=NOW)
    assert nearly.percent == 99
    beyond = merge_progress([pod("a")], {"a": said(1001, 1000)}, None, total_tokens=None, now=NOW)
    assert (beyond.tokens, beyond.percent) == (1000, 100)
    assert merge_progress([pod("a")], {}, None, total_tokens=None, now=NOW).percent == 0


def test_the_summary_is_of_the_best_sae_that_did_not_fail() -> None:
    saes = [
        SaeStatus(name="a", explained_variance=0.71234, l0=31.96),
        SaeStatus(name="b", explained_variance=0.9, phase="Failed"),
        SaeStatus(name="c"),
    ]
    summary = summarize(saes)
    assert summary is not None
    assert summary.to_manifest() == {"sae": "a", "explainedVariance": "0.712", "l0": "32.0"}
    assert summarize([SaeStatus(name="c")]) is None


def test_figures_that_are_not_told_keep_their_last_value() -> None:
    before = [SaeStatus(name="a", phase="Running", explained_variance=0.5, l0=30.0)]
    merged = merge_saes([SaeProgress(name="a", loss=3.0, l0=31.0)], before)
    assert merged == [SaeStatus(name="a", phase="Running", explained_variance=0.5, l0=31.0)]
    assert merge_saes((), before) == before


def test_a_checkpoint_is_new_only_when_it_holds_more() -> None:
    first = merge_checkpoint(
        [said(0).model_copy(update={"checkpoint_tokens": 100, "checkpoint_time": "t1"})], None, "s3://b/out/"
    )
    assert first is not None
    assert (first.tokens, first.uri, first.time) == (100, "s3://b/out/checkpoints/100/", "t1")
    restored = said(0).model_copy(update={"checkpoint_tokens": 100, "checkpoint_time": "t2"})
    assert merge_checkpoint([restored], first, "s3://b/out") is first


def test_a_pods_message_completes_what_it_said_before() -> None:
    done = StepResult(step="cache", exit_code=0, reason="Completed", tokens=100, shards_complete=4)
    stopped = StepResult(step="cache", exit_code=143, reason="Stopped", checkpoint_tokens=70)
    pods = [
        replace(pod("a", 0, running=False), result=done, finish_time=NOW),
        replace(pod("b", 1, running=False), result=stopped, finish_time=LATER),
        pod("c", 2),
    ]
    heard = {found.name: said for found, said in reports(pods, {"a": said(90), "b": said(75)})}
    assert (heard["a"].tokens, heard["a"].shards_complete) == (100, 4)
    assert (heard["b"].tokens, heard["b"].checkpoint_tokens) == (75, 70)
    assert heard["b"].checkpoint_time == "2026-01-01T00:01:00Z"
    assert "c" not in heard
    # Nothing was polled: the messages suffice.
    assert {found.name: said.tokens for found, said in reports(pods, {})} == {"a": 100, "b": 0}


def test_deletions_are_told_once_and_counted_however_many_failures_follow() -> None:
    entries = with_deleted_job([], "train", "sae-01234567-train-1", NOW)
    entries = with_deleted_job(entries, "train", "sae-01234567-train-1", LATER)
    assert recreations(entries, "train") == 1
    assert recreations(entries, "preflight") == 0
    failures = [entries[0].model_copy(update={"reason": "StepFailed", "time": str(i)}) for i in range(30)]
    left = kept([*entries, *failures])
    assert left is not None
    assert len(left) == 10
    assert [entry.reason for entry in left].count(JOB_DELETED) == 1


def test_a_failure_that_found_no_room_does_not_come_back_as_a_new_one() -> None:
    pods = [
        replace(pod(f"p-{minute:02}", running=False), phase="Failed", finish_time=NOW + timedelta(minutes=minute))
        for minute in range(14)
    ]
    first = kept(merge_failed_pods([], pods, lambda found: Failure("StepFailed", found.name)))
    assert first is not None
    assert [entry.message for entry in first] == [f"p-{minute:02}" for minute in range(4, 14)]
    assert kept(merge_failed_pods(first, pods[::-1], lambda found: Failure("StepFailed", found.name))) == first


@pytest.mark.parametrize(
    ("ended", "asked", "interrupt", "begins"),
    [
        (None, Round(0, 100, ("a",)), False, False),
        ("done", Round(0, 100, ("a",)), False, False),
        ("done", Round(9, 100, ("a",)), False, False),
        ("done", Round(0, 200, ("a",)), False, True),
        ("done", Round(0, 100, ("a", "b")), False, True),
        ("failed", Round(0, 100, ("a",)), False, False),
        ("failed", Round(1, 100, ("a",)), False, True),
        ("failed", Round(0, 200, ("a",)), False, True),
        ("failed", Round(0, 100, ("b", "a")), False, True),
        (None, Round(1, 200, ("a", "b")), False, False),
        (None, Round(0, 200, ("a",)), True, True),
        (None, Round(1, 100, ("a",)), True, False),
    ],
)
def test_when_another_round_begins(
    ended: Literal["done", "failed"] | None, asked: Round, interrupt: bool, begins: bool
) -> None:
    status = ActivationCacheStatus(observed_retry=0, observed_tokens=100)
    found = current_round(status, ended, asked, observed_hooks=["a"], more_interrupts=interrupt)
    assert found == (replace(asked, begins=True) if begins else Round(0, 100, ("a",)))


def test_each_round_has_a_key_of_its_own() -> None:
    rounds = [Round(0, 100), Round(1, 100), Round(0, 200), Round(0, 100, ("a",)), Round(0, 100, ("a", "b"))]
    assert len({found.key for found in rounds}) == len(rounds)
    assert Round(0, 100, ("b", "a")).key == Round(0, 100, ("a", "b")).key


def test_a_status_that_does_not_say_its_hooks_is_about_those_that_are_asked_for() -> None:
    status = ActivationCacheStatus(observed_retry=0, observed_tokens=100)
    assert not current_round(status, "done", Round(0, 100, ("a",)), more_interrupts=False).begins


def test_an_invalid_spec_is_stalled_with_the_fields_path_until_it_is_corrected() -> None:
    observed = ObservedTrainingJob(metadata=METADATA, spec=INVALID, status=SAETrainingJobStatus())
    wanted = reconcile_training_job(observed, SETTINGS, NOW)
    assert kstatus(4, wanted.status) == "Failed"
    stalled, invalid = wanted.status["conditions"][2:]
    assert (stalled["type"], stalled["reason"]) == ("Stalled", "Invalid")
    assert invalid["message"] == "spec.saes[0].architecture.k: k must be at most dSae"
    assert [event.reason for event in wanted.events] == ["Invalid"]
    again = reconcile_training_job(
        ObservedTrainingJob(metadata=METADATA, spec=INVALID, status=SAETrainingJobStatus.model_validate(wanted.status)),
        SETTINGS,
        LATER,
    )
    assert (again.status, again.events) == (wanted.status, ())
    cluster = FakeCluster()
    cluster.create(CACHE, "acts", cache_spec())
    cluster.resources[CACHE, "acts"]["status"] = wanted.status
    cluster.run()
    assert cluster.phase(CACHE, "acts") == "Ready"
    assert cluster.condition(CACHE, "acts", "Invalid") is None


def test_a_finished_resource_stays_so_whatever_its_spec_has_become() -> None:
    cluster = FakeCluster()
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run()
    status = ActivationCacheStatus.model_validate(cluster.status(CACHE, "acts"))
    wanted = reconcile_cache(ObservedCache(metadata=METADATA, spec=INVALID, status=status), SETTINGS, NOW)
    assert kstatus(4, wanted.status) == "Current"


def test_malformed_defaults_are_told_while_work_goes_on() -> None:
    cluster = FakeCluster(defaults=Defaults(problem="nodeSelector is not what it should be"))
    cluster.create(CACHE, "acts", cache_spec())
    cluster.wait(2)
    condition = cluster.condition(CACHE, "acts", "DefaultsInvalid")
    assert condition is not None
    assert condition["message"].startswith("ConfigMap sae-operator-defaults: nodeSelector")


def test_a_resource_that_is_being_deleted_is_left_alone() -> None:
    metadata = Metadata(name="sae", namespace="lab", uid=METADATA.uid, generation=4, deleting=True)
    status = SAETrainingJobStatus(phase="Running", progress=ProgressStatus(tokens=5))
    observed = ObservedTrainingJob(metadata=metadata, spec=INVALID, status=status)
    wanted = reconcile_training_job(observed, SETTINGS, NOW)
    assert (wanted.create, wanted.delete_jobs, wanted.status) == ((), (), status.to_manifest())
