"""The marker of a training job's output: it belongs to one spec, and another's is never overwritten."""

from __future__ import annotations

import json
from typing import Any, Literal

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore, PreconditionFailed
from sae_operator.api.identity import training_identity
from sae_operator.api.steps import TrainStep

MARKER_KEY = "sae-operator.json"
RESULTS_KEY = "results.json"
KIND = "SAETrainingJob"


def claim_output(store: ObjectStore, step: TrainStep) -> Literal["claimed", "resumed"]:
    """Mark an output as this job's; a marker of the same spec is taken over, whichever resource wrote it.

    Returns:
        `claimed` when there was no marker, `resumed` when there was one of the same spec.

    Raises:
        InvalidInput: the output is another job's.
    """
    identity = training_identity(step.spec)
    marker = {"kind": KIND, "uid": step.uid, "namespace": step.namespace, "name": step.name, "specHash": identity}
    data = (json.dumps(marker, sort_keys=True) + "\n").encode()
    try:
        store.put(MARKER_KEY, data, if_absent=True)
    except PreconditionFailed:
        _check_marker(store, identity)
        return "resumed"
    return "claimed"


def _check_marker(store: ObjectStore, identity: str) -> None:
    there = _read(store, MARKER_KEY)
    if there is not None and there.get("kind") == KIND and there.get("specHash") == identity:
        return
    whose = "something else"
    if there is not None and there.get("kind") == KIND:
        whose = f"the job {there.get('namespace')}/{there.get('name')} with another spec"
    elif there is not None and "kind" in there:
        whose = f"an {there['kind']}"
    raise InvalidInput(
        "OutputTaken", f"{store.uri} holds the output of {whose}; choose another uri", field="spec.output.uri"
    )


def finished_results(store: ObjectStore) -> dict[str, Any] | None:
    """What a finished job left in results.json; None when there is none, or it cannot be read."""
    return _read(store, RESULTS_KEY)


def _read(store: ObjectStore, key: str) -> dict[str, Any] | None:
    try:
        value = json.loads(store.get(key))
    except (ObjectNotFound, ValueError):
        return None
    return value if isinstance(value, dict) else None
