"""Settings that are valid and end badly are told, with what to write instead; good ones are not."""

from __future__ import annotations

from typing import Any

import pytest

from sae_job.steps.advice import advice_for_cache, advice_for_job
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.specs import CACHE_SPEC, JOB_SPEC, Edits, edited

_SAE = "saes.0"
_ARCHITECTURE = f"{_SAE}.architecture"
_STANDARD: dict[str, Any] = {"type": "standard", "l1Coefficient": 5}
_WANDB_KEY = {"name": "WANDB_API_KEY", "secretKeyRef": {"name": "wandb", "key": "key"}}

CASES: list[tuple[Edits, str, str, Edits]] = [
    (
        {"activations.cache.sampling": {"maxNormRatio": 0}, "activations.cache.storage.dtype": "int8"},
        "spec.activations.cache.sampling.maxNormRatio",
        "int8 cannot hold them",
        {"activations.cache.storage.dtype": "int8"},
    ),
    (
        {"activations.cache.sampling": {"maxNormRatio": 0}},
        "spec.activations.cache.sampling.maxNormRatio",
        "a handful of tokens",
        {},
    ),
    (
        {"training": {"tokens": 5000}, "activations.cache.tokens": 1000},
        "spec.training.tokens",
        "5 passes",
        {"training": {"tokens": 4000}, "activations.cache.tokens": 1000},
    ),
    (
        {"training": {"learningRate": 0.1}},
        "spec.training.learningRate",
        "diverge",
        {"training": {"learningRate": 0.01}},
    ),
    (
        {f"{_SAE}.training": {"learningRate": 0.1}},
        "spec.saes[0].training.learningRate",
        "diverge",
        {f"{_SAE}.training": {"learningRate": 0.01}},
    ),
    (
        {"evaluation": {"heldOutTokens": 0}},
        "spec.evaluation.heldOutTokens",
        "no figures",
        {"evaluation": {"heldOutTokens": 1}},
    ),
    (
        {"parallelism": 4, "training": {"batchSize": 512}},
        "spec.parallelism",
        "128 rows to each of 4 pods",
        {"parallelism": 2, "training": {"batchSize": 512}},
    ),
    (
        {"wandb": {"project": "p"}},
        "spec.run.env",
        "WANDB_API_KEY",
        {"wandb": {"project": "p"}, "run.env": [_WANDB_KEY]},
    ),
    (
        {
            _ARCHITECTURE: {**_STANDARD, "scaleSparsityPenaltyByDecoderNorm": False},
            f"{_SAE}.normalizeDecoder": False,
        },
        "spec.saes[0].architecture.scaleSparsityPenaltyByDecoderNorm",
        "vanishes without sparsity",
        {_ARCHITECTURE: {**_STANDARD, "scaleSparsityPenaltyByDecoderNorm": False}},
    ),
    (
        {f"{_ARCHITECTURE}.auxKCoefficient": 0},
        "spec.saes[0].architecture.auxKCoefficient",
        "dead latents dead",
        {f"{_ARCHITECTURE}.auxKCoefficient": 0.03125},
    ),
    (
        {f"{_ARCHITECTURE}.k": 32, f"{_SAE}.dSae": 127},
        "spec.saes[0].architecture.k",
        "hardly sparse",
        {f"{_ARCHITECTURE}.k": 32, f"{_SAE}.dSae": 128},
    ),
    (
        {_ARCHITECTURE: {"type": "jumprelu", "l0Coefficient": 1, "l0WarmUpSteps": 5}, "normalization": "none"},
        "spec.normalization",
        "scaled activations",
        {
            _ARCHITECTURE: {
                "type": "jumprelu",
                "l0Coefficient": 1,
                "l0WarmUpSteps": 5,
                "bandwidth": 1,
                "initialThreshold": 1,
            },
            "normalization": "none",
        },
    ),
]


def job(edits: Edits) -> SAETrainingJobSpec:
    return SAETrainingJobSpec.model_validate(edited(JOB_SPEC, edits))


@pytest.mark.parametrize(("edits", "field", "told", "well"), CASES, ids=[case[1] + case[2][:12] for case in CASES])
def test_a_bad_setting_is_told_and_a_good_one_is_not(edits: Edits, field: str, told: str, well: Edits) -> None:
    (warning,) = advice_for_job(job(edits))
    assert warning.field == field
    assert told in warning.message
    assert str(warning).startswith(f"{field}: ")
    assert advice_for_job(job(well)) == []


def test_a_job_with_defaults_gets_no_advice() -> None:
    assert advice_for_job(job({})) == []


def test_caches_of_their_own_are_looked_at_too() -> None:
    spec = ActivationCacheSpec.model_validate(edited(CACHE_SPEC, {"sampling.maxNormRatio": 0}))
    assert [warning.field for warning in advice_for_cache(spec)] == ["spec.sampling.maxNormRatio"]
