"""What goes wrong, and what its user reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.reconcile.fake_cluster import CACHE, JOB, FakeCluster, PodScript, Script
from tests.unit.reconcile.specs import cache_spec, job_spec
from tests.unit.reconcile.test_lives import inline_cache_of, steps_of


def only(step: str, *pods: PodScript) -> Script:
    """A script for one step: one entry per pod of an index, the last one for all that follow; other steps work."""

    def script(name: str, index: int, earlier: int) -> PodScript:
        return pods[min(earlier, len(pods) - 1)] if name == step else PodScript(seconds=2)

    return script


def result(step: str, exit_code: int, reason: str, message: str) -> str:
    return json.dumps({"step": step, "exitCode": exit_code, "reason": reason, "message": message})


def uri_job(**changes: Any) -> dict[str, Any]:
    return job_spec({"uri": "s3://saes/some/cache"}, **changes)


def message_of(cluster: FakeCluster, kind: str, name: str, condition_type: str) -> str:
    condition = cluster.condition(kind, name, condition_type)
    assert condition is not None
    assert condition["status"] == "True"
    return condition["message"]


def test_exit_code_2_fails_at_once_with_the_pods_message() -> None:
    text = "spec.hooks[0].name: no such hook; nearest: model.layers.0"
    said = result("preflight", 2, "HookNotFound", text)
    cluster = FakeCluster(only("preflight", PodScript(exit_code=2, message=said)))
    cluster.create(JOB, "sae", job_spec())
    cluster.run()
    assert cluster.phases("sae") == ["Preflight", "Failed"]
    assert message_of(cluster, JOB, "sae", "Stalled") == text
    stalled = cluster.condition(JOB, "sae", "Stalled")
    assert stalled is not None
    assert stalled["reason"] == "HookNotFound"
    assert len(cluster.pods) == 1
    assert ("sae", "HookNotFound", text) in cluster.events
    # Nothing was asked for that costs a GPU.
    assert [kind for kind, _ in cluster.resources] == [JOB]


def test_other_exit_codes_are_retried_until_the_backoff_limit() -> None:
    failing = PodScript(exit_code=1, message="Traceback: connection reset")
    cluster = FakeCluster(only("train", failing))
    cluster.create(JOB, "sae", uri_job(run={"backoffLimit": 2}))
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Failed"
    message = message_of(cluster, JOB, "sae", "Stalled")
    assert "exit code 1: Traceback: connection reset" in message
    assert "3 failed pods" in message
    assert [entry["reason"] for entry in cluster.status(JOB, "sae")["attempts"]] == ["StepFailed"] * 3


def test_a_retry_that_works_leaves_only_the_note_of_the_failure() -> None:
    cluster = FakeCluster(only("train", PodScript(exit_code=1, message="boom"), PodScript()))
    cluster.create(JOB, "sae", uri_job())
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    (entry,) = cluster.status(JOB, "sae")["attempts"]
    assert (entry["step"], entry["reason"]) == ("train", "StepFailed")


def test_a_disruption_of_the_node_counts_for_nothing() -> None:
    gone = PodScript(exit_code=143, disrupted=True)
    cluster = FakeCluster(only("train", gone, gone, gone, PodScript()))
    cluster.create(JOB, "sae", uri_job(run={"backoffLimit": 0}))
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert {entry["reason"] for entry in cluster.status(JOB, "sae")["attempts"]} == {"Disrupted"}


def test_two_oom_kills_without_a_checkpoint_end_it() -> None:
    killed = PodScript(exit_code=137, reason="OOMKilled")
    cluster = FakeCluster(only("train", killed))
    cluster.create(JOB, "sae", uri_job(run={"resources": {"limits": {"memory": "2Gi"}}}))
    cluster.run_until(lambda: cluster.condition(JOB, "sae", "OOMKilled") is not None)
    assert cluster.phase(JOB, "sae") != "Failed"
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Failed"
    message = message_of(cluster, JOB, "sae", "Stalled")
    assert "killed for memory 2 times" in message
    assert "memory limit of 2Gi" in message
    assert "spec.run.resources.limits.memory" in message
    cluster.wait(3)
    # The Job, which would have tried again, is gone.
    assert not [name for name in cluster.jobs if "train" in name]


def test_oom_kills_with_checkpoints_in_between_go_on() -> None:
    def script(step: str, index: int, earlier: int) -> PodScript:
        if step != "train":
            return PodScript(seconds=2)

        def progress(second: int) -> dict[str, Any]:
            tokens = 100 * (earlier + 1) if second > 2 else 100 * earlier
            when = {"checkpointTokens": tokens, "checkpointTime": cluster.now.strftime("%Y-%m-%dT%H:%M:%SZ")}
            return {"tokens": tokens, "totalTokens": 1000, **(when if tokens else {})}

        killed = earlier < 3
        return PodScript(
            seconds=5, progress=progress, exit_code=137 if killed else 0, reason="OOMKilled" if killed else None
        )

    cluster = FakeCluster(script)
    cluster.create(JOB, "sae", uri_job())
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"


def test_a_restored_checkpoint_is_no_progress() -> None:
    def script(step: str, index: int, earlier: int) -> PodScript:
        if step != "train":
            return PodScript(seconds=2)

        def progress(second: int) -> dict[str, Any]:
            when = cluster.now.strftime("%Y-%m-%dT%H:%M:%SZ")
            return {"tokens": 100, "totalTokens": 1000, "checkpointTokens": 100, "checkpointTime": when}

        return PodScript(seconds=5, progress=progress, exit_code=137, reason="OOMKilled")

    cluster = FakeCluster(script)
    cluster.create(JOB, "sae", uri_job(run={"backoffLimit": 50}))
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Failed"
    assert len([pod for pod in cluster.pods if "train" in pod]) <= 2


def test_an_oom_killed_cache_pod_names_the_inline_caches_field() -> None:
    cluster = FakeCluster(only("cache", PodScript(exit_code=137, reason="OOMKilled")))
    cluster.create(JOB, "sae", job_spec())
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Failed"
    message = message_of(cluster, JOB, "sae", "Stalled")
    assert message.startswith(f"ActivationCache {inline_cache_of(cluster)} failed: killed for memory")
    assert "spec.activations.cache.run.resources.limits.memory" in message


@pytest.mark.parametrize(
    ("pod", "condition", "words"),
    [
        (
            PodScript(waits=("ImagePullBackOff", 'Back-off pulling image "nope"')),
            "ImagePullFailed",
            ["cannot be pulled", "spec.run.image"],
        ),
        (
            PodScript(waits=("CreateContainerConfigError", 'secret "s3" not found')),
            "SecretMissing",
            ['secret "s3" not found', "namespace lab"],
        ),
        (
            PodScript(unschedulable="0/1 nodes are available: 1 Insufficient nvidia.com/gpu."),
            "Unschedulable",
            ["Insufficient nvidia.com/gpu", "spec.run.resources"],
        ),
        (PodScript(waits=("RunContainerError", "no such command")), "PodNotStarting", ["no such command"]),
    ],
)
def test_what_keeps_a_pod_from_starting_is_told_and_not_fatal(pod: PodScript, condition: str, words: list[str]) -> None:
    healed = False

    def script(step: str, index: int, earlier: int) -> PodScript:
        return pod if step == "train" and not healed else PodScript(seconds=2)

    cluster = FakeCluster(script)
    cluster.create(JOB, "sae", uri_job())
    cluster.run_until(lambda: cluster.condition(JOB, "sae", condition) is not None)
    cluster.wait(60)
    assert cluster.phase(JOB, "sae") == "Queued"
    message = message_of(cluster, JOB, "sae", condition)
    assert all(word in message for word in words), message
    ready = cluster.condition(JOB, "sae", "Ready")
    assert ready is not None
    assert (ready["status"], ready["reason"], ready["message"]) == ("False", condition, message)
    assert [reason for _, reason, _ in cluster.events].count(condition) == 1
    healed = True
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert cluster.condition(JOB, "sae", condition) is None


def test_nodes_that_come_and_go_are_no_news_but_another_cause_is() -> None:
    said = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."

    def script(step: str, index: int, earlier: int) -> PodScript:
        return PodScript(unschedulable=said) if step == "train" else PodScript(seconds=2)

    cluster = FakeCluster(script)
    cluster.create(JOB, "sae", uri_job())
    cluster.run_until(lambda: cluster.condition(JOB, "sae", "Unschedulable") is not None)
    calls = cluster.calls
    for nodes in range(2, 30):
        said = f"0/{nodes} nodes are available: {nodes} Insufficient nvidia.com/gpu."
        cluster.wait(2)
    assert cluster.calls == calls
    said = "0/30 nodes are available: 30 node(s) had untolerated taint(s)."
    cluster.wait(2)
    assert "untolerated" in message_of(cluster, JOB, "sae", "Unschedulable")
    assert cluster.calls == calls + 1


def test_the_cause_of_a_pull_failure_outlasts_the_back_off() -> None:
    waits = ("ErrImagePull", "manifest unknown")

    def script(step: str, index: int, earlier: int) -> PodScript:
        return PodScript(waits=waits)

    cluster = FakeCluster(script)
    cluster.create(JOB, "sae", uri_job())
    cluster.wait(5)
    waits = ("ImagePullBackOff", "Back-off pulling image")
    written = len(cluster.statuses)
    cluster.wait(60)
    assert "manifest unknown" in message_of(cluster, JOB, "sae", "ImagePullFailed")
    assert len(cluster.statuses) == written


def test_a_container_that_is_long_in_creation_hints_at_its_secrets() -> None:
    cluster = FakeCluster(only("train", PodScript(waits=("ContainerCreating", ""))))
    cluster.create(JOB, "sae", uri_job())
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Queued")
    cluster.wait(20)
    assert cluster.condition(JOB, "sae", "SecretMissing") is None
    cluster.wait(20)
    condition = cluster.condition(JOB, "sae", "SecretMissing")
    assert condition is not None
    assert condition["status"] == "Unknown"
    assert "(s3;" in condition["message"]


def test_a_job_without_any_pod_says_where_to_look() -> None:
    cluster = FakeCluster()
    cluster.create(CACHE, "acts", cache_spec())
    cluster.job_controller_away = True
    cluster.wait(40)
    condition = cluster.condition(CACHE, "acts", "PodNotStarting")
    assert condition is not None
    assert "kubectl describe job acts-00000001-prepare-1" in condition["message"]
    cluster.job_controller_away = False
    cluster.run()
    assert cluster.phase(CACHE, "acts") == "Ready"


def test_running_is_not_told_for_ever_when_a_jobs_end_is_not() -> None:
    cluster = FakeCluster()
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run_until(lambda: cluster.phase(CACHE, "acts") == "Caching")
    cluster.job_controller_away = True
    cluster.wait(20)
    assert cluster.phase(CACHE, "acts") == "Caching"
    cluster.wait(30)
    assert cluster.phase(CACHE, "acts") == "Queued"
    cluster.job_controller_away = False
    cluster.run()
    assert cluster.phase(CACHE, "acts") == "Ready"


def test_a_lost_message_ends_ready_with_metrics_unavailable_after_a_grace_period() -> None:
    cluster = FakeCluster(lose_messages=frozenset({"finalize"}))
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run_until(lambda: cluster.phase(CACHE, "acts") == "Finalizing")
    began = cluster.now
    cluster.run()
    assert cluster.phase(CACHE, "acts") == "Ready"
    assert "message was lost" in message_of(cluster, CACHE, "acts", "MetricsUnavailable")
    assert 30 <= (cluster.now - began).total_seconds() <= 45
    assert cluster.status(CACHE, "acts")["tokens"] == 500


def test_a_training_whose_message_is_lost_succeeds_too() -> None:
    cluster = FakeCluster(lose_messages=frozenset({"train"}))
    cluster.create(JOB, "sae", uri_job())
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert "results.json" in message_of(cluster, JOB, "sae", "MetricsUnavailable")


def test_a_cut_or_foreign_message_is_told_as_it_stands() -> None:
    cluster = FakeCluster(only("train", PodScript(exit_code=1, message='{"step": "train", "exitC')))
    cluster.create(JOB, "sae", uri_job(run={"backoffLimit": 0}))
    cluster.run()
    assert '{"step": "train", "exitC' in message_of(cluster, JOB, "sae", "Stalled")


def test_one_sae_of_two_that_failed_is_told_and_the_job_succeeds() -> None:
    saes = [
        {"name": "k16", "phase": "Succeeded", "explainedVariance": 0.7, "l0": 16.0},
        {"name": "k32", "phase": "Failed", "message": "the loss is NaN at step 7", "explainedVariance": 0.9},
    ]
    said = json.dumps({"step": "train", "exitCode": 0, "reason": "Completed", "saes": saes, "tokens": 1000})
    cluster = FakeCluster(only("train", PodScript(message=said)))
    cluster.create(JOB, "sae", uri_job())
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert cluster.status(JOB, "sae")["summary"]["sae"] == "k16"
    assert message_of(cluster, JOB, "sae", "SAEsFailed") == "1 of 2 SAEs failed: k32: the loss is NaN at step 7"


def test_a_job_deleted_by_hand_is_made_again_three_times() -> None:
    cluster = FakeCluster(only("train", PodScript(seconds=1000)))
    cluster.create(JOB, "sae", uri_job())
    for attempt in range(1, 5):
        suffix = f"train-{attempt}"
        cluster.run_until(lambda suffix=suffix: any(name.endswith(suffix) for name in cluster.jobs))
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        cluster.delete_job(next(name for name in cluster.jobs if name.endswith(suffix)))
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Failed"
    assert "deleted 4 times" in message_of(cluster, JOB, "sae", "Stalled")
    assert steps_of(cluster, JOB, "sae") == ["preflight-1", "train-1", "train-2", "train-3", "train-4"]


def test_a_job_that_the_api_server_refuses_is_not_one_that_somebody_deleted() -> None:
    cluster = FakeCluster(quota_used_up=True)
    cluster.create(CACHE, "acts", cache_spec())
    cluster.wait(60)
    assert cluster.phase(CACHE, "acts") == "Preparing"
    assert list(cluster.config_maps) == ["acts-00000001-prepare-1"]
    cluster.quota_used_up = False
    cluster.run()
    assert cluster.phase(CACHE, "acts") == "Ready"
    assert steps_of(cluster, CACHE, "acts") == ["prepare-1", "cache-1", "finalize-1"]


def test_a_finished_resource_never_runs_again_though_its_jobs_are_gone() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "sae", job_spec())
    cluster.run()
    made = list(cluster.created_jobs)
    cluster.jobs.clear()
    cluster.pods.clear()
    cluster.edit(JOB, "sae", run={"backoffLimit": 7}, retry=5, suspend=True)
    cluster.run()
    assert cluster.created_jobs == made
    assert cluster.phase(JOB, "sae") == "Succeeded"


def test_raising_retry_runs_a_failed_resource_again() -> None:
    fails = True

    def script(step: str, index: int, earlier: int) -> PodScript:
        return PodScript(exit_code=2 if step == "prepare" and fails else 0)

    cluster = FakeCluster(script)
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run()
    cluster.wait(30)
    assert cluster.phase(CACHE, "acts") == "Failed"
    assert steps_of(cluster, CACHE, "acts") == ["prepare-1"]
    fails = False
    cluster.edit(CACHE, "acts", retry=1)
    cluster.run()
    assert cluster.phase(CACHE, "acts") == "Ready"
    assert steps_of(cluster, CACHE, "acts") == ["prepare-1", "prepare-2", "cache-1", "finalize-1"]
    assert "attempts" not in cluster.status(CACHE, "acts")


def test_a_failed_inline_cache_fails_its_job_and_a_retried_owner_re_arms_it_with_its_run() -> None:
    fails = True

    def script(step: str, index: int, earlier: int) -> PodScript:
        bad = PodScript(exit_code=2, message=result("cache", 2, "NoSuchBucket", "spec.storage.uri: no such bucket"))
        return bad if step == "cache" and fails else PodScript(seconds=2)

    cluster = FakeCluster(script)
    cluster.create(JOB, "sae", job_spec())
    cluster.run()
    name = inline_cache_of(cluster)
    assert cluster.phase(JOB, "sae") == "Failed"
    assert (
        message_of(cluster, JOB, "sae", "Stalled") == f"ActivationCache {name} failed: spec.storage.uri: no such bucket"
    )
    assert cluster.resources[CACHE, name]["spec"]["retry"] == 0
    fails = False
    corrected = {"cache": cache_spec(run={"nodeSelector": {"disk": "fast"}})}
    cluster.edit(JOB, "sae", retry=1, activations=corrected)
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    spec = cluster.resources[CACHE, name]["spec"]
    assert (spec["retry"], spec["run"]["nodeSelector"]) == (1, {"disk": "fast"})


def test_a_new_owner_re_arms_a_failed_inline_cache_and_fails_if_it_fails_again() -> None:
    cluster = FakeCluster(only("prepare", PodScript(exit_code=2)))
    cluster.create(JOB, "first", job_spec())
    cluster.run()
    cluster.create(JOB, "second", job_spec(output={"uri": "s3://saes/second"}))
    cluster.run()
    cluster.wait(30)
    assert cluster.phase(JOB, "second") == "Failed"
    assert steps_of(cluster, CACHE, inline_cache_of(cluster)) == ["prepare-1", "prepare-2"]


def test_a_failed_cache_that_cache_ref_names_is_waited_for() -> None:
    fails = True

    def script(step: str, index: int, earlier: int) -> PodScript:
        return PodScript(exit_code=2, message="no text") if step == "prepare" and fails else PodScript(seconds=2)

    cluster = FakeCluster(script)
    cluster.create(CACHE, "acts", cache_spec())
    cluster.create(JOB, "sae", job_spec({"cacheRef": {"name": "acts"}}))
    cluster.wait(40)
    assert cluster.phase(JOB, "sae") == "WaitingForCache"
    ready = cluster.condition(JOB, "sae", "Ready")
    assert ready is not None
    assert ready["reason"] == "CacheFailed"
    assert "no text" in ready["message"]
    fails = False
    cluster.edit(CACHE, "acts", retry=1)
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"


def test_progress_that_cannot_be_reached_is_told_after_a_minute() -> None:
    cluster = FakeCluster(only("train", PodScript(seconds=100)))
    cluster.create(JOB, "sae", uri_job())
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
    (pod,) = [name for name in cluster.pods if "train" in name]
    cluster.unreachable[pod] = "connection timed out"
    cluster.wait(40)
    assert cluster.condition(JOB, "sae", "ProgressUnreachable") is None
    cluster.wait(30)
    assert "connection timed out" in message_of(cluster, JOB, "sae", "ProgressUnreachable")
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_an_index_that_fails_for_good_fails_the_cache_and_names_the_cause(limit: int) -> None:
    def script(step: str, index: int, earlier: int) -> PodScript:
        bad = step == "cache" and index == 1
        return PodScript(exit_code=1, message="device lost") if bad else PodScript(seconds=2)

    cluster = FakeCluster(script)
    cluster.create(CACHE, "acts", cache_spec(parallelism=4, run={"backoffLimit": limit}))
    cluster.run()
    assert cluster.phase(CACHE, "acts") == "Failed"
    assert "device lost" in message_of(cluster, CACHE, "acts", "Stalled")
    assert len(cluster.status(CACHE, "acts")["attempts"]) == limit + 1
    cluster.wait(3)
    assert not [pod for pod in cluster.pods.values() if pod["status"]["phase"] == "Running"]


def test_each_index_of_a_cache_may_fail_as_often_as_one_pod() -> None:
    def script(step: str, index: int, earlier: int) -> PodScript:
        fails = step == "cache" and earlier < 2
        return PodScript(seconds=index + 1, exit_code=1 if fails else 0)

    cluster = FakeCluster(script)
    cluster.create(CACHE, "acts", cache_spec(parallelism=4, run={"backoffLimit": 2}))
    cluster.run()
    assert cluster.phase(CACHE, "acts") == "Ready"
