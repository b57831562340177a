"""Training over several pods: they begin together, are counted once, and are started again together."""

from __future__ import annotations

import json
from typing import Any

from tests.unit.reconcile.fake_cluster import JOB, FakeCluster, PodScript
from tests.unit.reconcile.specs import job_spec
from tests.unit.reconcile.test_children import container_of, job_of, pod_of
from tests.unit.reconcile.test_failures import message_of, result

PODS = 3


def trained(script: Any = None, **changes: Any) -> FakeCluster:
    """The end of a job whose training runs in three pods."""
    cluster = FakeCluster(script) if script is not None else FakeCluster()
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/cache"}, parallelism=PODS, **changes))
    cluster.run()
    return cluster


def training(*scripts: PodScript) -> Any:
    """A script of the training pods by index; other steps work."""

    def script(step: str, index: int, earlier: int) -> PodScript:
        return scripts[index] if step == "train" else PodScript()

    return script


def test_the_pods_are_one_indexed_job_with_names_in_dns() -> None:
    cluster = trained(run={"backoffLimit": 4})
    assert cluster.phase(JOB, "sae") == "Succeeded"
    job, pod = job_of(cluster, "train"), pod_of(cluster, "train")
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", PODS, PODS)
    uid = cluster.resources[JOB, "sae"]["metadata"]["uid"]
    (service,) = cluster.services.values()
    assert service["metadata"]["name"] == pod["subdomain"] == f"sae-{uid}"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    labels = spec["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["metadata"]["ownerReferences"][0]["uid"] == uid
    env = {variable["name"]: variable.get("value") for variable in container_of(cluster, "train")["env"]}
    assert env["SAE_JOB_PODS"] == "3"
    assert env["SAE_JOB_RENDEZVOUS"] == f"{job['metadata']['name']}-0.sae-{uid}:29400"
    assert {"name": "rendezvous", "containerPort": 29400} in container_of(cluster, "train")["ports"]


def test_preflight_and_a_training_in_one_pod_are_what_they_were() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/cache"}))
    cluster.run()
    many = trained()
    assert cluster.services == {}
    for found, step in ((cluster, "train"), (many, "preflight")):
        assert "completions" not in job_of(found, step)["spec"]
        assert "subdomain" not in pod_of(found, step)
        assert "SAE_JOB_PODS" not in {variable["name"] for variable in container_of(found, step)["env"]}


def test_processes_of_several_gpus_have_shared_memory() -> None:
    def volumes(gpus: int) -> dict[str, Any]:
        found = trained(run={"resources": {"limits": {"nvidia.com/gpu": gpus}}})
        mounts = {mount["name"]: mount["mountPath"] for mount in container_of(found, "train")["volumeMounts"]}
        return {mounts[volume["name"]]: volume.get("emptyDir") for volume in pod_of(found, "train")["volumes"]}

    assert volumes(8)["/dev/shm"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    assert "/dev/shm" not in volumes(1)


def test_as_many_failures_are_allowed_as_of_one_pod_and_stopping_together_is_none() -> None:
    """With a limit of 4, four times may all of three pods fail: 12 failures; the fifth time ends the Job."""
    spec = job_of(trained(run={"backoffLimit": 4}), "train")["spec"]
    assert spec["backoffLimit"] == 14
    assert "backoffLimitPerIndex" not in spec
    rules = spec["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "FailJob", "Ignore"]
    assert rules[1]["onExitCodes"]["values"] == [2]
    assert rules[2]["onExitCodes"]["values"] == [143]


def test_progress_is_that_of_the_first_pod_and_not_counted_again_for_the_others() -> None:
    def says(**figures: Any) -> PodScript:
        return PodScript(seconds=30, progress=lambda age: figures)

    figures = {"tokens": 400, "totalTokens": 1000, "tokensPerSecond": 50.0, "checkpointTokens": 300}
    saes = [{"name": "k16", "explainedVariance": 0.7}]
    others = says(tokens=0)
    cluster = FakeCluster(training(says(**figures, saes=saes), others, others))
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/cache"}, parallelism=PODS))
    cluster.run_until(lambda: (cluster.status(JOB, "sae").get("progress") or {}).get("tokens", 0) > 0)
    status = cluster.status(JOB, "sae")
    assert (status["progress"]["tokens"], status["progress"]["totalTokens"]) == (400, 1000)
    assert status["progress"]["tokensPerSecond"] == 50
    assert status["checkpoint"]["tokens"] == 300
    assert status["saes"][0]["explainedVariance"] == 0.7


def test_the_first_pods_result_counts() -> None:
    nothing = json.dumps({"step": "train", "exitCode": 0, "reason": "Completed"})
    others = PodScript(message=nothing, seconds=1)
    cluster = trained(training(PodScript(seconds=4), others, others))
    assert cluster.status(JOB, "sae")["summary"]["sae"] == "k32"


def test_another_ones_is_none_where_the_first_pods_is_lost() -> None:
    nothing = json.dumps({"step": "train", "exitCode": 0, "reason": "Completed"})
    cluster = trained(training(PodScript(message=""), PodScript(message=nothing), PodScript(message=nothing)))
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert "results.json" in message_of(cluster, JOB, "sae", "MetricsUnavailable")


def test_what_one_pod_says_is_told_and_not_that_the_others_lost_it() -> None:
    lost = PodScript(exit_code=1, seconds=2, message=result("train", 1, "PeerLost", "another process has ended"))
    cause = PodScript(exit_code=1, seconds=1, message=result("train", 1, "StoreFailed", "the disk is full"))
    cluster = trained(training(lost, cause, lost), run={"backoffLimit": 0})
    assert cluster.phase(JOB, "sae") == "Failed"
    assert message_of(cluster, JOB, "sae", "Stalled").startswith("the disk is full")
    assert {entry["reason"] for entry in cluster.status(JOB, "sae")["attempts"]} == {"StoreFailed"}


def test_wrong_input_of_one_pod_ends_the_job_at_once() -> None:
    lost = PodScript(exit_code=1, seconds=2, message=result("train", 1, "PeerLost", "another process has ended"))
    wrong = PodScript(exit_code=2, seconds=2, message=result("train", 2, "ShardCorrupt", "shard 3 is corrupt"))
    cluster = trained(training(lost, lost, wrong))
    assert message_of(cluster, JOB, "sae", "Stalled") == "shard 3 is corrupt"
    assert len(cluster.created_jobs) == 2


def test_pods_that_stop_with_an_evicted_one_are_started_again() -> None:
    stopped = result("train", 143, "Stopped", "a checkpoint is stored")

    def script(step: str, index: int, earlier: int) -> PodScript:
        if step != "train" or earlier:
            return PodScript()
        return PodScript(exit_code=143, message=stopped, disrupted=index == 1)

    cluster = trained(script, run={"backoffLimit": 0})
    assert cluster.phase(JOB, "sae") == "Succeeded"


def test_parallelism_that_is_changed_is_for_the_next_attempt() -> None:
    cluster = FakeCluster(training(*[PodScript(seconds=20)] * PODS))
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/cache"}, parallelism=PODS))
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
    cluster.edit(JOB, "sae", parallelism=2)
    cluster.wait(5)
    assert [name for name in cluster.created_jobs if "-train-" in name] == [
        job_of(cluster, "train")["metadata"]["name"]
    ]
    cluster.edit(JOB, "sae", suspend=True)
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Suspended")
    cluster.edit(JOB, "sae", suspend=False)
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
    (job,) = [job for name, job in cluster.jobs.items() if "-train-" in name]
    assert job["spec"]["completions"] == 2
