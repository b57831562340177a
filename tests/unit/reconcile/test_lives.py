"""Whole lives: what a resource goes through, from the manifest to its end."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from tests.unit.reconcile.fake_cluster import CACHE, JOB, FakeCluster, PodScript
from tests.unit.reconcile.specs import cache_spec, job_spec


def inline_cache_of(cluster: FakeCluster) -> str:
    (name,) = [name for kind, name in cluster.resources if kind == CACHE]
    return name


def steps_of(cluster: FakeCluster, kind: str, name: str) -> list[str]:
    prefix = f"{name}-{cluster.resources[kind, name]['metadata']['uid'][:8]}-"
    return [job.removeprefix(prefix) for job in cluster.created_jobs if job.startswith(prefix)]


def test_a_cache_goes_through_its_steps_and_becomes_ready() -> None:
    cluster = FakeCluster()
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run()
    assert cluster.phases("acts") == ["Preparing", "Queued", "Caching", "Finalizing", "Ready"]
    assert steps_of(cluster, CACHE, "acts") == ["prepare-1", "cache-1", "finalize-1"]
    status = cluster.status(CACHE, "acts")
    assert status["tokens"] == 500
    assert status["bytes"] == 8000
    assert status["shards"] == {"total": 5, "complete": 5}
    assert status["hooks"] == [{"name": "model.layers.0", "dIn": 8, "meanNorm": 3.0}]
    assert status["manifestUri"].startswith("s3://saes/caches/lab/")
    assert status["manifestUri"].endswith("/manifest.json")
    assert status["progress"]["percent"] == 100
    assert status["plan"] == {"bytes": 8000, "memoryBytes": 2**30}
    assert status["startTime"] < status["completionTime"]


def test_an_inline_cache_is_made_and_a_job_trained_from_it() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "sae", job_spec())
    cluster.run()
    assert cluster.phases("sae") == ["Preflight", "WaitingForCache", "Queued", "Running", "Succeeded"]
    status = cluster.status(JOB, "sae")
    assert status["cacheName"] == inline_cache_of(cluster)
    assert status["summary"] == {"sae": "k32", "explainedVariance": "0.810", "l0": "32.0"}
    assert [sae["phase"] for sae in status["saes"]] == ["Succeeded", "Succeeded"]
    assert status["reportUri"] == "s3://saes/out/report.html"
    assert status["logUri"] == "s3://saes/out/log.txt"
    assert status["progress"] | {"updatedAt": ""} == {
        "tokens": 1000,
        "totalTokens": 1000,
        "percent": 100,
        "tokensPerSecond": 1234,
        "updatedAt": "",
    }
    owners = cluster.resources[CACHE, inline_cache_of(cluster)]["metadata"]["ownerReferences"]
    assert [(owner["name"], "controller" in owner) for owner in owners] == [("sae", False)]


def test_a_second_job_shares_the_cache_without_a_new_cache_job() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "first", job_spec())
    cluster.run()
    made = [job for job in cluster.created_jobs if job.startswith("cache-")]
    cluster.create(JOB, "second", job_spec(output={"uri": "s3://saes/second"}))
    cluster.run()
    assert cluster.phase(JOB, "second") == "Succeeded"
    assert [job for job in cluster.created_jobs if job.startswith("cache-")] == made
    assert "WaitingForCache" not in cluster.phases("second")
    assert ("second", "CacheShared") in [(name, reason) for name, reason, _ in cluster.events]
    owners = cluster.resources[CACHE, inline_cache_of(cluster)]["metadata"]["ownerReferences"]
    assert [owner["name"] for owner in owners] == ["first", "second"]


def test_a_job_that_asks_for_more_tokens_extends_the_cache() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "first", job_spec())
    cluster.run()
    name = inline_cache_of(cluster)
    cluster.create(JOB, "second", job_spec({"cache": cache_spec(tokens=1200)}, output={"uri": "s3://saes/second"}))
    cluster.run()
    assert cluster.phase(JOB, "second") == "Succeeded"
    assert cluster.status(CACHE, name)["tokens"] == 1200
    assert cluster.status(CACHE, name)["shards"] == {"total": 12, "complete": 12}
    assert steps_of(cluster, CACHE, name) == [
        "prepare-1",
        "cache-1",
        "finalize-1",
        "prepare-2",
        "cache-2",
        "finalize-2",
    ]
    # A third that asks for less than is there waits for nothing.
    cluster.create(JOB, "third", job_spec(output={"uri": "s3://saes/third"}))
    cluster.run()
    assert cluster.phase(JOB, "third") == "Succeeded"
    assert "WaitingForCache" not in cluster.phases("third")
    assert cluster.resources[CACHE, name]["spec"]["tokens"] == 1200


def test_a_job_takes_what_is_there_while_the_cache_is_being_extended() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "first", job_spec())
    cluster.run()
    cluster.create(JOB, "more", job_spec({"cache": cache_spec(tokens=5000)}, output={"uri": "s3://saes/more"}))
    cluster.run_until(lambda: cluster.phase(CACHE, inline_cache_of(cluster)) == "Preparing")
    cluster.create(JOB, "less", job_spec(output={"uri": "s3://saes/less"}))
    cluster.run()
    assert cluster.phases("less") == ["Preflight", "Queued", "Running", "Succeeded"]
    assert cluster.phase(JOB, "more") == "Succeeded"


def test_tokens_raised_while_a_cache_works_are_looked_at_when_it_has_finished() -> None:
    cluster = FakeCluster()
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run_until(lambda: cluster.phase(CACHE, "acts") == "Caching")
    cluster.edit(CACHE, "acts", tokens=900)
    cluster.run()
    # Never Ready in between: the generation that it would be ready for asks for more.
    assert cluster.phases("acts")[-5:] == ["Preparing", "Queued", "Caching", "Finalizing", "Ready"]
    assert cluster.phases("acts").count("Ready") == 1
    assert cluster.status(CACHE, "acts")["tokens"] == 900
    assert steps_of(cluster, CACHE, "acts")[2:4] == ["finalize-1", "prepare-2"]


def test_a_finished_cache_in_the_store_is_adopted_without_a_gpu_job() -> None:
    cluster = FakeCluster()
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run()
    del cluster.resources[CACHE, "acts"]
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run()
    assert steps_of(cluster, CACHE, "acts") == ["prepare-1"]
    assert cluster.status(CACHE, "acts")["tokens"] == 500
    condition = cluster.condition(CACHE, "acts", "Ready")
    assert condition is not None
    assert condition["reason"] == "Adopted"


def test_a_cache_whose_shards_are_all_there_goes_straight_to_finalize() -> None:
    prepared = '{"step":"prepare","exitCode":0,"reason":"Completed","shardsTotal":5,"shardsComplete":5}'

    def script(step: str, index: int, earlier: int) -> PodScript:
        return PodScript(message=prepared) if step == "prepare" else PodScript()

    cluster = FakeCluster(script)
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run()
    assert steps_of(cluster, CACHE, "acts") == ["prepare-1", "finalize-1"]


def test_finished_results_are_adopted_by_preflight() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "sae", job_spec())
    cluster.run()
    del cluster.resources[JOB, "sae"]
    cluster.create(JOB, "sae", job_spec())
    cluster.run()
    assert steps_of(cluster, JOB, "sae") == ["preflight-1"]
    assert cluster.phases("sae")[-2:] == ["Preflight", "Succeeded"]
    assert cluster.status(JOB, "sae")["summary"]["explainedVariance"] == "0.810"


def test_a_job_waits_for_the_cache_that_cache_ref_names() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "sae", job_spec({"cacheRef": {"name": "acts"}}))
    cluster.wait(5)
    assert cluster.phase(JOB, "sae") == "Pending"
    ready = cluster.condition(JOB, "sae", "Ready")
    assert ready is not None
    assert ready["message"] == "waits for ActivationCache acts, which does not exist in namespace lab"
    assert cluster.created_jobs == []
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run()
    assert cluster.phases("sae") == ["Pending", "Preflight", "WaitingForCache", "Queued", "Running", "Succeeded"]
    assert cluster.resources[CACHE, "acts"]["metadata"]["ownerReferences"] == []


def test_a_job_that_reads_a_uri_needs_no_cache() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}))
    cluster.run()
    assert cluster.phases("sae") == ["Preflight", "Queued", "Running", "Succeeded"]
    assert [kind for kind, _ in cluster.resources] == [JOB]
    assert "cacheName" not in cluster.status(JOB, "sae")


def test_a_running_job_needs_its_cache_resource_no_more() -> None:
    cluster = FakeCluster()
    cluster.create(CACHE, "acts", cache_spec())
    cluster.create(JOB, "sae", job_spec({"cacheRef": {"name": "acts"}}))
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
    del cluster.resources[CACHE, "acts"]
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"


def test_raised_training_tokens_continue_a_finished_job() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "sae", job_spec())
    cluster.run()
    cluster.edit(JOB, "sae", training={"tokens": 3000})
    cluster.run()
    assert steps_of(cluster, JOB, "sae") == ["preflight-1", "train-1", "preflight-2", "train-2"]
    assert cluster.status(JOB, "sae")["progress"]["tokens"] == 3000


def test_a_job_that_trains_on_all_of_its_cache_goes_on_when_that_is_to_hold_more() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "sae", job_spec(training={}))
    cluster.run()
    made = len(cluster.created_jobs)
    cluster.edit(JOB, "sae", activations={"cache": cache_spec(tokens=900)})
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert cluster.status(CACHE, inline_cache_of(cluster))["tokens"] == 900
    steps = [job.rsplit("-", 2)[1] for job in cluster.created_jobs[made:]]
    assert steps == ["preflight", "prepare", "cache", "finalize", "train"]
    assert cluster.status(JOB, "sae")["progress"]["totalTokens"] == 900


def test_raised_training_tokens_replace_the_pod_that_trains() -> None:
    cluster = FakeCluster(lambda step, index, earlier: PodScript(seconds=20 if step == "train" else 2))
    cluster.create(JOB, "sae", job_spec())
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Running")
    cluster.edit(JOB, "sae", training={"tokens": 3000})
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert cluster.status(JOB, "sae")["progress"]["tokens"] == 3000
    assert steps_of(cluster, JOB, "sae")[-2:] == ["preflight-2", "train-1"]


def test_nothing_is_written_at_rest() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "sae", job_spec())
    cluster.run()
    calls = cluster.calls
    cluster.wait(120)
    assert cluster.calls == calls
    wanted = cluster.wanted(JOB, "sae")
    assert wanted.requeue_after is None
    assert not wanted.poll_pods


def test_progress_counts_the_tokens_of_a_fine_tuning() -> None:
    def script(step: str, index: int, earlier: int) -> PodScript:
        said = {"tokens": 1100, "totalTokens": 2000, "tokensPerSecond": 10.0}
        return PodScript(seconds=30, progress=lambda age: said) if step == "train" else PodScript()

    cluster = FakeCluster(script)
    training = {"tokens": 1000, "finetuning": {"method": "scale", "tokens": 1000}}
    cluster.create(JOB, "sae", job_spec(training=training))
    cluster.run_until(lambda: (cluster.status(JOB, "sae").get("progress") or {}).get("tokens", 0) > 500)
    progress = cluster.status(JOB, "sae")["progress"]
    assert (progress["tokens"], progress["totalTokens"], progress["percent"]) == (1100, 2000, 55)


def test_progress_is_told_while_it_runs_but_not_at_every_poll() -> None:
    def script(step: str, index: int, earlier: int) -> PodScript:
        if step != "train":
            return PodScript(seconds=2)

        def progress(second: int) -> dict[str, Any]:
            saes = [{"name": "k16", "explainedVariance": 0.5 + second / 1000, "l0": 16.0}]
            return {"tokens": 10 * second, "totalTokens": 1000, "tokensPerSecond": 10.0, "saes": saes}

        return PodScript(seconds=100, progress=progress)

    cluster = FakeCluster(script)
    cluster.create(JOB, "sae", job_spec())
    cluster.run()
    running = [status for who, status in cluster.statuses if who == "sae" and status["phase"] == "Running"]
    assert 10 <= len(running) <= 13
    working = running[-1]
    assert working["progress"]["percent"] > 85
    assert working["progress"]["tokensPerSecond"] == 10
    assert working["summary"]["sae"] == "k16"
    assert all(later["progress"]["tokens"] >= earlier["progress"]["tokens"] for earlier, later in pairwise(running))
