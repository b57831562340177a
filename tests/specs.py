"""Small valid specs of each kind, and edits of them, for tests that break one thing at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from sae_operator.api.base import API_VERSION, ApiModel
from sae_operator.api.resources import ACTIVATION_CACHE, SAE_SWEEP, SAE_TRAINING_JOB
from sae_operator.api.schema import models_in

CACHE_SPEC: dict[str, Any] = {
    "model": {"name": "gpt2"},
    "dataset": {"path": "some/text"},
    "hooks": [{"name": "transformer.h.7"}],
    "tokens": 1000,
    "storage": {"uri": "s3://saes/caches"},
}
JOB_SPEC: dict[str, Any] = {
    "activations": {"cache": CACHE_SPEC},
    "saes": [{"name": "k32", "architecture": {"type": "topk", "k": 32}, "dSae": 1024}],
    "output": {"uri": "s3://saes/out"},
}
SWEEP_SPEC: dict[str, Any] = {
    "template": JOB_SPEC,
    "space": {"parameters": [{"path": "saes[0].architecture.k", "values": [16, 32]}]},
}
SPECS: dict[str, dict[str, Any]] = {
    ACTIVATION_CACHE.kind: CACHE_SPEC,
    SAE_TRAINING_JOB.kind: JOB_SPEC,
    SAE_SWEEP.kind: SWEEP_SPEC,
}

# As the value of an edit: the field is taken away.
REMOVED = object()

# Path (`saes.0.architecture.k`) -> new value.
Edits = Mapping[str, Any]


def edited(spec: Mapping[str, Any], edits: Edits) -> dict[str, Any]:
    """A copy of a spec with fields set or removed; objects on the way are made."""
    result: dict[str, Any] = copy.deepcopy(dict(spec))
    for path, value in edits.items():
        *parents, last = path.split(".")
        at: Any = result
        for parent in parents:
            at = at[int(parent)] if isinstance(at, list) else at.setdefault(parent, {})
        if value is REMOVED:
            del at[last]
        else:
            at[last] = copy.deepcopy(value)
    return result


def live_activations(edits: Edits | None = None) -> dict[str, Any]:
    """`activations` of a job whose model runs beside the training, with edits of its source."""
    return {"live": edited({key: value for key, value in CACHE_SPEC.items() if key != "storage"}, edits or {})}


def all_models(model: type[BaseModel]) -> Iterator[type[ApiModel]]:
    """A spec's model and all that it is made of."""
    assert issubclass(model, ApiModel)
    yield model
    for field in model.model_fields.values():
        for nested in models_in(field.annotation):
            yield from all_models(nested)


def manifest(kind: str, edits: Edits | None = None, *, name: str = "example") -> dict[str, Any]:
    """A manifest of a kind with an edited spec."""
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": {"name": name},
        "spec": edited(SPECS[kind], edits or {}),
    }
