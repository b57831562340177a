"""Suspend and resume."""

from __future__ import annotations

from tests.unit.reconcile.fake_cluster import CACHE, JOB, FakeCluster, PodScript
from tests.unit.reconcile.specs import cache_spec, job_spec
from tests.unit.reconcile.test_lives import inline_cache_of, steps_of


def slow(step: str, index: int, earlier: int) -> PodScript:
    return PodScript(seconds=20 if step in ("cache", "train") else 2)


def test_suspending_ends_the_pods_and_resuming_is_the_next_attempt() -> None:
    cluster = FakeCluster(slow)
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}))
    for attempt in range(1, 8):
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        cluster.edit(JOB, "sae", suspend=True)
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Suspended")
        assert not [job for job in cluster.jobs if "train" in job]
        assert not [pod for pod in cluster.pods if "train" in pod]
        assert cluster.status(JOB, "sae")["attempt"] == attempt
        cluster.edit(JOB, "sae", suspend=False)
    cluster.run()
    # Seven times: being suspended is not being deleted by somebody.
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert steps_of(cluster, JOB, "sae") == ["preflight-1", *(f"train-{attempt}" for attempt in range(1, 9))]
    assert "attempts" not in cluster.status(JOB, "sae")


def test_a_resource_that_is_suspended_from_the_start_does_nothing() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "sae", job_spec(suspend=True))
    cluster.run()
    assert cluster.phases("sae") == ["Suspended"]
    assert not cluster.created_jobs
    assert list(cluster.resources) == [(JOB, "sae")]
    cluster.edit(JOB, "sae", suspend=False)
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"


def test_a_suspended_cache_goes_on_where_it_was() -> None:
    cluster = FakeCluster(slow)
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run_until(lambda: cluster.phase(CACHE, "acts") == "Caching")
    cluster.edit(CACHE, "acts", suspend=True)
    cluster.run_until(lambda: cluster.phase(CACHE, "acts") == "Suspended")
    cluster.edit(CACHE, "acts", suspend=False)
    cluster.run()
    assert steps_of(cluster, CACHE, "acts") == ["prepare-1", "cache-1", "cache-2", "finalize-1"]


def test_an_inline_cache_is_suspended_only_when_all_its_waiting_owners_are() -> None:
    cluster = FakeCluster(slow)
    cluster.create(JOB, "first", job_spec())
    cluster.create(JOB, "second", job_spec(output={"uri": "s3://saes/second"}))
    cluster.run_until(lambda: cluster.phase(JOB, "second") == "WaitingForCache")
    name = inline_cache_of(cluster)
    cluster.run_until(lambda: cluster.phase(CACHE, name) == "Caching")
    cluster.edit(JOB, "first", suspend=True)
    cluster.wait(5)
    assert cluster.phase(JOB, "first") == "Suspended"
    assert cluster.phase(CACHE, name) == "Caching"
    cluster.edit(JOB, "second", suspend=True)
    cluster.run_until(lambda: cluster.phase(CACHE, name) == "Suspended")
    cluster.edit(JOB, "first", suspend=False)
    cluster.run_until(lambda: cluster.phase(CACHE, name) == "Caching")
    cluster.edit(JOB, "second", suspend=False)
    cluster.run()
    assert cluster.phase(JOB, "first") == cluster.phase(JOB, "second") == "Succeeded"


def test_an_owner_that_has_finished_has_no_say_in_whether_its_cache_is_suspended() -> None:
    cluster = FakeCluster(slow)
    cluster.create(JOB, "first", job_spec())
    cluster.run_until(lambda: cluster.phase(JOB, "first") == "Succeeded")
    # A second one wants more of the same cache, which works again.
    cluster.create(JOB, "second", job_spec({"cache": cache_spec(tokens=900)}, output={"uri": "s3://saes/second"}))
    name = inline_cache_of(cluster)
    cluster.run_until(lambda: cluster.phase(CACHE, name) == "Caching")
    cluster.edit(JOB, "second", suspend=True)
    cluster.run_until(lambda: cluster.phase(CACHE, name) == "Suspended")
    cluster.edit(JOB, "second", suspend=False)
    cluster.run()
    assert cluster.phase(JOB, "second") == "Succeeded"


