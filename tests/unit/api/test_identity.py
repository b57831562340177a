"""What makes two caches, and two training jobs, the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.base import MAX_NAME_LENGTH
from sae_operator.api.identity import (
    cache_identity,
    cache_location,
    cache_of,
    inline_cache_name,
    live_location,
    training_identity,
)
from sae_operator.api.manifest import validate_spec
from sae_operator.api.store import SecretRef
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.specs import CACHE_SPEC, JOB_SPEC, edited, live_activations

_STANDARD = {"type": "standard", "l1Coefficient": 5}
HOOKS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["transformer.h.7", "a.b", "c"])}, optional={"headIndex": st.integers(0, 9)}
    ),
    min_size=1,
    max_size=16,
    unique_by=lambda hook: (hook["name"], hook.get("headIndex")),
)
ACCESS = st.fixed_dictionaries({}, optional={"region": st.just("eu-west-1"), "secretRef": st.just({"name": "a"})})
# Model and text in an object store, so that there is access to be had.
STORED = {"model.name": "s3://models/small", "dataset.path": "s3://texts/english"}
FREE_CACHE_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "tokens": st.integers(1, 2**53),
        "hooks": HOOKS,
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
        "storage.bufferBytes": st.integers(2**29, 2**40),
        "model.store": ACCESS,
        "model.mirror": st.booleans(),
        "model.deviceMap": st.sampled_from(["single", "auto"]),
        "dataset.store": ACCESS,
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


def live_job(edits: dict[str, Any] | None = None) -> SAETrainingJobSpec:
    return job({"activations": live_activations(edits), "output.secretRef": {"name": "s3"}})


class TestCache:
    @given(FREE_CACHE_FIELDS)
    def test_amount_hooks_place_credentials_and_pods_do_not_count(self, edits: dict[str, Any]) -> None:
        assert cache_identity(cache(STORED | edits)) == cache_identity(cache(STORED))

    @pytest.mark.parametrize(
        "edits",
        [
            {"model.name": "s3://models/other"},
            {"model.store": {"endpointUrl": "http://127.0.0.1:9000"}},
            {"model.revision": "main"},
            {"model.loader": "TransformerLens"},
            {"model.loader": "TransformerLens", "model.processing": {"foldLayerNorm": True}},
            {"model.dtype": "float32"},
            {"model.autocast": True},
            {"model.attentionImplementation": "eager"},
            {"model.compile": True},
            {"model.batchSize": 8},
            {"dataset.path": "other/text"},
            {"dataset.store": {"endpointUrl": "http://127.0.0.1:9000"}},
            {"dataset.name": "en"},
            {"dataset.split": "test"},
            {"dataset.revision": "main"},
            {"dataset.dataFiles": ["a.parquet"]},
            {"dataset.column": "body"},
            {"contextSize": 64},
            {"seed": 1},
            {"sampling.prependBos": False},
            {"sampling.separators.beginContext": "none"},
            {"sampling.separators.betweenDocuments": "eos"},
            {"sampling.positions.start": 1},
            {"sampling.positions.stop": -1},
            {"sampling.positions.step": 2},
            {"sampling.excludeSpecialTokens": False},
            {"sampling.excludeTokenIds": [7]},
            {"sampling.maxNormRatio": 0},
            {"storage.dtype": "float32"},
            {"storage.shardBytes": 2**20},
        ],
        ids=lambda edits: "-".join(edits),
    )
    def test_all_that_rows_depend_on_counts(self, edits: dict[str, Any]) -> None:
        assert cache_identity(cache(STORED | edits)) != cache_identity(cache(STORED))

    def test_processing_that_changes_nothing_is_none(self) -> None:
        lens = {"model.loader": "TransformerLens"}
        assert cache_identity(cache({**lens, "model.processing": {"foldLayerNorm": False}})) == cache_identity(
            cache(lens)
        )

    def test_the_same_address_on_another_server_is_another_model(self) -> None:
        servers = [{"model.store": {"endpointUrl": f"http://127.0.0.1:{port}"}} for port in (1, 2)]
        assert len({cache_identity(cache(STORED | server)) for server in servers}) == 2

    def test_a_default_written_out_is_the_same(self) -> None:
        # The API server writes 10 for 10.0.
        written_out = {"sampling": {"prependBos": True, "maxNormRatio": 10}, "model.batchSize": 16, "seed": 0}
        assert cache_identity(cache(written_out)) == cache_identity(cache())

    def test_it_is_the_same_in_every_release(self) -> None:
        # A change here orphans every cache that exists: it needs a new format version.
        assert cache_identity(cache()) == "fc0120ae82d474e2"

    def test_the_location_is_below_the_store_by_namespace_and_identity(self) -> None:
        spec = cache({"storage.uri": "s3://saes/caches/", "storage.secretRef": {"name": "s3"}, "storage.region": "x"})
        location = cache_location(spec, "team-a")
        assert location.uri == f"s3://saes/caches/team-a/{cache_identity(spec)}"
        assert location.secret_ref is not None
        assert (location.secret_ref.name, location.region) == ("s3", "x")

    def test_an_inline_cache_is_named_by_data_and_place(self) -> None:
        assert len(inline_cache_name(cache())) <= MAX_NAME_LENGTH
        assert inline_cache_name(cache()) == inline_cache_name(cache({"tokens": 5, "parallelism": 9}))
        assert inline_cache_name(cache()) == inline_cache_name(cache({"hooks": [{"name": "other"}]}))
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

    @pytest.mark.parametrize(
        ("architecture", "normalizes", "weighted"),
        [({"type": "topk", "k": 8}, True, None), (_STANDARD, False, True), (_STANDARD, False, None)],
        ids=["topk", "standard", "one of two"],
    )
    def test_defaults_of_decoder_norms_may_be_written_out(
        self, architecture: dict[str, Any], normalizes: bool, weighted: bool | None
    ) -> None:
        plain = job({"saes.0.architecture": architecture})
        written = {**architecture, "scaleSparsityPenaltyByDecoderNorm": weighted}
        edits = {"saes.0.architecture": written, "saes.0.normalizeDecoder": normalizes}
        assert training_identity(job(edits)) == training_identity(plain)

    def test_an_unweighted_penalty_and_unit_norm_are_the_same_choice(self) -> None:
        unweighted = {**_STANDARD, "scaleSparsityPenaltyByDecoderNorm": False}
        edits: list[dict[str, Any]] = [
            {"saes.0.architecture": _STANDARD, "saes.0.normalizeDecoder": True},
            {"saes.0.architecture": unweighted},
            {"saes.0.architecture": unweighted, "saes.0.normalizeDecoder": True},
        ]
        assert len({training_identity(job(edit)) for edit in edits}) == 1

    def test_decoder_norms_count(self) -> None:
        unweighted = {**_STANDARD, "scaleSparsityPenaltyByDecoderNorm": False}
        settings: list[dict[str, Any]] = [
            {"saes.0.architecture": _STANDARD},
            {"saes.0.architecture": unweighted, "saes.0.normalizeDecoder": False},
            {"saes.0.architecture": _STANDARD, "saes.0.normalizeDecoder": True},
        ]
        assert len({training_identity(job(edits)) for edits in settings}) == 3

    @pytest.mark.parametrize(
        ("fields", "decoder", "encoder"),
        [
            ({}, "mixed", "scaled_transpose"),
            ({"architecture": _STANDARD}, "heuristic", "transpose"),
            ({"architecture": _STANDARD, "normalizeDecoder": True}, "mixed", "scaled_transpose"),
            ({"architecture": _STANDARD, "targetHook": "transformer.h.7"}, "mixed", "scaled_transpose"),
            ({"architecture": _STANDARD, "initialization.decoder": "mixed"}, "mixed", "scaled_transpose"),
        ],
        ids=["topk", "standard", "standard with unit norm", "standard transcoder", "standard that begins mixed"],
    )
    def test_defaults_of_how_weights_begin_may_be_written_out(
        self, fields: dict[str, Any], decoder: str, encoder: str
    ) -> None:
        plain = {f"saes.0.{name}": value for name, value in fields.items()}
        start = {"decoder": decoder, "encoder": encoder, "decoderBias": "mean"}
        assert training_identity(job({**plain, "saes.0.initialization": start})) == training_identity(job(plain))

    def test_how_weights_begin_counts(self) -> None:
        starts: list[dict[str, Any]] = [
            {},
            {"decoder": "mixed"},
            {"encoder": "scaled_transpose"},
            {"decoder": "mixed", "encoder": "transpose"},
            {"decoderBias": "zeros"},
        ]
        edits: list[dict[str, Any]] = [{"saes.0.architecture": _STANDARD, "saes.0.initialization": s} for s in starts]
        assert len({training_identity(job(edit)) for edit in edits}) == len(starts)

    def test_how_weights_would_begin_does_not_count_where_saved_ones_are_taken(self) -> None:
        saved = {"saes.0.architecture": _STANDARD, "saes.0.startFrom": {"uri": "s3://saes/saved"}}
        start = {"decoder": "mixed", "encoder": "scaled_transpose", "decoderBias": "mean"}
        assert training_identity(job({**saved, "saes.0.initialization": start})) == training_identity(job(saved))

    def test_who_opens_a_finished_cache_does_not_count(self) -> None:
        plain = job({"activations": {"uri": "s3://saes/c"}})
        opened = job({"activations": {"uri": "s3://saes/c", "secretRef": {"name": "s3"}, "region": "x"}})
        assert training_identity(plain) == training_identity(opened)
        elsewhere = job({"activations": {"uri": "s3://saes/c", "endpointUrl": "http://127.0.0.1:9000"}})
        assert training_identity(plain) != training_identity(elsewhere)


class TestHooksAndLiveSources:
    def test_hooks_that_no_sae_is_trained_on_do_not_count(self) -> None:
        more = {"activations.cache.hooks": [{"name": "transformer.h.7"}, {"name": "b"}], "saes.0.hook": "b"}
        on_both = edited(JOB_SPEC, more)
        on_b = edited(JOB_SPEC, {"activations.cache.hooks": [{"name": "b"}], "saes.0.hook": "b"})
        assert training_identity(validate_spec("SAETrainingJob", on_both)) == training_identity(
            validate_spec("SAETrainingJob", on_b)
        )

    def test_what_is_read_from_a_cache_is_not_what_a_live_source_gives(self) -> None:
        assert training_identity(live_job()) != training_identity(job())
        assert training_identity(live_job({"seed": 1})) != training_identity(live_job())
        assert training_identity(live_job({"bufferBytes": 2**30})) != training_identity(live_job())
        assert training_identity(live_job({"dtype": "float32"})) != training_identity(live_job())

    def test_the_rows_of_one_pass_do_not_count(self) -> None:
        assert training_identity(live_job({"tokens": 2000})) == training_identity(live_job())

    def test_a_live_source_is_a_cache_below_the_output_whose_shards_are_tenths_of_the_buffer(self) -> None:
        spec = live_job({"bufferBytes": 2**37, "dtype": "float16", "contextSize": 64, "seed": 3})
        place, source = live_location(spec), cache_of(spec)
        assert (place.uri, place.secret_ref) == ("s3://saes/out/activations", SecretRef(name="s3"))
        assert source is not None
        assert (source.storage.uri, source.storage.secret_ref) == (place.uri, place.secret_ref)
        assert (source.storage.dtype, source.storage.shard_bytes) == ("float16", 2**37 // 10)
        assert (source.context_size, source.seed, source.tokens) == (64, 3, 1000)
        assert [hook.key for hook in source.hooks] == ["transformer.h.7"]

    def test_a_job_that_points_to_a_cache_describes_none(self) -> None:
        assert cache_of(job({"activations": {"uri": "s3://saes/c"}})) is None
        assert cache_of(job({"activations": {"cacheRef": {"name": "c"}}})) is None
        assert cache_of(job()) == cache()
