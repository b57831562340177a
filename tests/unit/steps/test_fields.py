"""What is wrong with activations is told with its path in the training job."""

from __future__ import annotations

from typing import Any

import pytest

from sae_job.errors import InvalidInput
from sae_job.steps.fields import fields_of_activations
from sae_operator.api.training_job import SAETrainingJobSpec

_SOURCE: dict[str, Any] = {
    "model": {"name": "gpt2"},
    "dataset": {"path": "english"},
    "hooks": [{"name": "transformer.h.7"}],
    "tokens": 1000,
}
LIVE = {"live": _SOURCE}
CACHE = {"cache": {**_SOURCE, "storage": {"uri": "s3://saes/caches"}}}
REFERENCE = {"cacheRef": {"name": "shared"}}
URI = {"uri": "s3://saes/finished"}


def told(activations: dict[str, Any], field: str) -> InvalidInput:
    spec = SAETrainingJobSpec.model_validate(
        {
            "activations": activations,
            "saes": [{"name": "a", "architecture": {"type": "topk", "k": 4}}],
            "output": {"uri": "s3://saes/out"},
        }
    )
    with pytest.raises(InvalidInput) as caught, fields_of_activations(spec):
        raise InvalidInput("Wrong", "lower it", field=field)
    return caught.value


@pytest.mark.parametrize(
    ("activations", "field", "expected"),
    [
        (CACHE, "spec.hooks[0].name", "spec.activations.cache.hooks[0].name"),
        (CACHE, "spec.run.resources.limits.memory", "spec.activations.cache.run.resources.limits.memory"),
        (LIVE, "spec.model.compile", "spec.activations.live.model.compile"),
        (LIVE, "spec.storage.shardBytes", "spec.activations.live.bufferBytes"),
        (LIVE, "spec.run.resources.limits.memory", "spec.run.resources.limits.memory"),
        (REFERENCE, "spec.contextSize", "spec.activations.cacheRef"),
        (URI, "spec.model.name", "spec.activations.uri"),
        (CACHE, "spec.training.learningRate", "spec.training.learningRate"),
        (CACHE, "spec.activations.cache.hooks", "spec.activations.cache.hooks"),
        (CACHE, "", ""),
    ],
)
def test_a_field_of_a_cache_is_told_where_the_job_has_it(
    activations: dict[str, Any], field: str, expected: str
) -> None:
    assert told(activations, field).field == expected


def test_what_stands_in_another_resource_is_told_in_the_message() -> None:
    assert told(REFERENCE, "spec.contextSize").message == "spec.contextSize of ActivationCache 'shared': lower it"
    assert told(URI, "spec.model.name").message == "spec.model.name of the cache: lower it"
    assert told(CACHE, "spec.contextSize").message == "lower it"
