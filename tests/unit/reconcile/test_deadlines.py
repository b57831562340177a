"""Deadlines by a fake clock. The operator looks only when it asked to or something changed, and may start anew."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.unit.reconcile.fake_cluster import CACHE, JOB, FakeCluster, PodScript, Script
from tests.unit.reconcile.specs import cache_spec, job_spec
from tests.unit.reconcile.test_failures import only, uri_job
from tests.unit.reconcile.test_lives import steps_of


def at_work(script: Script, **run: Any) -> FakeCluster:
    """A cluster with one training job on a finished cache."""
    cluster = FakeCluster(script, only_when_due=True)
    cluster.create(JOB, "sae", uri_job(run=run))
    return cluster


def steps(**seconds: int) -> Script:
    """Each step takes so long; others two seconds."""
    return lambda step, index, earlier: PodScript(seconds=seconds.get(step, 2))


def ready(cluster: FakeCluster, kind: str = JOB, name: str = "sae") -> dict[str, Any]:
    condition = cluster.condition(kind, name, "Ready")
    assert condition is not None
    return condition


def started(cluster: FakeCluster, phase: str) -> datetime:
    """When the first status with the phase was written, by its active time."""
    status = next(status for _, status in cluster.statuses if status["phase"] == phase)
    return datetime.fromisoformat(status["activeSince"])


class TestActiveDeadline:
    def test_time_of_all_steps_and_retries_counts_together(self) -> None:
        crashes = PodScript(seconds=20, exit_code=1)

        def script(step: str, index: int, earlier: int) -> PodScript:
            return PodScript(seconds=10) if step == "preflight" else crashes

        cluster = at_work(script, activeDeadlineSeconds=55, backoffLimit=100)
        cluster.run()
        # Ten seconds of preflight, two runs of twenty, and the first five of a third.
        assert cluster.phase(JOB, "sae") == "Failed"
        assert ready(cluster)["reason"] == "DeadlineExceeded"
        assert "spec.run.activeDeadlineSeconds (55 s)" in ready(cluster)["message"]
        assert cluster.status(JOB, "sae")["activeSeconds"] == 55
        assert "activeSince" not in cluster.status(JOB, "sae")

    def test_the_look_is_asked_for_at_the_deadline_itself(self) -> None:
        cluster = at_work(steps(train=1000), activeDeadlineSeconds=100)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        since = datetime.fromisoformat(cluster.status(JOB, "sae")["activeSince"])
        before = cluster.status(JOB, "sae").get("activeSeconds", 0)
        due = since + timedelta(seconds=100 - before)
        cluster.now = due - timedelta(seconds=0.75)
        assert cluster.wanted(JOB, "sae").requeue_after == 0.75
        cluster.now = due
        wanted = cluster.wanted(JOB, "sae")
        assert wanted.status["phase"] == "Failed"
        assert wanted.delete_jobs == (cluster.status(JOB, "sae")["jobName"],)

    def test_its_pods_are_told_to_end_and_nothing_works_any_more(self) -> None:
        cluster = at_work(steps(train=1000), activeDeadlineSeconds=20)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        # The pod takes its time, to store a checkpoint.
        cluster.node_away = True
        cluster.wait(30)
        assert cluster.phase(JOB, "sae") == "Failed"
        (pod,) = [pod for name, pod in cluster.pods.items() if "train" in name]
        assert "deletionTimestamp" in pod["metadata"]
        cluster.node_away = False
        cluster.wait(3)
        assert not [name for name in (*cluster.jobs, *cluster.pods) if "train" in name]
        assert steps_of(cluster, JOB, "sae") == ["preflight-1", "train-1"]

    @pytest.mark.parametrize(
        "hindrance",
        [
            PodScript(unschedulable="0/1 nodes are available: 1 Insufficient nvidia.com/gpu."),
            PodScript(waits=("ImagePullBackOff", "Back-off pulling image")),
            PodScript(waits=("ContainerCreating", "")),
        ],
        ids=["no node", "no image", "being created"],
    )
    def test_time_before_a_container_runs_does_not_count(self, hindrance: PodScript) -> None:
        healed = False

        def script(step: str, index: int, earlier: int) -> PodScript:
            return hindrance if step == "train" and not healed else PodScript(seconds=30)

        cluster = at_work(script, activeDeadlineSeconds=65)
        cluster.run_until(lambda: any("train" in name for name in cluster.pods))
        cluster.wait(500)
        assert cluster.phase(JOB, "sae") == "Queued"
        healed = True
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"
        assert cluster.status(JOB, "sae")["activeSeconds"] == 60

    def test_time_in_a_queue_does_not_count(self) -> None:
        cluster = at_work(steps(train=30), activeDeadlineSeconds=40)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        cluster.wait(10)
        (job,) = [name for name in cluster.jobs if "train" in name]
        # Pre-empted: the queue suspends the Job, whose pods end.
        cluster.jobs[job]["spec"]["suspend"] = True
        cluster.jobs[job]["status"]["active"] = 0
        for name in [name for name in cluster.pods if name.startswith(job)]:
            del cluster.pods[name]
        cluster.wait(500)
        assert ready(cluster)["message"].endswith("is held by a queue")
        worked = cluster.status(JOB, "sae")["activeSeconds"]
        assert 10 <= worked <= 14
        cluster.jobs[job]["spec"]["suspend"] = False
        resumed = cluster.now
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Failed")
        assert (cluster.now - resumed).total_seconds() == pytest.approx(40 - worked, abs=3)

    def test_suspended_time_does_not_count(self) -> None:
        cluster = at_work(steps(train=30), activeDeadlineSeconds=45)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        cluster.wait(5)
        cluster.edit(JOB, "sae", suspend=True)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Suspended")
        cluster.wait(500)
        assert "activeSince" not in cluster.status(JOB, "sae")
        cluster.edit(JOB, "sae", suspend=False)
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"
        # Preflight, the first five seconds, and a whole run.
        assert 37 <= cluster.status(JOB, "sae")["activeSeconds"] <= 40

    @pytest.mark.parametrize("every", [1, 7, 33])
    def test_it_survives_any_number_of_restarts_of_the_operator(self, every: int) -> None:
        cluster = at_work(steps(train=1000), activeDeadlineSeconds=100)
        for second in range(200):
            if second % every == 0:
                cluster.restart()
            cluster.tick()
        assert cluster.phase(JOB, "sae") == "Failed"
        ended = datetime.fromisoformat(cluster.status(JOB, "sae")["completionTime"])
        # Two seconds were preflight's, which an operator that starts anew every second may never see running.
        assert 97 <= (ended - started(cluster, "Running")).total_seconds() <= 101

    def test_what_is_overdue_is_found_by_an_operator_that_was_away(self) -> None:
        cluster = at_work(steps(train=1000), activeDeadlineSeconds=100)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        cluster.operator_away = True
        cluster.wait(500)
        cluster.operator_away = False
        cluster.restart()
        cluster.wait(3)
        assert ready(cluster)["reason"] == "DeadlineExceeded"

    def test_a_pod_that_ended_while_the_operator_was_away_counts_to_its_end(self) -> None:
        def script(step: str, index: int, earlier: int) -> PodScript:
            if step != "train":
                return PodScript(seconds=2)
            return PodScript(seconds=20, exit_code=0 if earlier else 1)

        cluster = at_work(script, activeDeadlineSeconds=60)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        cluster.operator_away = cluster.job_controller_away = True
        cluster.wait(500)
        cluster.operator_away = cluster.job_controller_away = False
        cluster.restart()
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"
        assert 40 <= cluster.status(JOB, "sae")["activeSeconds"] <= 42

    def test_a_wait_between_two_pods_while_the_operator_was_away_does_not_count(self) -> None:
        waits = True

        def script(step: str, index: int, earlier: int) -> PodScript:
            if step != "train":
                return PodScript(seconds=2)
            if not earlier:
                return PodScript(seconds=20, exit_code=1)
            return PodScript(unschedulable="0/1 nodes are available") if waits else PodScript(seconds=40)

        cluster = at_work(script, activeDeadlineSeconds=80)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        cluster.operator_away = True
        cluster.wait(500)
        waits = False
        cluster.wait(20)
        cluster.operator_away = False
        cluster.restart()
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_a_node_that_is_silent_for_a_while_counts_once(self) -> None:
        cluster = at_work(steps(train=60), activeDeadlineSeconds=100)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        (pod,) = [pod for name, pod in cluster.pods.items() if "train" in name]
        cluster.wait(10)
        cluster.node_away = True
        pod["status"]["conditions"] = [
            {"type": "ContainersReady", "status": "True"},
            {"type": "Ready", "status": "False"},
        ]
        cluster.wait(20)
        assert cluster.phase(JOB, "sae") == "Queued"
        cluster.node_away = False
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"
        # Preflight's, and sixty that the pod ran before and after the twenty.
        assert 80 <= cluster.status(JOB, "sae")["activeSeconds"] <= 84

    def test_a_training_that_ends_well_is_not_thrown_away_for_a_second(self) -> None:
        cluster = at_work(steps(preflight=10, train=15), activeDeadlineSeconds=20)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        # Too late for a deadline: it has ended before anybody looks.
        cluster.operator_away = True
        cluster.wait(30)
        cluster.operator_away = False
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_no_step_begins_when_the_time_is_used_up(self) -> None:
        cluster = FakeCluster(steps(preflight=20), only_when_due=True)
        cluster.create(JOB, "sae", job_spec({"cacheRef": {"name": "acts"}}, run={"activeDeadlineSeconds": 20}))
        cluster.create(CACHE, "acts", cache_spec())
        cluster.run()
        assert ready(cluster)["reason"] == "DeadlineExceeded"
        assert steps_of(cluster, JOB, "sae") == ["preflight-1"]

    def test_raising_retry_begins_anew(self) -> None:
        cluster = at_work(steps(train=50), activeDeadlineSeconds=30)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Failed")
        cluster.edit(JOB, "sae", retry=1)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        assert cluster.status(JOB, "sae").get("activeSeconds", 0) <= 2
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Failed")
        cluster.edit(JOB, "sae", retry=2, run={"activeDeadlineSeconds": 60})
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_it_may_be_raised_while_pods_work(self) -> None:
        cluster = at_work(steps(train=50), activeDeadlineSeconds=30)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        cluster.edit(JOB, "sae", run={"activeDeadlineSeconds": 100})
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_one_set_late_counts_from_the_start_of_the_pod_that_runs(self) -> None:
        cluster = at_work(steps(train=100))
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        cluster.wait(30)
        cluster.edit(JOB, "sae", run={"activeDeadlineSeconds": 25})
        cluster.wait(2)
        assert ready(cluster)["reason"] == "DeadlineExceeded"

    def test_a_clock_that_jumps_back_ends_nothing(self) -> None:
        cluster = at_work(steps(train=30), activeDeadlineSeconds=40)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        cluster.now -= timedelta(hours=1)
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_each_of_a_cache_and_its_job_has_its_own(self) -> None:
        cluster = FakeCluster(steps(cache=50), only_when_due=True)
        slow = cache_spec(run={"activeDeadlineSeconds": 30})
        cluster.create(JOB, "sae", job_spec({"cache": slow}, run={"activeDeadlineSeconds": 20}))
        cluster.run()
        # The job waits for the cache longer than it may work itself; it fails since the cache does.
        assert ready(cluster)["reason"] == "CacheFailed"
        assert "spec.activations.cache.run.activeDeadlineSeconds (30 s)" in ready(cluster)["message"]

    def test_without_one_no_status_is_written_for_the_time_alone(self) -> None:
        plain, limited = at_work(steps(preflight=20)), at_work(steps(preflight=20), activeDeadlineSeconds=1000)
        for cluster in (plain, limited):
            cluster.run()
        assert len(plain.statuses) == 4
        assert len(limited.statuses) == 5
        # What the GPU's pods have worked is told all the same.
        assert 1 <= plain.status(JOB, "sae")["activeSeconds"] <= 3


class TestStartupDeadline:
    @pytest.mark.parametrize(
        ("pod", "reason", "words"),
        [
            (
                PodScript(waits=("ErrImagePull", "manifest unknown")),
                "ImagePullFailed",
                ["manifest unknown", "spec.run.image"],
            ),
            (
                PodScript(waits=("CreateContainerConfigError", 'secret "s3" not found')),
                "SecretMissing",
                ['secret "s3" not found'],
            ),
            (PodScript(waits=("RunContainerError", "no such command")), "PodNotStarting", ["no such command"]),
            (PodScript(waits=("ContainerCreating", "")), "PodNotStarting", ["kubectl describe pod"]),
        ],
        ids=["image", "secret", "command", "volume"],
    )
    def test_a_pod_that_does_not_start_fails_with_what_ails_it(
        self, pod: PodScript, reason: str, words: list[str]
    ) -> None:
        cluster = at_work(only("train", pod), startupDeadlineSeconds=300)
        cluster.run_until(lambda: any("train" in name for name in cluster.pods))
        cluster.wait(2)
        (waiting,) = [found for name, found in cluster.pods.items() if "train" in name]
        due = datetime.fromisoformat(waiting["status"]["startTime"]) + timedelta(seconds=300)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Failed", 400)
        assert datetime.fromisoformat(cluster.status(JOB, "sae")["completionTime"]) == due
        assert ready(cluster)["reason"] == reason
        message = ready(cluster)["message"]
        assert "not started within spec.run.startupDeadlineSeconds (300 s)" in message
        assert all(word in message for word in words), message
        cluster.wait(3)
        assert not [name for name in cluster.jobs if "train" in name]

    def test_the_look_is_asked_for_at_the_deadline_itself(self) -> None:
        cluster = at_work(only("train", PodScript(waits=("ErrImagePull", "no"))), startupDeadlineSeconds=300)
        cluster.run_until(lambda: cluster.condition(JOB, "sae", "ImagePullFailed") is not None)
        (pod,) = [found for name, found in cluster.pods.items() if "train" in name]
        cluster.now = datetime.fromisoformat(pod["status"]["startTime"]) + timedelta(seconds=299.5)
        assert cluster.wanted(JOB, "sae").requeue_after == 0.5

    def test_it_is_an_hour_unless_something_else_is_said(self) -> None:
        cluster = at_work(only("train", PodScript(waits=("ErrImagePull", "no"))))
        cluster.run_until(lambda: cluster.condition(JOB, "sae", "ImagePullFailed") is not None)
        began = cluster.now
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Failed", 4000)
        assert 3590 <= (cluster.now - began).total_seconds() <= 3601

    def test_time_without_a_node_never_counts(self) -> None:
        hindrance: PodScript = PodScript(unschedulable="0/1 nodes are available")

        def script(step: str, index: int, earlier: int) -> PodScript:
            return hindrance if step == "train" else PodScript(seconds=2)

        cluster = at_work(script, startupDeadlineSeconds=60)
        cluster.run_until(lambda: any("train" in name for name in cluster.pods))
        cluster.wait(1000)
        assert cluster.phase(JOB, "sae") == "Queued"
        assert ready(cluster)["reason"] == "Unschedulable"
        hindrance = PodScript(seconds=2)
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_time_in_a_queue_never_counts(self) -> None:
        cluster = at_work(steps(), startupDeadlineSeconds=60)
        cluster.job_controller_away = True
        cluster.wait(1000)
        assert cluster.phase(JOB, "sae") == "Preflight"
        cluster.job_controller_away = False
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_it_survives_restarts(self) -> None:
        cluster = at_work(only("train", PodScript(waits=("ErrImagePull", "no"))), startupDeadlineSeconds=100)
        cluster.run_until(lambda: cluster.condition(JOB, "sae", "ImagePullFailed") is not None)
        for _ in range(90):
            cluster.restart()
            cluster.tick()
        assert cluster.phase(JOB, "sae") == "Queued"
        cluster.operator_away = True
        cluster.wait(60)
        cluster.operator_away = False
        cluster.restart()
        cluster.wait(3)
        assert ready(cluster)["reason"] == "ImagePullFailed"

    def test_each_pod_has_its_own_time(self) -> None:
        slow = [PodScript(waits=("ErrImagePull", "no"))]

        def script(step: str, index: int, earlier: int) -> PodScript:
            if step != "train":
                return PodScript(seconds=2)
            return slow[0] if slow else PodScript(seconds=2, exit_code=0 if earlier == 2 else 1)

        cluster = at_work(script, startupDeadlineSeconds=60)
        for pods in (1, 2, 3):
            cluster.run_until(lambda pods=pods: len([name for name in cluster.pods if "train" in name]) == pods)
            slow[:] = [PodScript(waits=("ErrImagePull", "no"))]
            cluster.wait(50)
            slow.clear()
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_one_of_several_pods_that_does_not_start_fails_the_whole(self) -> None:
        def script(step: str, index: int, earlier: int) -> PodScript:
            stuck = step == "cache" and index == 1
            return PodScript(waits=("ErrImagePull", "no such image")) if stuck else PodScript(seconds=500)

        cluster = FakeCluster(script, only_when_due=True)
        cluster.create(CACHE, "acts", cache_spec(run={"startupDeadlineSeconds": 100}))
        cluster.run_until(lambda: cluster.phase(CACHE, "acts") == "Failed", 1000)
        assert "no such image" in ready(cluster, CACHE, "acts")["message"]

    def test_a_pod_that_runs_is_not_bound_by_it(self) -> None:
        cluster = at_work(steps(train=150), startupDeadlineSeconds=10)
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"


def leftovers(cluster: FakeCluster) -> list[str]:
    """Names of all that a resource's work has left."""
    return [*cluster.jobs, *cluster.pods, *cluster.config_maps, *cluster.services]


