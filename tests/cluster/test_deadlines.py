"""Deadlines, clean-up and deletions by hand on a real API server, in seconds.

What each deadline counts is specified by a fake clock, in tests/unit/reconcile/test_deadlines.py.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sae_operator.controller.faults import ENV_EXIT_AT_CALL
from tests.cluster.test_operator_life import except_for
from tests.fake_kubelet import PLACEMENT, Ends, FakeKubelet, Runs, Waits, result, step_of, succeed
from tests.operator_process import OperatorProcess, run_operator, start_operator
from tests.operator_world import World, cache_spec, conditions, training_spec
from tests.testbed.waiting import wait_for

pytestmark = pytest.mark.timeout(300)

ON_A_URI = {"uri": "s3://bucket/finished"}


def job(**run: Any) -> dict[str, Any]:
    """A training job on a finished cache."""
    return training_spec(ON_A_URI, run={**PLACEMENT, **run})


def time_of(text: str) -> datetime:
    return datetime.fromisoformat(text)


def leftovers(world: World) -> list[str]:
    """Kind and name of all children."""
    kinds = ("Job", "Pod", "ConfigMap", "Service")
    return [f"{kind} {found['metadata']['name']}" for kind in kinds for found in world.list(kind, ours=True)]


class TestActiveDeadline:
    def test_it_ends_a_job_whose_pod_still_gets_to_store_a_checkpoint(
        self, world: World, operator: OperatorProcess, kubelet: FakeKubelet
    ) -> None:
        kubelet.scripts[world.namespace] = except_for(train=Runs(checkpoint_tokens=500, lingers=True))
        # Long enough for Running to be told before, however busy the machine is.
        world.create("SAETrainingJob", "first", job(activeDeadlineSeconds=8))
        since = world.wait_phase("SAETrainingJob", "first", "Running")["status"]["activeSince"]
        found = world.wait_phase("SAETrainingJob", "first", "Failed")
        assert conditions(found)["Ready"]["reason"] == "DeadlineExceeded"
        # Never before it is due; how much later, says how busy the machine is.
        assert 8 <= found["status"]["activeSeconds"] <= 24
        took = time_of(found["status"]["completionTime"]) - time_of(since)
        assert timedelta(seconds=6) <= took <= timedelta(seconds=24)
        (pod,) = [pod for pod in world.list("Pod", ours=True) if step_of(pod) == "train"]
        wait_for(lambda: pod_is_ending(world, pod["metadata"]["name"]), what="the pod has been told to end")
        kubelet.scripts[world.namespace] = succeed
        wait_for(lambda: not [name for name in world.jobs() if "train" in name], what="the Job is gone")
        world.patch("SAETrainingJob", "first", {"spec": {"retry": 1}})
        again = world.wait_phase("SAETrainingJob", "first", "Succeeded")
        assert again["status"].get("activeSeconds", 0) < 8

    def test_it_goes_on_while_the_operator_is_away(self, world: World, kubelet: FakeKubelet) -> None:
        kubelet.scripts[world.namespace] = except_for(train=Runs())
        first = start_operator(world.control_plane.kubeconfig, namespace=world.namespace)
        world.create("SAETrainingJob", "first", job(activeDeadlineSeconds=8))
        since = time_of(world.wait_phase("SAETrainingJob", "first", "Running")["status"]["activeSince"])
        first.kill()
        wait_for(lambda: datetime.now(UTC) > since + timedelta(seconds=9), what="the deadline has passed")
        with run_operator(world.control_plane.kubeconfig, namespace=world.namespace):
            found = world.wait_phase("SAETrainingJob", "first", "Failed")
        assert conditions(found)["Ready"]["reason"] == "DeadlineExceeded"
        assert len(world.jobs()) <= 2


def pod_is_ending(world: World, name: str) -> bool:
    pod = world.get("Pod", name)
    return pod is not None and "deletionTimestamp" in pod["metadata"]


class TestBeforeAPodStarts:
    def test_time_without_a_node_is_told_within_half_a_minute_and_ends_nothing(
        self, world: World, operator: OperatorProcess
    ) -> None:
        nowhere = {"cpuSteps": {"nodeSelector": {"no": "such"}}}
        created = world.create(
            "SAETrainingJob", "first", job(activeDeadlineSeconds=1, startupDeadlineSeconds=1, **nowhere)
        )
        told = world.wait_condition("SAETrainingJob", "first", "Unschedulable")
        delay = time_of(told["lastTransitionTime"]) - time_of(created["metadata"]["creationTimestamp"])
        assert delay <= timedelta(seconds=30)
        wait_for(
            lambda: datetime.now(UTC) > time_of(told["lastTransitionTime"]) + timedelta(seconds=8),
            what="both deadlines would have passed",
        )
        status = world.status("SAETrainingJob", "first")
        assert status["phase"] == "Preflight"
        assert "activeSince" not in status
        # Where it fits, it runs.
        world.patch("SAETrainingJob", "first", {"spec": {"suspend": True}})
        world.wait_phase("SAETrainingJob", "first", "Suspended")
        fits = {"suspend": False, "run": {"cpuSteps": {"nodeSelector": {"no": None, "fake-kubelet": "true"}}}}
        fits["run"] |= {"activeDeadlineSeconds": 60, "startupDeadlineSeconds": 60}
        fits["run"]["cpuSteps"]["tolerations"] = PLACEMENT["cpuSteps"]["tolerations"]
        world.patch("SAETrainingJob", "first", {"spec": fits})
        world.wait_phase("SAETrainingJob", "first", "Succeeded")

    def test_an_image_that_cannot_be_pulled_is_told_at_once_and_fails_at_the_deadline(
        self, world: World, operator: OperatorProcess, kubelet: FakeKubelet
    ) -> None:
        kubelet.scripts[world.namespace] = except_for(train=Waits("ErrImagePull", "manifest unknown"))
        world.create("SAETrainingJob", "first", job(startupDeadlineSeconds=12))
        told = world.wait_condition("SAETrainingJob", "first", "ImagePullFailed")
        (pod,) = [pod for pod in world.list("Pod", ours=True) if step_of(pod) == "train"]
        start = time_of(pod["status"]["startTime"])
        assert time_of(told["lastTransitionTime"]) - start <= timedelta(seconds=8)
        found = world.wait_phase("SAETrainingJob", "first", "Failed")
        ended = time_of(found["status"]["completionTime"])
        # Never before it is due; how much later, says how busy the machine is.
        assert timedelta(seconds=12) <= ended - start <= timedelta(seconds=24)
        ready = conditions(found)["Ready"]
        assert ready["reason"] == "ImagePullFailed"
        assert "manifest unknown" in ready["message"]
        assert "spec.run.startupDeadlineSeconds (12 s)" in ready["message"]
        kubelet.scripts[world.namespace] = succeed
        world.patch("SAETrainingJob", "first", {"spec": {"retry": 1}})
        world.wait_phase("SAETrainingJob", "first", "Succeeded")


class TestTtlAfterFinished:
    def test_jobs_pods_config_maps_and_service_go_and_the_resource_stays(self, world: World) -> None:
        with run_operator(world.control_plane.kubeconfig, namespace=world.namespace):
            # Long enough for all to be seen before.
            spec = training_spec(ON_A_URI, run={**PLACEMENT, "ttlSecondsAfterFinished": 10}, parallelism=2)
            world.create("SAETrainingJob", "first", {**spec, "training": {"tokens": 900}})
            ended = time_of(world.wait_phase("SAETrainingJob", "first", "Succeeded")["status"]["completionTime"])
            assert {name.split()[0] for name in leftovers(world)} == {"Job", "Pod", "ConfigMap", "Service"}
            wait_for(lambda: not leftovers(world), what=lambda: f"all is gone; there are {leftovers(world)}")
            assert datetime.now(UTC) >= ended + timedelta(seconds=10)
            world.wait_resource("SAETrainingJob", "first", lambda found: "jobName" not in found["status"])
            more = {"training": {"tokens": 1800}, "run": {"ttlSecondsAfterFinished": 3}}
            world.patch("SAETrainingJob", "first", {"spec": more})
            world.wait_resource("SAETrainingJob", "first", lambda found: found["status"]["observedTokens"] == 1800)
            world.wait_phase("SAETrainingJob", "first", "Succeeded")
            wait_for(lambda: not leftovers(world), what=lambda: f"all is gone; there are {leftovers(world)}")
            rest = world.wait_resource("SAETrainingJob", "first", lambda found: "jobName" not in found["status"])
        telling = {ENV_EXIT_AT_CALL: "never"}
        with run_operator(world.control_plane.kubeconfig, namespace=world.namespace, environment=telling) as again:
            wait_for(lambda: "sae-operator-defaults" in again.tail(), what="it looks at everything")
        # Told to end, it finishes what it has begun: these are all of its calls.
        kinds = {call.kind for call in again.calls}
        assert {kind for kind in kinds if not kind.startswith("GET ")} <= {"PATCH leases"}
        after = world.get("SAETrainingJob", "first")
        assert after is not None
        assert after["metadata"]["resourceVersion"] == rest["metadata"]["resourceVersion"]
        assert after["status"]["phase"] == "Succeeded"

    def test_an_operator_that_was_away_at_that_time_does_it_when_it_is_back(
        self, world: World, kubelet: FakeKubelet
    ) -> None:
        wrong = result("train", exitCode=2, reason="ShardCorrupt", message="shard 3 is corrupt")
        kubelet.scripts[world.namespace] = except_for(train=Ends(2, wrong))
        with run_operator(world.control_plane.kubeconfig, namespace=world.namespace):
            # Long enough for this operator to end before.
            world.create("SAETrainingJob", "first", job(ttlSecondsAfterFinished=10))
            ended = time_of(world.wait_phase("SAETrainingJob", "first", "Failed")["status"]["completionTime"])
        assert leftovers(world)
        wait_for(lambda: datetime.now(UTC) > ended + timedelta(seconds=11), what="the time has passed")
        with run_operator(world.control_plane.kubeconfig, namespace=world.namespace):
            wait_for(lambda: not leftovers(world), what=lambda: f"all is gone; there are {leftovers(world)}")
            found = world.get("SAETrainingJob", "first")
            assert found is not None
            assert conditions(found)["Ready"]["reason"] == "ShardCorrupt"
            kubelet.scripts[world.namespace] = succeed
            world.patch("SAETrainingJob", "first", {"spec": {"retry": 1}})
            world.wait_phase("SAETrainingJob", "first", "Succeeded")


class TestWhatSomebodyDeletes:
    def test_a_pod_is_replaced_by_its_job(self, world: World, operator: OperatorProcess, kubelet: FakeKubelet) -> None:
        kubelet.scripts[world.namespace] = except_for(train=Runs())
        world.create("SAETrainingJob", "first", job())
        world.wait_phase("SAETrainingJob", "first", "Running")
        (pod,) = [pod for pod in world.list("Pod", ours=True) if step_of(pod) == "train"]
        world.delete("Pod", pod["metadata"]["name"])

        def replaced() -> bool:
            pods = [found for found in world.list("Pod", ours=True) if step_of(found) == "train"]
            others = [found for found in pods if found["metadata"]["uid"] != pod["metadata"]["uid"]]
            return any(found["status"]["phase"] == "Running" for found in others)

        wait_for(replaced, what="another pod runs")
        kubelet.scripts[world.namespace] = succeed
        found = world.wait_phase("SAETrainingJob", "first", "Succeeded")
        assert found["status"]["attempt"] == 1

    def test_a_job_is_made_again(self, world: World, operator: OperatorProcess, kubelet: FakeKubelet) -> None:
        kubelet.scripts[world.namespace] = except_for(train=Runs())
        world.create("SAETrainingJob", "first", job())
        name = world.wait_phase("SAETrainingJob", "first", "Running")["status"]["jobName"]
        world.delete("Job", name)
        world.wait_resource("SAETrainingJob", "first", lambda found: found["status"]["attempt"] == 2)
        kubelet.scripts[world.namespace] = succeed
        found = world.wait_phase("SAETrainingJob", "first", "Succeeded")
        assert [entry["reason"] for entry in found["status"]["attempts"]].count("JobDeleted") == 1

    def test_a_config_map_that_a_pod_waits_for_is_made_again(
        self, world: World, operator: OperatorProcess, kubelet: FakeKubelet
    ) -> None:
        # A kubelet that cannot mount it tells no more than this.
        kubelet.scripts[world.namespace] = except_for(preflight=Waits("ContainerCreating", ""))
        world.create("SAETrainingJob", "first", job())
        wait_for(lambda: world.list("Pod", ours=True), what="a pod")
        (before,) = world.list("ConfigMap", ours=True)
        world.delete("ConfigMap", before["metadata"]["name"])
        wait_for(lambda: world.list("ConfigMap", ours=True), what="the ConfigMap is there again")
        (after,) = world.list("ConfigMap", ours=True)
        assert after["metadata"]["uid"] != before["metadata"]["uid"]
        assert (after["metadata"]["name"], after["data"]) == (before["metadata"]["name"], before["data"])
        kubelet.scripts[world.namespace] = succeed
        world.wait_phase("SAETrainingJob", "first", "Succeeded")
        assert world.steps() == ["preflight-1", "train-1"]

    def test_the_first_owner_of_a_cache_leaves_it_to_the_others(
        self, world: World, operator: OperatorProcess, kubelet: FakeKubelet
    ) -> None:
        kubelet.scripts[world.namespace] = except_for(cache=Runs())
        for name in ("first", "second"):
            world.create("SAETrainingJob", name, training_spec(output={"uri": f"s3://bucket/{name}"}))
        for name in ("first", "second"):
            found = world.wait_phase("SAETrainingJob", name, "WaitingForCache")
        cache = found["status"]["cacheName"]
        before = world.wait_phase("ActivationCache", cache, "Caching")
        # Which of them made it does not matter; both own it.
        wait_for(lambda: len(owners(world, cache)) == 2, what="both own the cache")
        world.delete("SAETrainingJob", "first")
        # The garbage collector looks every 30 s which kinds there are; ours may be new to it.
        wait_for(lambda: owners(world, cache) == ["second"], 90, what="the first owner's reference is gone")
        assert world.status("ActivationCache", cache)["phase"] == "Caching"
        kubelet.scripts[world.namespace] = succeed
        world.wait_phase("SAETrainingJob", "second", "Succeeded")
        after = world.get("ActivationCache", cache)
        assert after is not None
        assert after["metadata"]["uid"] == before["metadata"]["uid"]
        assert "cache-2" not in world.steps()


def owners(world: World, cache: str) -> list[str]:
    found = world.get("ActivationCache", cache)
    return [owner["name"] for owner in found["metadata"].get("ownerReferences", [])] if found else []


class TestRetries:
    def test_a_job_that_keeps_failing_ends_with_its_last_words(
        self, world: World, operator: OperatorProcess, kubelet: FakeKubelet
    ) -> None:
        log = "\n".join([*(f"step {i} of 100 is done" for i in range(100)), "RuntimeError: the device is lost"])
        kubelet.scripts[world.namespace] = except_for(train=Ends(1, log))
        world.create("SAETrainingJob", "first", job(backoffLimit=2))
        found = world.wait_phase("SAETrainingJob", "first", "Failed", timeout=120)
        assert "RuntimeError: the device is lost (after 3 failed pods)" in conditions(found)["Ready"]["message"]
        attempts = found["status"]["attempts"]
        assert attempts
        assert all(entry["message"].endswith("RuntimeError: the device is lost") for entry in attempts)
        assert max(len(entry["message"]) for entry in attempts) <= 300


class TestANamespaceThatIsDeleted:
    @pytest.mark.parametrize("operated", [True, False], ids=["with the operator", "without it"])
    def test_goes_with_all_that_is_in_it(self, world: World, kubelet: FakeKubelet, operated: bool) -> None:
        kubelet.scripts[world.namespace] = except_for(cache=Runs())
        everywhere = ("--lease-namespace=default",)
        operator = start_operator(world.control_plane.kubeconfig, arguments=everywhere)
        # The namespace's controller looks again after half of the longest time that pods have to end.
        run = {**PLACEMENT, "terminationGracePeriodSeconds": 4}
        world.create("SAETrainingJob", "first", training_spec({"cache": cache_spec(run=run)}))
        world.create("ActivationCache", "own", cache_spec(storage={"uri": "s3://bucket/own"}, run=run))
        world.wait_phase("SAETrainingJob", "first", "WaitingForCache")
        world.wait_phase("ActivationCache", "own", "Caching")
        if not operated:
            operator.kill()
        path = f"/api/v1/namespaces/{world.namespace}"
        assert world.control_plane.request("DELETE", path)[0] == 200
        wait_for(
            lambda: world.control_plane.request("GET", path)[0] == 404,
            what=lambda: f"the namespace is gone; it is {world.control_plane.request('GET', path)[1]!r}",
        )
        if operated:
            assert operator.stop() == 0
            log = operator.log.read_text()
            assert "failed (" not in log
            assert "Traceback" not in log
