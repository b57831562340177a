"""Jobs that a queueing system holds, and takes back."""

from __future__ import annotations

from sae_operator.reconcile.observed import Defaults
from tests.unit.reconcile.fake_cluster import CACHE, JOB, FakeCluster, PodScript
from tests.unit.reconcile.specs import cache_spec, job_spec
from tests.unit.reconcile.test_lives import steps_of

LABEL = "kueue.x-k8s.io/queue-name"


def slow(step: str, index: int, earlier: int) -> PodScript:
    return PodScript(seconds=20 if step in ("cache", "train") else 2)


def running_training() -> tuple[FakeCluster, str]:
    """A cluster in which a training runs, and the name of its Job."""
    cluster = FakeCluster(slow)
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}))
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
    return cluster, cluster.status(JOB, "sae")["jobName"]


def take_back(cluster: FakeCluster, job: str) -> None:
    """What a pre-emption does: the Job is suspended, and its controller deletes the pods."""
    cluster.jobs[job]["spec"]["suspend"] = True
    cluster.jobs[job]["status"]["active"] = 0
    for pod in cluster.pods_of(job):
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"


def test_a_training_that_a_queue_takes_back_is_queued_while_its_pods_end_and_goes_on_as_the_same_job() -> None:
    cluster, job = running_training()
    cluster.node_away = True
    take_back(cluster, job)
    cluster.wait(5)
    assert cluster.pods_of(job), "its pod still writes a checkpoint"
    assert cluster.phase(JOB, "sae") == "Queued"
    ready = cluster.condition(JOB, "sae", "Ready")
    assert ready is not None
    assert ready["message"] == f"Job {job} is held by a queue"
    cluster.node_away = False
    cluster.wait(30)
    assert cluster.phase(JOB, "sae") == "Queued"
    cluster.jobs[job]["spec"]["suspend"] = False
    cluster.run()
    assert cluster.phases("sae")[-4:] == ["Running", "Queued", "Running", "Succeeded"]
    assert steps_of(cluster, JOB, "sae") == ["preflight-1", "train-1"]


def test_a_training_is_queued_from_the_moment_at_which_its_job_is_held() -> None:
    cluster, job = running_training()
    cluster.job_controller_away = True
    cluster.jobs[job]["spec"]["suspend"] = True
    # Neither the Job's controller nor the kubelet has done anything yet.
    cluster.reconcile_all()
    assert cluster.jobs[job]["status"]["active"] == 1
    assert cluster.phase(JOB, "sae") == "Queued"


def test_pods_that_were_listed_before_they_ended_do_not_make_a_training_queued() -> None:
    cluster, job = running_training()
    cluster.job_controller_away = True
    cluster.jobs[job]["status"]["active"] = 0
    cluster.reconcile_all()
    cluster.job_controller_away = False
    cluster.run()
    assert cluster.phases("sae") == ["Preflight", "Queued", "Running", "Succeeded"]


def test_every_job_carries_the_name_of_its_queue() -> None:
    cluster = FakeCluster(defaults=Defaults(queue_name="shared"))
    cluster.create(CACHE, "acts", cache_spec(run={"queueName": "team"}))
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}))
    cluster.run()
    queues = {name.rsplit("-", 2)[1]: job["metadata"]["labels"].get(LABEL) for name, job in cluster.jobs.items()}
    assert queues == {"prepare": "team", "cache": "team", "finalize": "team", "preflight": "shared", "train": "shared"}
    assert all("suspend" not in job["spec"] for job in cluster.jobs.values()), "that field belongs to the queue"
