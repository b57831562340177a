"""What a manifest records of the spec: what determines the rows, and nobody's credentials."""

from __future__ import annotations

from sae_job.steps.finalize import recorded_spec
from sae_operator.api.activation_cache import ActivationCacheSpec


def test_it_tells_where_model_and_text_lie_and_not_who_opens_them() -> None:
    access = {"endpointUrl": "https://store", "region": "eu-1", "secretRef": {"name": "ours"}}
    spec = ActivationCacheSpec.model_validate(
        {
            "model": {"name": "s3://models/small", "store": access},
            "dataset": {"path": "s3://texts/english", "store": {"secretRef": {"name": "texts"}}},
            "hooks": [{"name": "z", "headIndex": 3}],
            "tokens": 1000,
            "storage": {"uri": "s3://saes/caches", **access},
        }
    )
    recorded = recorded_spec(spec, ["z:3", "a.0"])
    assert recorded["model"]["store"] == {"endpointUrl": "https://store"}
    assert "store" not in recorded["dataset"]
    assert not recorded["storage"].keys() & access.keys()
    assert recorded["hooks"] == [{"name": "z", "headIndex": 3}, {"name": "a.0"}]
    assert not recorded.keys() & {"tokens", "run", "parallelism"}