class TestTtlAfterFinished:
    def finished(self, script: Script | None = None, **changes: Any) -> FakeCluster:
        """A finished job in three pods, which may be cleaned up 100 s later."""
        cluster = FakeCluster(script or steps(), only_when_due=True)
        run = {"ttlSecondsAfterFinished": 100} | changes.pop("run", {})
        cluster.create(JOB, "sae", uri_job(run=run, parallelism=3, **changes))
        cluster.run_until(lambda: cluster.phase(JOB, "sae") in ("Succeeded", "Failed"))
        return cluster

    def test_all_that_is_left_of_the_work_goes_at_its_time_and_the_resource_stays(self) -> None:
        cluster = self.finished()
        before = cluster.status(JOB, "sae")
        cluster.wait(98)
        assert len(cluster.jobs) == len(cluster.config_maps) == 2
        assert len(cluster.services) == 1
        cluster.wait(5)
        assert not leftovers(cluster)
        after = cluster.status(JOB, "sae")
        # Of the Job, which is gone, nothing more is told.
        assert after == {key: value for key, value in before.items() if key not in ("jobName", "attempt")}

    def test_the_look_is_asked_for_at_the_time_itself(self) -> None:
        cluster = self.finished()
        cluster.now = datetime.fromisoformat(cluster.status(JOB, "sae")["completionTime"]) + timedelta(seconds=99.5)
        wanted = cluster.wanted(JOB, "sae")
        assert (wanted.requeue_after, wanted.delete_jobs, wanted.delete_objects) == (0.5, (), ())

    def test_afterwards_nobody_looks_and_nothing_is_written(self) -> None:
        cluster = self.finished()
        cluster.wait(110)
        calls, looks = cluster.calls, cluster.looks
        cluster.wait(1000)
        assert (cluster.calls, cluster.looks) == (calls, looks)
        cluster.restart()
        cluster.wait(100)
        assert (cluster.calls, cluster.looks) == (calls, looks + 1)
        wanted = cluster.wanted(JOB, "sae")
        assert (wanted.requeue_after, wanted.poll_pods) == (None, False)

    def test_an_operator_that_was_away_cleans_up_when_it_is_back(self) -> None:
        cluster = self.finished()
        cluster.operator_away = True
        cluster.wait(1000)
        cluster.operator_away = False
        cluster.restart()
        cluster.wait(5)
        assert not leftovers(cluster)
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_nothing_is_deleted_twice_while_pods_take_long_to_go(self) -> None:
        cluster = self.finished()
        cluster.node_away = True
        cluster.wait(110)
        assert all("deletionTimestamp" in job["metadata"] for job in cluster.jobs.values())
        calls = cluster.calls
        cluster.wait(200)
        assert cluster.calls == calls
        cluster.node_away = False
        cluster.wait(5)
        assert not leftovers(cluster)

    def test_zero_is_at_once(self) -> None:
        cluster = self.finished(run={"ttlSecondsAfterFinished": 0})
        cluster.wait(5)
        assert not leftovers(cluster)

    def test_an_end_that_somebody_has_put_far_off_is_waited_for(self) -> None:
        cluster = self.finished()
        cluster.status(JOB, "sae")["completionTime"] = "9999-12-31T23:59:59Z"
        left = cluster.wanted(JOB, "sae").requeue_after
        assert left is not None
        assert left > 1e11

    def test_everything_stays_where_no_time_is_set(self) -> None:
        cluster = FakeCluster(only_when_due=True)
        cluster.create(JOB, "sae", uri_job())
        cluster.run()
        assert cluster.wanted(JOB, "sae").requeue_after is None
        cluster.wait(10_000)
        assert len(cluster.jobs) == len(cluster.config_maps) == 2

    def test_a_time_that_is_set_later_counts_from_the_end(self) -> None:
        cluster = FakeCluster(only_when_due=True)
        cluster.create(CACHE, "acts", cache_spec())
        cluster.run()
        cluster.wait(500)
        cluster.edit(CACHE, "acts", run={"ttlSecondsAfterFinished": 100})
        cluster.wait(5)
        assert not leftovers(cluster)
        assert cluster.phase(CACHE, "acts") == "Ready"

    def test_what_a_failure_or_a_user_has_left_goes_too(self) -> None:
        stuck = only("preflight", PodScript(waits=("ErrImagePull", "no")))
        cluster = self.finished(stuck, run={"startupDeadlineSeconds": 20})
        cluster.wait(5)
        # The failure itself has ended the only Job; its ConfigMap is there still.
        assert not cluster.jobs
        assert len(cluster.config_maps) == 1
        cluster.wait(110)
        assert not cluster.config_maps
        cluster = self.finished()
        cluster.jobs.clear()
        cluster.pods.clear()
        cluster.wait(110)
        assert not leftovers(cluster)

    def test_config_maps_of_earlier_attempts_go_too(self) -> None:
        cluster = FakeCluster(steps(train=10), only_when_due=True)
        cluster.create(JOB, "sae", uri_job(run={"ttlSecondsAfterFinished": 100}))
        for _ in range(3):
            cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
            cluster.edit(JOB, "sae", suspend=True)
            cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Suspended")
            cluster.edit(JOB, "sae", suspend=False)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Succeeded")
        assert len(cluster.config_maps) == 5
        cluster.wait(110)
        assert not cluster.config_maps

    def test_terminal_stays_terminal(self) -> None:
        cluster = self.finished()
        cluster.wait(110)
        made = list(cluster.created_jobs)
        cluster.edit(JOB, "sae", retry=5, run={"backoffLimit": 1})
        cluster.restart()
        cluster.wait(50)
        assert cluster.created_jobs == made
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_a_failed_resource_runs_again_when_retry_is_raised_afterwards(self) -> None:
        fails = True

        def script(step: str, index: int, earlier: int) -> PodScript:
            return PodScript(exit_code=2 if step == "train" and fails else 0)

        cluster = self.finished(script)
        assert cluster.phase(JOB, "sae") == "Failed"
        cluster.wait(110)
        assert not cluster.jobs
        fails = False
        cluster.edit(JOB, "sae", retry=1)
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_raised_tokens_go_on_afterwards(self) -> None:
        cluster = self.finished()
        cluster.wait(110)
        cluster.edit(JOB, "sae", training={"tokens": 3000})
        cluster.run()
        assert cluster.status(JOB, "sae")["progress"]["tokens"] == 3000
        cluster.wait(110)
        assert not leftovers(cluster)

    def test_a_finished_cache_that_is_cleaned_up_serves_its_jobs(self) -> None:
        cluster = FakeCluster(only_when_due=True)
        shared = {"cache": cache_spec(run={"ttlSecondsAfterFinished": 10})}
        cluster.create(JOB, "first", job_spec(shared))
        cluster.run_until(lambda: cluster.phase(JOB, "first") == "Succeeded")
        cluster.wait(30)
        assert not [job for job in cluster.jobs if job.startswith("cache-")]
        cluster.create(JOB, "second", job_spec(shared, output={"uri": "s3://saes/second"}))
        cluster.run()
        assert cluster.phase(JOB, "second") == "Succeeded"
