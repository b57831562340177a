"""Jobs whose model runs beside the training: no cache; preflight prepares the contexts on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from sae_operator.api.identity import cache_identity, training_identity
from sae_operator.api.steps import TrainStep
from sae_operator.reconcile.observed import Defaults
from tests.unit.reconcile.fake_cluster import CACHE, JOB, FakeCluster, PodScript
from tests.unit.reconcile.specs import cache_spec, job_spec
from tests.unit.reconcile.test_children import container_of, job_of, pod_of
from tests.unit.reconcile.test_lives import steps_of


def live_spec(**changes: Any) -> dict[str, Any]:
    gpu = {"resources": {"limits": {"nvidia.com/gpu": 1}}, "nodeSelector": {"gpu": "h100"}}
    source = {key: value for key, value in cache_spec().items() if key not in ("storage", "parallelism")}
    return job_spec({"live": source | changes}, training={}, run=gpu)


def given_to(cluster: FakeCluster, step: str) -> TrainStep:
    given = cluster.step_spec(job_of(cluster, step)["metadata"]["name"])
    assert isinstance(given, TrainStep)
    return given


def lived(defaults: Defaults | None = None, **changes: Any) -> FakeCluster:
    cluster = FakeCluster(defaults=defaults or Defaults())
    cluster.create(JOB, "sae", live_spec(**changes))
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    return cluster


def test_a_live_job_makes_no_cache_and_waits_for_none() -> None:
    cluster = lived()
    assert cluster.phases("sae") == ["Preflight", "Queued", "Running", "Succeeded"]
    assert [kind for kind, _ in cluster.resources] == [JOB]
    assert "cacheName" not in cluster.status(JOB, "sae")
    assert cluster.status(JOB, "sae")["progress"]["totalTokens"] == 500


def test_both_steps_are_given_the_folder_of_the_contexts_and_the_source_as_a_cache() -> None:
    cluster = lived(bufferBytes=2**30)
    for step in ("preflight", "train"):
        given = given_to(cluster, step)
        assert given.activations.to_manifest() == {"uri": "s3://saes/out/activations", "secretRef": {"name": "s3"}}
        assert given.cache is not None
        assert given.cache.storage.shard_bytes == 2**30 // 10
        assert given.cache.storage.uri == given.activations.uri
        assert [hook.key for hook in given.cache.hooks] == ["model.layers.0"]


def test_the_preparation_of_its_contexts_tells_how_far_it_is() -> None:
    def script(step: str, index: int, earlier: int) -> PodScript:
        def progress(second: int) -> dict[str, Any]:
            return {"tokens": 100 * second, "totalTokens": 2000, "tokensPerSecond": 100.0}

        return PodScript(seconds=20, progress=progress if step == "preflight" else None)

    cluster = FakeCluster(script)
    cluster.create(JOB, "sae", live_spec())
    cluster.run()
    told = [
        status.get("progress", {}).get("percent") for _, status in cluster.statuses if status["phase"] == "Preflight"
    ]
    assert len(told) >= 3
    assert max(percent or 0 for percent in told) >= 50
    # What is trained is counted anew.
    queued = [status for _, status in cluster.statuses if status["phase"] == "Queued"]
    assert queued[-1]["progress"]["tokens"] == 0
    assert cluster.status(JOB, "sae")["progress"]["tokens"] == 500


def test_only_the_training_pod_takes_a_gpu_and_the_memory_of_the_plan() -> None:
    cluster = lived()
    assert container_of(cluster, "preflight")["resources"] == {"requests": {"cpu": "250m", "memory": "1Gi"}}
    assert "nodeSelector" not in pod_of(cluster, "preflight")
    assert container_of(cluster, "train")["resources"] == {
        "limits": {"nvidia.com/gpu": "1"},
        "requests": {"cpu": "500m", "memory": "1024Mi"},
    }


def test_more_rows_of_a_live_source_continue_a_job_that_trains_on_all_of_them() -> None:
    cluster = lived()
    cluster.edit(JOB, "sae", activations=live_spec(tokens=900)["activations"])
    cluster.run()
    assert steps_of(cluster, JOB, "sae") == ["preflight-1", "train-1", "preflight-2", "train-2"]
    assert cluster.status(JOB, "sae")["progress"]["totalTokens"] == 900


def test_a_model_and_a_text_in_a_store_are_opened_with_their_own_secrets() -> None:
    model = {"name": "s3://models/small", "store": {"secretRef": {"name": "models"}}}
    text = {"path": "s3://texts/english", "store": {"secretRef": {"name": "texts"}, "region": "eu-2"}}
    cluster = lived(model=model, dataset=text)
    mounts = {mount["mountPath"] for mount in container_of(cluster, "train")["volumeMounts"]}
    assert {f"/run/sae-job/secrets/{name}" for name in ("models", "texts", "s3")} <= mounts


def test_a_model_and_a_text_in_a_store_take_the_defaults_of_the_namespace() -> None:
    defaults = Defaults(endpoint_url="http://s3.local:9000", region="eu-1", secret_name="store")
    model = {"name": "s3://models/small"}
    text = {"path": "s3://texts/english", "store": {"secretRef": {"name": "texts"}, "region": "eu-2"}}
    cluster = lived(defaults, model=model, dataset=text)
    given = given_to(cluster, "preflight")
    assert given.cache is not None
    assert given.spec.activations.live is not None
    for source in (given.cache, given.spec.activations.live):
        assert source.model.store is not None
        assert source.model.store.to_manifest() == {
            "endpointUrl": "http://s3.local:9000",
            "region": "eu-1",
            "secretRef": {"name": "store"},
        }
        assert source.dataset.store is not None
        assert source.dataset.store.to_manifest() == {
            "endpointUrl": "http://s3.local:9000",
            "region": "eu-2",
            "secretRef": {"name": "texts"},
        }


def test_what_lies_on_a_hub_or_in_a_folder_takes_no_defaults() -> None:
    cluster = lived(Defaults(endpoint_url="http://s3.local:9000", secret_name="store"))
    given = given_to(cluster, "preflight")
    assert given.cache is not None
    assert (given.cache.model.store, given.cache.dataset.store) == (None, None)


def test_defaults_move_no_cache() -> None:
    """Where a cache lies follows from its spec as it is written, although the endpoint of its text counts."""
    spec = cache_spec(dataset={"path": "s3://texts/english"})
    defaults = Defaults(endpoint_url="http://s3.local:9000", secret_name="store")
    cluster = FakeCluster(defaults=defaults)
    cluster.create(JOB, "sae", job_spec({"cache": spec}))
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    ((_, name),) = [key for key in cluster.resources if key[0] == CACHE]
    written = given_to(cluster, "train").activations.uri
    assert cluster.status(CACHE, name)["manifestUri"] == f"{written}/manifest.json"
    plain = FakeCluster()
    plain.create(JOB, "sae", job_spec({"cache": spec}))
    plain.run()
    assert given_to(plain, "train").activations.uri == written
    given = given_to(plain, "train").cache
    assert given is not None
    assert written.endswith(f"/lab/{cache_identity(given)}")


@pytest.mark.parametrize("source", ["cache", "uri"])
def test_defaults_change_no_identity(source: str) -> None:
    """What is there was made under other defaults, or by `sae-job run`, and stays what it is."""
    activations = {
        "cache": {"cache": cache_spec(dataset={"path": "s3://texts/english"})},
        "uri": {"uri": "s3://saes/caches/finished"},
    }[source]

    def given(defaults: Defaults) -> TrainStep:
        cluster = FakeCluster(defaults=defaults)
        cluster.create(JOB, "sae", job_spec(activations))
        cluster.run()
        return given_to(cluster, "train")

    plain, filled = given(Defaults()), given(Defaults(endpoint_url="http://s3.local:9000", secret_name="store"))
    assert plain.spec != filled.spec
    assert plain.training_identity == filled.training_identity == training_identity(plain.spec)
    assert plain.cache_identity == filled.cache_identity
    assert (plain.cache_identity is None) == (source == "uri")
