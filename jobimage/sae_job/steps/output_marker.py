"""The marker of a training job's output: it belongs to one spec, and another's is never overwritten."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore, PreconditionFailed
from sae_operator.api.identity import determining
from sae_operator.api.steps import ExitCode, SaeProgress, StepResult, TrainStep

MARKER_KEY = "sae-operator.json"
RESULTS_KEY = "results.json"
KIND = "SAETrainingJob"
ACTIVATIONS = "spec.activations"
# Of a value in a message.
MOST_SHOWN = 60


def check_output(store: ObjectStore, step: TrainStep) -> bool:
    """Whether an output carries this job's marker; nothing is written.

    A marker of the same spec is this job's, whichever resource wrote it.

    Raises:
        InvalidInput: the output is another job's, or holds results without a marker.
    """
    try:
        data = store.get(MARKER_KEY)
    except ObjectNotFound:
        if store.head(RESULTS_KEY) is not None:
            raise _taken(store, f"something else ({RESULTS_KEY} without our marker)") from None
        return False
    marker = _parse(data) or {}
    if marker.get("kind") != KIND:
        raise _taken(store, f"an {marker['kind']}" if "kind" in marker else "something else")
    if marker.get("specHash") != step.training_identity:
        raise _other_spec(store, step, marker)
    return True


def _other_spec(store: ObjectStore, step: TrainStep, marker: Mapping[str, Any]) -> InvalidInput:
    """What to tell of an output whose job has another spec: of a job of the same name, what was changed."""
    whose = f"the job {marker.get('namespace')}/{marker.get('name')} with another spec"
    fix = f"; if that job is gone for good, delete what is there, {MARKER_KEY} included"
    before = marker.get("spec")
    same_job = (marker.get("namespace"), marker.get("name")) == (step.namespace, step.name)
    changed = first_difference(before, determining(step.spec)) if same_job and isinstance(before, Mapping) else None
    if changed is None:
        return _taken(store, whose, fix=fix)
    field, was, now = changed
    # A cache is told by its identity.
    values = "differs from" if field == ACTIVATIONS else f"is {_shown(now)}, and {_shown(was)} in"
    return InvalidInput(
        "OutputTaken", f"{values} {store.uri}: set it back, or choose another output.uri{fix}", field=field
    )


def first_difference(before: Any, now: Any, path: str = "spec") -> tuple[str, Any, Any] | None:
    """Where two documents of `determining` differ first, and what each of them says there; None for what is left
    out."""
    if before == now:
        return None
    if path != ACTIVATIONS:
        pairs: list[tuple[str, Any, Any]] = []
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            pairs = [(f"{path}.{key}", before.get(key), now.get(key)) for key in sorted({*before, *now})]
        elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
            pairs = [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(before, now, strict=True))]
        for below, was, becomes in pairs:
            if was != becomes:
                return first_difference(was, becomes, below)
    return path, before, now


def _shown(value: Any) -> str:
    text = "left out" if value is None else json.dumps(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def claim_output(store: ObjectStore, step: TrainStep) -> Literal["claimed", "resumed"]:
    """Mark an output as this job's.

    Returns:
        `claimed` when there was no marker, `resumed` when there was one of the same spec.

    Raises:
        InvalidInput: as `check_output`.
    """
    if check_output(store, step):
        return "resumed"
    marker = {
        "kind": KIND,
        "uid": step.uid,
        "namespace": step.namespace,
        "name": step.name,
        "specHash": step.training_identity,
        "spec": determining(step.spec),
    }
    try:
        store.put(MARKER_KEY, (json.dumps(marker, sort_keys=True) + "\n").encode(), if_absent=True)
    except PreconditionFailed:
        # Another job was faster, or our own write was repeated after its answer was lost.
        check_output(store, step)
        return "resumed"
    return "claimed"


def _taken(store: ObjectStore, whose: str, *, fix: str = "") -> InvalidInput:
    return InvalidInput(
        "OutputTaken", f"{store.uri} holds the output of {whose}; choose another uri{fix}", field="spec.output.uri"
    )


def finished_results(store: ObjectStore) -> dict[str, Any] | None:
    """What a finished job left in results.json; None when there is none, or it is damaged."""
    try:
        results = _parse(store.get(RESULTS_KEY))
    except ObjectNotFound:
        return None
    return results if results is not None and {"tokens", "saes"} <= results.keys() else None


def result_of(step: str, results: Mapping[str, Any], *, adopted: bool) -> StepResult:
    """The result of a step that ends with these results of a finished job."""
    failed = [sae["name"] for sae in results["saes"] if sae["phase"] == "Failed"]
    told = SaeProgress.model_fields.keys()
    return StepResult(
        step=step,
        exit_code=ExitCode.DONE,
        reason="Completed",
        message=f"failed: {', '.join(failed)}" if failed else "",
        adopted=adopted,
        tokens=results["tokens"],
        tokens_per_second=results.get("tokens_per_second"),
        saes=[SaeProgress(**{key: value for key, value in sae.items() if key in told}) for sae in results["saes"]],
    )


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
