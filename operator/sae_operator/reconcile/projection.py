"""Raw API objects -> facts: the only place that knows the shape of Jobs, pods and ConfigMaps as the API tells them.

Nothing here fails on odd input: a field that is missing or malformed is a fact that is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json

from sae_operator.api.base import MAX_COUNT, EndpointUrl, ObjectName, Region, ShortText
from sae_operator.api.redaction import redact
from sae_operator.api.run_settings import QueueName, StringMap, Toleration
from sae_operator.api.steps import StepResult
from sae_operator.reconcile.names import ANNOTATION_ATTEMPT, ANNOTATION_WORK, LABEL_STEP, STEP_CONTAINER, attempt_of
from sae_operator.reconcile.observed import Defaults, JobFacts, Metadata, PodFacts

ANNOTATION_COMPLETION_INDEX = "batch.kubernetes.io/job-completion-index"
LABEL_JOB_NAME = "batch.kubernetes.io/job-name"
# What is kept of text that is not ours, in messages that people read.
MAX_TEXT = 1000

Message = TypeVar("Message", bound=BaseModel)

_NODE_SELECTOR = TypeAdapter(StringMap)
_TOLERATIONS = TypeAdapter(list[Toleration])
# What the field of a resource that a default stands for would take.
_TEXTS = {
    "endpointUrl": TypeAdapter[str](EndpointUrl),
    "region": TypeAdapter[str](Region),
    "secretName": TypeAdapter[str](ObjectName),
    "image": TypeAdapter[str](ShortText),
    "queueName": TypeAdapter[str](QueueName),
}


def parse_time(text: str | None) -> datetime | None:
    """An RFC 3339 time as the API server writes it; None when there is none."""
    if not text:
        return None
    try:
        parsed = datetime.fromisoformat(text)
        return parsed.astimezone(UTC) if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def metadata(raw: Mapping[str, Any]) -> Metadata:
    """`metadata` of one of our resources."""
    found = raw["metadata"]
    return Metadata(
        name=found["name"],
        namespace=found["namespace"],
        uid=found["uid"],
        generation=int(found.get("generation") or 0),
        deleting=bool(found.get("deletionTimestamp")),
    )


def job_facts(raw: Mapping[str, Any]) -> JobFacts:
    """Facts of a Job that one of our resources controls."""
    found = raw["metadata"]
    status = raw.get("status") or {}
    annotations = found.get("annotations") or {}
    conditions = {
        condition.get("type"): condition
        for condition in status.get("conditions") or []
        if condition.get("status") == "True"
    }
    complete, failed = conditions.get("Complete"), conditions.get("Failed")
    ended = complete or failed or {}
    attempt = annotations.get(ANNOTATION_ATTEMPT, "")
    return JobFacts(
        name=found["name"],
        uid=found.get("uid", ""),
        step=(found.get("labels") or {}).get(LABEL_STEP, ""),
        attempt=int(attempt) if attempt.isdecimal() else attempt_of(found["name"]),
        work=annotations.get(ANNOTATION_WORK, ""),
        active=int(status.get("active") or 0),
        succeeded=int(status.get("succeeded") or 0),
        failed=int(status.get("failed") or 0),
        complete=complete is not None,
        failed_reason=failed.get("reason", "Failed") if failed else None,
        failed_message=failed.get("message", "") if failed else None,
        finish_time=parse_time(status.get("completionTime")) or parse_time(ended.get("lastTransitionTime")),
        suspended=bool((raw.get("spec") or {}).get("suspend")),
        deleting=bool(found.get("deletionTimestamp")),
        creation_time=parse_time(found.get("creationTimestamp")),
        completions=(raw.get("spec") or {}).get("completions"),
    )


def pod_facts(raw: Mapping[str, Any]) -> PodFacts:
    """Facts of a pod that one of our Jobs made."""
    found = raw["metadata"]
    found_labels = found.get("labels") or {}
    status = raw.get("status") or {}
    container = _named(status.get("containerStatuses"))
    state = container.get("state") or {}
    waiting, terminated = state.get("waiting") or {}, state.get("terminated") or {}
    running, lost = status.get("phase") == "Running" and "running" in state, _is_lost(status)
    message = redact(terminated.get("message") or "")
    result = step_result(message)
    deleting = bool(found.get("deletionTimestamp"))
    index = (found.get("annotations") or {}).get(ANNOTATION_COMPLETION_INDEX, "")
    return PodFacts(
        name=found["name"],
        job_name=found_labels.get(LABEL_JOB_NAME) or found_labels.get("job-name") or _controller(found),
        step=found_labels.get(LABEL_STEP, ""),
        index=int(index) if index.isdecimal() else None,
        phase=status.get("phase") or "Pending",
        ip=status.get("podIP") or None,
        node=(raw.get("spec") or {}).get("nodeName") or None,
        running=running and not lost and not deleting,
        lost=running and lost and not deleting,
        deleting=deleting,
        deletion_time=parse_time(found.get("deletionTimestamp")),
        start_time=parse_time(status.get("startTime")),
        begin_time=parse_time(((state.get("running") or terminated) or {}).get("startedAt")),
        finish_time=parse_time(terminated.get("finishedAt")),
        waiting_reason=waiting.get("reason"),
        waiting_message=_shortened(waiting.get("message")),
        exit_code=terminated.get("exitCode"),
        oom_killed=terminated.get("reason") == "OOMKilled",
        termination_reason=terminated.get("reason") or status.get("reason"),
        termination_text=_shortened(message if result is None and message else status.get("message")),
        result=result,
        unschedulable=_unschedulable(status),
        disrupted=_condition(status, "DisruptionTarget").get("status") == "True",
        image=_named((raw.get("spec") or {}).get("containers")).get("image"),
    )


def step_result(message: str) -> StepResult | None:
    """The result in a termination message; None when it is none (a cut or foreign text, a log's tail)."""
    return read_message(message, StepResult) if message.lstrip().startswith("{") else None


def read_message(text: str, model: type[Message]) -> Message | None:
    """What a pod says; None where it is something else, or has numbers that no status can hold."""
    try:
        said = from_json(text)
        return model.model_validate(said) if _has_plain_numbers(said) else None
    except ValueError:
        return None


def _has_plain_numbers(said: Any) -> bool:
    """Whether no number is infinite or undefined, and no whole one beyond what every reader of JSON takes."""
    if isinstance(said, float):
        return math.isfinite(said)
    if isinstance(said, int):
        return abs(said) <= MAX_COUNT
    if isinstance(said, Mapping):
        return all(_has_plain_numbers(value) for value in said.values())
    return not isinstance(said, list) or all(_has_plain_numbers(value) for value in said)


def defaults(raw: Mapping[str, Any] | None) -> Defaults:
    """Facts of the ConfigMap `sae-operator-defaults`; what is malformed is left out and told in `problem`."""
    if raw is None:
        return Defaults()
    data: Mapping[str, str] = raw.get("data") or {}
    problems: list[str] = []
    texts = {key: _value(adapter, data, key, None, problems) for key, adapter in _TEXTS.items()}
    node_selector = _value(_NODE_SELECTOR, data, "nodeSelector", {}, problems, read=from_json)
    tolerations = _value(_TOLERATIONS, data, "tolerations", [], problems, read=from_json)
    known = {*_TEXTS, "nodeSelector", "tolerations"}
    unknown = sorted(set(data) - known)
    if unknown:
        problems.append(f"unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return Defaults(
        endpoint_url=texts["endpointUrl"],
        region=texts["region"],
        secret_name=texts["secretName"],
        image=texts["image"],
        queue_name=texts["queueName"],
        node_selector=node_selector,
        tolerations=tuple(toleration.to_manifest() for toleration in tolerations),
        problem="; ".join(problems) or None,
    )


def _value(
    adapter: TypeAdapter[Any],
    data: Mapping[str, str],
    key: str,
    empty: Any,
    problems: list[str],
    *,
    read: Callable[[str], Any] = str,
) -> Any:
    text = data.get(key)
    if not text:
        return empty
    try:
        return adapter.validate_python(read(text))
    except ValueError as error:
        problems.append(f"{key} is not what it should be: {_shortened(_said_by(error))}")
        return empty


def _said_by(error: ValueError) -> str:
    """What is wrong with a value, without pydantic's own words around it."""
    if not isinstance(error, ValidationError):
        return f"no JSON ({error})"
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(": ".join([*map(str, problem["loc"]), problem["msg"]]) for problem in found)


def _named(containers: Any) -> Mapping[str, Any]:
    found = [container for container in containers or [] if container.get("name") == STEP_CONTAINER]
    return found[0] if found else {}


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    found = [condition for condition in status.get("conditions") or [] if condition.get("type") == kind]
    return found[0] if found else {}


def _is_lost(status: Mapping[str, Any]) -> bool:
    """Whether the node controller has taken the pod for not ready, since its node does not answer. A kubelet gives a
    reason when it does so, and the node controller gives none."""
    ready = _condition(status, "Ready")
    says_nothing = ready.get("status") == "False" and not ready.get("reason")
    return says_nothing and _condition(status, "ContainersReady").get("status") == "True"


def _unschedulable(status: Mapping[str, Any]) -> str | None:
    condition = _condition(status, "PodScheduled")
    if condition.get("status") == "False" and condition.get("reason") == "Unschedulable":
        return _shortened(condition.get("message")) or "no node fits"
    return None


def _controller(found: Mapping[str, Any]) -> str:
    names = [reference["name"] for reference in found.get("ownerReferences") or [] if reference.get("controller")]
    return names[0] if names else ""


def _shortened(text: str | None) -> str | None:
    """The end of a text, which in a log or an error is what matters, on one line."""
    if not text:
        return None
    line = redact(" ".join(text.split()))
    return line if len(line) <= MAX_TEXT else f"...{line[-MAX_TEXT:]}"
