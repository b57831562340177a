"""Every manifest in examples/ is valid as it stands, and says what the documentation promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_operator.api.identity import cache_identity
from sae_operator.api.manifest import load_manifests, read_yaml, validate_spec
from sae_operator.api.training_job import SAETrainingJobSpec

EXAMPLES = Path(__file__).parents[2] / "examples"
# What belongs to Kueue and Kubernetes there, tests/cluster/test_kueue.py applies.
OTHERS = {EXAMPLES / "kueue" / name for name in ("cluster.yaml", "namespace.yaml")}
FILES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path not in OTHERS)


def the_job(path: Path) -> SAETrainingJobSpec:
    (job,) = load_manifests(path)
    return job.spec


def test_there_are_examples() -> None:
    names = {path.relative_to(EXAMPLES).as_posix() for path in FILES}
    tops = {"sae-job.yaml", "activation-cache.yaml", "quickstart.yaml", "live.yaml", "hooks-int8.yaml"}
    assert tops | {"testbed/sae-job.yaml"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_an_example_is_valid_and_survives_a_round_trip(path: Path) -> None:
    for resource in load_manifests(path):
        assert validate_spec(resource.kind, resource.spec.to_manifest()) == resource.spec


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_an_example_goes_where_kubectl_is(path: Path) -> None:
    for document in read_yaml(path.read_text()):
        assert "namespace" not in document["metadata"]


def test_the_quickstart_needs_no_cluster_no_hub_and_no_credentials() -> None:
    spec = the_job(EXAMPLES / "quickstart.yaml")
    cache = spec.activations.cache
    assert cache is not None
    for location in (cache.storage, spec.output):
        assert location.uri.startswith("file://out/quickstart")
        assert location.secret_ref is None
    assert cache.model.name.startswith("build/")
    assert cache.dataset.path.startswith("build/")


def test_the_quickstart_trains_on_150000_tokens_and_holds_out_20000() -> None:
    spec = the_job(EXAMPLES / "quickstart.yaml")
    assert spec.evaluation.held_out_tokens == 20_000
    assert spec.activations.cache is not None
    assert spec.training.tokens is None
    assert spec.activations.cache.tokens - 20_000 >= 150_000


def test_the_test_beds_job_makes_at_least_four_shards_in_two_pods_and_trains_two_saes() -> None:
    spec = the_job(EXAMPLES / "testbed" / "sae-job.yaml")
    cache = spec.activations.cache
    assert cache is not None
    bytes_per_row = 576 * 2 + 12
    assert cache.tokens / (cache.storage.shard_bytes // bytes_per_row) > 3
    assert cache.parallelism == 2
    assert len(spec.saes) == 2
    for settings in (cache.run, spec.run):
        assert settings.resources.limits["nvidia.com/gpu"] == 1


def test_the_live_example_stores_no_activations() -> None:
    spec = the_job(EXAMPLES / "live.yaml")
    assert spec.activations.live is not None
    assert spec.activations.cache is None
    assert spec.run.resources.limits["nvidia.com/gpu"] == 1


def test_the_example_of_hooks_trains_on_each_of_them_from_half_the_bytes_and_a_bucket() -> None:
    spec = the_job(EXAMPLES / "hooks-int8.yaml")
    cache = spec.activations.cache
    assert cache is not None
    assert cache.storage.dtype == "int8"
    assert [sae.hook for sae in spec.saes] == [hook.key for hook in cache.hooks]
    assert cache.hooks[1].head_index == 3
    assert cache.dataset.path.startswith("s3://")
    assert cache.dataset.store is not None
    assert cache.dataset.store.secret_ref is not None
    assert (cache.dataset.store.secret_ref.name, spec.output.secret_ref and spec.output.secret_ref.name) == (
        "texts",
        "s3",
    )


def replication(name: str) -> list[SAETrainingJobSpec]:
    return [job.spec for job in load_manifests(EXAMPLES / "replications" / f"{name}.yaml")]


@pytest.mark.parametrize(
    ("name", "steps", "saes", "rates", "decay"),
    [
        ("tinystories", 30_000, [1], {5e-5}, 6000),
        ("how-we-train-saes", 200_000, [3, 3], {5e-5, 3e-4}, 40_000),
        ("gpt2-mlp-learning-rates", 20_000, [5, 5, 5, 5], {1e-5, 5e-5, 1e-4, 4e-4}, 4000),
        ("gpt2-mlp-blocks", 20_000, [10, 10], {1e-4}, 4000),
        ("gpt2-mlp-autocast", 2000, [2, 2], {1e-4}, 400),
    ],
)
def test_replications_have_the_length_and_the_sweep_of_the_original(
    name: str, steps: int, saes: list[int], rates: set[float], decay: int
) -> None:
    jobs = replication(name)
    assert [len(job.saes) for job in jobs] == saes
    assert {job.training.learning_rate for job in jobs} == rates
    for job in jobs:
        tokens = job.training.tokens
        assert tokens is not None
        assert tokens == steps * 4096
        # A fifth of the steps, which the original's scripts mean and do not do.
        assert job.training.decay_steps == decay == steps // 5
        cache = job.activations.cache
        assert cache is None or cache.tokens > tokens


def test_the_jobs_of_a_sweep_share_their_cache() -> None:
    for name in ("gpt2-mlp-learning-rates", "gpt2-mlp-blocks"):
        caches = [job.activations.cache for job in replication(name)]
        assert len({cache_identity(cache) for cache in caches if cache is not None}) == 1
