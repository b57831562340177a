"""Names, labels and keys: deterministic, so that a restarted operator finds what it made before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae_operator.api.base import API_VERSION, GROUP
from sae_operator.api.identity import canonical_hash, inline_cache_name
from sae_operator.api.training_job import SAETrainingJobSpec
from sae_operator.reconcile.observed import Metadata

MANAGED_BY = "sae-operator"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
# Selects what the operator has made.
OURS = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
LABEL_KIND = f"{GROUP}/kind"
LABEL_NAME = f"{GROUP}/name"
LABEL_UID = f"{GROUP}/uid"
LABEL_STEP = f"{GROUP}/step"
# Kueue's: the LocalQueue that admits a Job.
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
ANNOTATION_ATTEMPT = f"{GROUP}/attempt"
ANNOTATION_WORK = f"{GROUP}/work"
DEFAULTS_CONFIG_MAP = "sae-operator-defaults"
STEP_CONTAINER = "step"


def short_uid(uid: str) -> str:
    """First 8 hex digits of a UID: enough to tell a re-created resource's children from the old one's."""
    return uid.replace("-", "")[:8]


def child_name(metadata: Metadata, step: str, attempt: int) -> str:
    """Name of the Job, and of its ConfigMap, of an attempt (from 1) at a step."""
    return f"{metadata.name}-{short_uid(metadata.uid)}-{step}-{attempt}"


def service_name(metadata: Metadata) -> str:
    """Name of the Service that gives pods that train together their names in DNS. It begins with a letter, which a
    resource's name need not."""
    return f"sae-{metadata.uid}"


def first_pod_host(metadata: Metadata, job_name: str) -> str:
    """Name in DNS, within the namespace, of the first of the pods that train together."""
    return f"{job_name}-0.{service_name(metadata)}"


def attempt_of(job_name: str) -> int:
    """The attempt that a child's name ends with; 0 when it is no child's name."""
    tail = job_name.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else 0


def step_of(job_name: str, metadata: Metadata) -> str | None:
    """The step that a child's name tells; None when the name is not one of the resource's children."""
    prefix = f"{metadata.name}-{short_uid(metadata.uid)}-"
    if not job_name.startswith(prefix) or attempt_of(job_name) == 0:
        return None
    return job_name.removeprefix(prefix).rpartition("-")[0]


def labels(kind: str, metadata: Metadata, step: str) -> dict[str, str]:
    """Labels of Job, pods and ConfigMap; the resource's own labels are never copied."""
    return {
        LABEL_MANAGED_BY: MANAGED_BY,
        LABEL_KIND: kind,
        LABEL_NAME: metadata.name,
        LABEL_UID: metadata.uid,
        LABEL_STEP: step,
    }


def work_key(retry: int, tokens: int, hooks: Sequence[str] = ()) -> str:
    """Key of a round of work: raising `retry` or `tokens`, or adding hooks, begins another one. 0 tokens means all
    that there are; of hooks, whose names are long, a hash stands in the key."""
    parts = [str(retry), str(tokens)]
    return ".".join([*parts, canonical_hash(sorted(hooks))] if hooks else parts)


def owner_reference(kind: str, metadata: Metadata, *, controller: bool) -> dict[str, Any]:
    """An ownerReference to the resource. `blockOwnerDeletion` stays off: deleting must never hang on a child."""
    reference: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": kind,
        "name": metadata.name,
        "uid": metadata.uid,
    }
    if controller:
        reference["controller"] = True
    return reference


def field_manager(uid: str) -> str:
    """Field manager of one owner of an inline cache."""
    return f"{MANAGED_BY}-{short_uid(uid)}"


def cache_name_of(spec: SAETrainingJobSpec) -> str | None:
    """Name of the ActivationCache that a job reads; None when it reads a `uri` or a live source."""
    activations = spec.activations
    if activations.cache_ref is not None:
        return activations.cache_ref.name
    if activations.cache is not None:
        return inline_cache_name(activations.cache)
    return None


def is_controlled_by(child_metadata: Mapping[str, Any], uid: str) -> bool:
    """Whether a child's ownerReferences name the resource as its controller."""
    references = child_metadata.get("ownerReferences") or []
    return any(reference.get("uid") == uid and reference.get("controller") for reference in references)