def test_a_cache_goes_on_for_its_other_owners_when_the_first_one_is_deleted() -> None:
    cluster = FakeCluster(slow)
    for name in ("first", "second"):
        cluster.create(JOB, name, job_spec(output={"uri": f"s3://saes/{name}"}))
    cluster.run_until(lambda: cluster.phase(JOB, "second") == "WaitingForCache")
    cache = inline_cache_of(cluster)
    cluster.run_until(lambda: cluster.phase(CACHE, cache) == "Caching")
    # The garbage collector takes the reference away some time after the owner is gone.
    first = cluster.resources.pop((JOB, "first"))["metadata"]["uid"]
    cluster.wait(3)
    assert cluster.phase(CACHE, cache) == "Caching"
    references = cluster.resources[CACHE, cache]["metadata"]["ownerReferences"]
    references[:] = [reference for reference in references if reference["uid"] != first]
    # Only the second one has a say now.
    cluster.edit(JOB, "second", suspend=True)
    cluster.run_until(lambda: cluster.phase(CACHE, cache) == "Suspended")
    cluster.edit(JOB, "second", suspend=False)
    cluster.run()
    assert cluster.phase(JOB, "second") == "Succeeded"
    assert steps_of(cluster, CACHE, cache) == ["prepare-1", "cache-1", "cache-2", "finalize-1"]


def test_pods_of_a_job_deleted_by_hand_end_before_the_next_attempt_begins() -> None:
    cluster = FakeCluster(slow)
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run_until(lambda: cluster.phase(CACHE, "acts") == "Caching")
    (job,) = [name for name in cluster.jobs if "-cache-" in name]
    cluster.delete_job(job)
    wanted = cluster.wanted(CACHE, "acts")
    assert wanted.create == ()
    assert wanted.poll_pods
    cluster.run()
    assert cluster.phase(CACHE, "acts") == "Ready"
    assert steps_of(cluster, CACHE, "acts") == ["prepare-1", "cache-1", "cache-2", "finalize-1"]


def test_a_job_that_a_queue_holds_is_queued() -> None:
    cluster = FakeCluster(slow)
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}))
    cluster.run_until(lambda: any("train" in name for name in cluster.jobs))
    (name,) = [name for name in cluster.jobs if "train" in name]
    cluster.jobs[name]["spec"]["suspend"] = True
    for pod in cluster.pods_of(name):
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    cluster.jobs[name]["status"]["active"] = 0
    cluster.wait(5)
    assert cluster.phase(JOB, "sae") == "Queued"
    ready = cluster.condition(JOB, "sae", "Ready")
    assert ready is not None
    assert "held by a queue" in ready["message"]
    cluster.jobs[name]["spec"]["suspend"] = False
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"


def test_resuming_before_the_pods_have_ended_is_no_deletion_by_somebody() -> None:
    cluster = FakeCluster(slow)
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}))
    for _ in range(5):
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
        cluster.edit(JOB, "sae", suspend=True)
        cluster.node_away = True
        cluster.wait(3)
        cluster.edit(JOB, "sae", suspend=False)
        cluster.wait(3)
        assert not cluster.status(JOB, "sae").get("attempts")
        cluster.node_away = False
        cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Queued")
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert not cluster.status(JOB, "sae").get("attempts")


def test_a_job_that_is_deleted_by_hand_after_a_suspension_counts() -> None:
    cluster = FakeCluster(slow)
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}))
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
    cluster.edit(JOB, "sae", suspend=True)
    cluster.tick()
    cluster.edit(JOB, "sae", suspend=False)
    cluster.run_until(lambda: "-train-2" in cluster.status(JOB, "sae")["jobName"])
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
    cluster.delete_job(cluster.status(JOB, "sae")["jobName"])
    cluster.run()
    assert [entry["reason"] for entry in cluster.status(JOB, "sae")["attempts"]] == ["JobDeleted"]
