"""What makes two caches, and two training jobs, the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.base import MAX_NAME_LENGTH
from sae_operator.api.identity import cache_identity, cache_location, inline_cache_name, training_identity
from sae_operator.api.manifest import validate_spec
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.specs import CACHE_SPEC, JOB_SPEC, edited

FREE_CACHE_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "tokens": st.integers(1, 2**53),
        "parallelism": st.integers(1, 1024),
        "suspend": st.booleans(),
        "retry": st.integers(0, 1000),
        "run.image": st.sampled_from(["a:1", "b:2"]),
        "run.resources.limits": st.sampled_from([{"nvidia.com/gpu": 1}, {"cpu": "500m"}]),
        "run.backoffLimit": st.integers(0, 100),
        "storage.uri": st.sampled_from(["s3://other/place", "file:///data"]),
        "storage.secretRef": st.sampled_from([{"name": "a"}, {"name": "b"}]),
        "storage.endpointUrl": st.just("http://127.0.0.1:9000"),
        "storage.region": st.just("eu-west-1"),
        "storage.maxBytes": st.integers(1, 2**40),
    },
)
FREE_JOB_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "training.tokens": st.integers(1, 2**53),
        "suspend": st.booleans(),
        "retry": st.integers(0, 1000),
        "run.image": st.sampled_from(["a:1", "b:2"]),
        "checkpoints.everySeconds": st.integers(1, 1000),
        "output.uri": st.sampled_from(["s3://other/place", "file:///data"]),
        "output.secretRef": st.just({"name": "a"}),
        "activations.cache.tokens": st.integers(1, 2**53),
        "activations.cache.parallelism": st.integers(1, 1024),
        "activations.cache.run.image": st.sampled_from(["a:1", "b:2"]),
        "activations.cache.storage.secretRef": st.just({"name": "a"}),
    },
)


def cache(edits: dict[str, Any] | None = None) -> ActivationCacheSpec:
    return validate_spec("ActivationCache", edited(CACHE_SPEC, edits or {}))


def job(edits: dict[str, Any] | None = None) -> SAETrainingJobSpec:
    return validate_spec("SAETrainingJob", edited(JOB_SPEC, edits or {}))


class TestCache:
    @given(FREE_CACHE_FIELDS)
    def test_amount_place_credentials_and_pods_do_not_count(self, edits: dict[str, Any]) -> None:
        assert cache_identity(cache(edits)) == cache_identity(cache())

    @pytest.mark.parametrize(
        "edits",
        [
            {"model.name": "gpt2-medium"},
            {"model.revision": "main"},
            {"model.dtype": "float32"},
            {"model.batchSize": 8},
            {"dataset.path": "other/text"},
            {"dataset.name": "en"},
            {"dataset.split": "test"},
            {"dataset.revision": "main"},
            {"dataset.dataFiles": ["a.parquet"]},
            {"dataset.column": "body"},
            {"hooks": [{"name": "transformer.h.8"}]},
            {"hooks": [{"name": "transformer.h.7"}, {"name": "transformer.h.8"}]},
            {"contextSize": 64},
            {"seed": 1},
            {"sampling.prependBos": False},
            {"sampling.excludeSpecialTokens": False},
            {"sampling.maxNormRatio": 0},
            {"storage.dtype": "float32"},
            {"storage.shardBytes": 2**20},
        ],
        ids=lambda edits: "-".join(edits),
    )
    def test_all_that_rows_depend_on_counts(self, edits: dict[str, Any]) -> None:
        assert cache_identity(cache(edits)) != cache_identity(cache())

    def test_a_default_written_out_is_the_same(self) -> None:
        # The API server writes 10 for 10.0.
        written_out = {"sampling": {"prependBos": True, "maxNormRatio": 10}, "model.batchSize": 16, "seed": 0}
        assert cache_identity(cache(written_out)) == cache_identity(cache())

    def test_it_is_the_same_in_every_release(self) -> None:
        # A change here orphans every cache that exists: it needs a new format version.
        assert cache_identity(cache()) == "3fc9bd8b202df894"

    def test_the_location_is_below_the_store_by_namespace_and_identity(self) -> None:
        spec = cache({"storage.uri": "s3://saes/caches/", "storage.secretRef": {"name": "s3"}, "storage.region": "x"})
        location = cache_location(spec, "team-a")
        assert location.uri == f"s3://saes/caches/team-a/{cache_identity(spec)}"
        assert location.secret_ref is not None
        assert (location.secret_ref.name, location.region) == ("s3", "x")

    def test_an_inline_cache_is_named_by_data_and_place(self) -> None:
        assert len(inline_cache_name(cache())) <= MAX_NAME_LENGTH
        assert inline_cache_name(cache()) == inline_cache_name(cache({"tokens": 5, "parallelism": 9}))
        assert inline_cache_name(cache()) == inline_cache_name(cache({"storage.uri": "s3://saes/caches/"}))
        for other in ({"seed": 1}, {"storage.uri": "s3://saes/b"}, {"storage.endpointUrl": "http://127.0.0.1:9000"}):
            assert inline_cache_name(cache()) != inline_cache_name(cache(other))


class TestTrainingJob:
    @given(FREE_JOB_FIELDS)
    def test_amount_place_credentials_and_pods_do_not_count(self, edits: dict[str, Any]) -> None:
        assert training_identity(job(edits)) == training_identity(job())

    @pytest.mark.parametrize(
        "edits",
        [
            {"activations.cache.seed": 1},
            {"activations": {"cacheRef": {"name": "c"}}},
            {"saes.0.name": "other"},
            {"saes.0.architecture.k": 16},
            {"saes.0.seed": 1},
            {"normalization": "none"},
            {"training.learningRate": 3e-4},
            {"training.batchSize": 512},
            {"evaluation.heldOutTokens": 10},
        ],
        ids=lambda edits: "-".join(edits),
    )
    def test_all_that_results_depend_on_counts(self, edits: dict[str, Any]) -> None:
        assert training_identity(job(edits)) != training_identity(job())

    def test_who_opens_a_finished_cache_does_not_count(self) -> None:
        plain = job({"activations": {"uri": "s3://saes/c"}})
        opened = job({"activations": {"uri": "s3://saes/c", "secretRef": {"name": "s3"}, "region": "x"}})
        assert training_identity(plain) == training_identity(opened)
        elsewhere = job({"activations": {"uri": "s3://saes/c", "endpointUrl": "http://127.0.0.1:9000"}})
        assert training_identity(plain) != training_identity(elsewhere)
