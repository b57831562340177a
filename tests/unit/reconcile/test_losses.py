"""What goes away under a resource's feet: nodes, pods, Jobs and ConfigMaps, by accident or by somebody's hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.reconcile.fake_cluster import CACHE, JOB, FakeCluster, PodScript
from tests.unit.reconcile.specs import cache_spec
from tests.unit.reconcile.test_failures import message_of, only, uri_job
from tests.unit.reconcile.test_lives import steps_of


def training(script: Any = None, **run: Any) -> tuple[FakeCluster, str]:
    """A training that runs, and the name of its pod."""
    cluster = FakeCluster(script or only("train", PodScript(seconds=60)), only_when_due=True)
    cluster.create(JOB, "sae", uri_job(run=run))
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
    (pod,) = [name for name in cluster.pods if "train" in name]
    return cluster, pod


class TestANodeThatVanishes:
    def test_is_told_while_nobody_knows_of_its_pod_and_running_is_not(self) -> None:
        cluster, pod = training()
        cluster.node_away = True
        # What the node controller writes when a node's heartbeats cease.
        cluster.pods[pod]["status"]["conditions"] = [
            {"type": "ContainersReady", "status": "True"},
            {"type": "Ready", "status": "False"},
        ]
        cluster.wait(3)
        assert cluster.phase(JOB, "sae") == "Queued"
        assert f"of pod {pod} does not answer" in message_of(cluster, JOB, "sae", "NodeUnreachable")
        cluster.node_away = False
        cluster.wait(3)
        # It was the network alone.
        assert cluster.phase(JOB, "sae") == "Running"
        assert cluster.condition(JOB, "sae", "NodeUnreachable") is None
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_holds_the_next_attempt_up_until_its_pod_is_gone_and_says_so(self) -> None:
        cluster, pod = training()
        cluster.node_away = True
        cluster.pods[pod]["metadata"]["deletionTimestamp"] = cluster.now.strftime("%Y-%m-%dT%H:%M:%SZ")
        cluster.wait(5)
        assert cluster.phase(JOB, "sae") == "Queued"
        assert cluster.condition(JOB, "sae", "NodeUnreachable") is None
        cluster.wait(40)
        assert f"pod {pod} was told to end and is still there" in message_of(cluster, JOB, "sae", "NodeUnreachable")
        assert len([name for name in cluster.pods if "train" in name]) == 1
        # Somebody deletes the Node, and with it goes the pod.
        del cluster.pods[pod]
        cluster.node_away = False
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"

    def test_is_told_to_one_that_suspends(self) -> None:
        cluster, pod = training()
        cluster.node_away = True
        cluster.edit(JOB, "sae", suspend=True)
        cluster.wait(60)
        assert cluster.phase(JOB, "sae") == "Queued"
        assert pod in message_of(cluster, JOB, "sae", "NodeUnreachable")
        cluster.node_away = False
        cluster.wait(20)
        assert cluster.phase(JOB, "sae") == "Suspended"
        assert cluster.condition(JOB, "sae", "NodeUnreachable") is None

    def test_costs_no_retry_though_its_pod_is_replaced(self) -> None:
        evicted = PodScript(seconds=5, exit_code=137, disrupted=True)
        cluster, _ = training(only("train", evicted, evicted, PodScript()), backoffLimit=0)
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"
        assert [entry["reason"] for entry in cluster.status(JOB, "sae")["attempts"]] == ["Disrupted"] * 2
        assert steps_of(cluster, JOB, "sae") == ["preflight-1", "train-1"]


class TestWhatSomebodyDeletes:
    def test_a_pod_is_replaced_by_its_job(self) -> None:
        cluster, pod = training()
        del cluster.pods[pod]
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"
        assert steps_of(cluster, JOB, "sae") == ["preflight-1", "train-1"]
        assert "attempts" not in cluster.status(JOB, "sae")

    @pytest.mark.parametrize("kind", [CACHE, JOB])
    def test_a_config_map_that_a_pod_waits_for_is_made_again(self, kind: str) -> None:
        waits = PodScript(unschedulable="0/1 nodes are available")

        def script(step: str, index: int, earlier: int) -> PodScript:
            return waits if step in ("cache", "train") else PodScript(seconds=2)

        cluster = FakeCluster(script, only_when_due=True)
        cluster.create(kind, "it", cache_spec(parallelism=4) if kind == CACHE else uri_job())
        cluster.run_until(lambda: cluster.condition(kind, "it", "Unschedulable") is not None)
        name = cluster.status(kind, "it")["jobName"]
        before = cluster.config_maps.pop(name)
        cluster.wait(100)
        assert name not in cluster.config_maps
        # Other pods than those that were asked for would leave shards out.
        if kind == CACHE:
            cluster.edit(kind, "it", parallelism=2)
        waits = PodScript(seconds=2)
        cluster.run()
        assert cluster.phase(kind, "it") in ("Ready", "Succeeded")
        step = "cache" if kind == CACHE else "train"
        assert [job for job in steps_of(cluster, kind, "it") if step in job] == [f"{step}-1"]
        after = cluster.config_maps[name]
        if kind == CACHE:
            given = json.loads(after["data"]["step.json"])
            assert given["completions"] == 4
        else:
            assert after == before

    def test_a_config_map_that_is_there_is_asked_for_once_while_a_pod_is_slow(self) -> None:
        cluster = FakeCluster(only("prepare", PodScript(waits=("ContainerCreating", ""))), only_when_due=True)
        cluster.create(CACHE, "acts", cache_spec())
        asked = 0
        for _ in range(200):
            asked += len(cluster.wanted(CACHE, "acts").create)
            cluster.tick()
        # With its Job, and when it was slow for half a minute.
        assert asked == 2 + 1

    def test_jobs_and_pods_and_config_maps_of_finished_work_are_not_missed(self) -> None:
        cluster = FakeCluster(only_when_due=True)
        cluster.create(CACHE, "acts", cache_spec())
        cluster.run()
        calls, status = cluster.calls, cluster.status(CACHE, "acts")
        for children in (cluster.jobs, cluster.pods, cluster.config_maps):
            children.clear()
        cluster.wait(100)
        cluster.restart()
        cluster.wait(100)
        assert (cluster.calls, cluster.status(CACHE, "acts")) == (calls, status)


class TestLastWords:
    def test_an_attempt_keeps_how_a_log_ended(self) -> None:
        log = "\n".join([*(f"step {i} of 100 is done" for i in range(100)), "RuntimeError: the device is lost"])
        cluster = FakeCluster(only("train", PodScript(exit_code=1, message=log), PodScript()))
        cluster.create(JOB, "sae", uri_job())
        cluster.run()
        assert cluster.phase(JOB, "sae") == "Succeeded"
        (entry,) = cluster.status(JOB, "sae")["attempts"]
        assert entry["message"].startswith("pod sae-")
        assert entry["message"].endswith("RuntimeError: the device is lost")
        assert len(entry["message"]) == 300

    def test_a_failure_tells_them_too(self) -> None:
        log = "\n".join([*(f"step {i} of 100 is done" for i in range(100)), "RuntimeError: the device is lost"])
        cluster = FakeCluster(only("train", PodScript(exit_code=1, message=log)))
        cluster.create(JOB, "sae", uri_job(run={"backoffLimit": 1}))
        cluster.run()
        message = message_of(cluster, JOB, "sae", "Stalled")
        assert "RuntimeError: the device is lost (after 2 failed pods)" in message
        assert len(message) < 1200
