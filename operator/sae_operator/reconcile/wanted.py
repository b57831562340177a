"""What a reconcile answers: the shell applies it, in the order of the fields, and may stop after any call.

Order matters for a process that dies between two calls: children before the status that tells of them (their names are
deterministic, so the next reconcile finds them), the status before Jobs are deleted (so that a Job that we ended is
never taken for one that a user deleted).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class CacheApplication:
    """An ActivationCache to apply server-side, with `force`; the answer must be fed back into the store.

    Attributes:
        manifest: apiVersion, kind, metadata (with this owner's ownerReference alone) and full spec.
        field_manager: one per owner: with one manager for all, an apply would drop the earlier owner's reference.
    """

    manifest: dict[str, Any]
    field_manager: str


@dataclass(frozen=True)
class EventWanted:
    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class TrainingJobPatch:
    """Changes of an SAETrainingJob of a sweep.

    Attributes:
        uid: its UID: another one of its name is left alone.
        changes: path below `spec` and value of each field; a mapping replaces the one that is there.
        annotations: to set, or (None) to remove.
    """

    name: str
    uid: str
    changes: tuple[tuple[tuple[str, ...], Any], ...]
    annotations: Mapping[str, str | None]


@dataclass(frozen=True)
class Wanted:
    """What should be.

    Attributes:
        apply_cache: an inline cache to create, join, extend or re-arm.
        patch_training_jobs: changes of a sweep's training jobs; each answer must be fed back into the store.
        create: manifests of ConfigMaps, Services, Jobs and SAETrainingJobs, in order. AlreadyExists is fine when the
            object's controller is our resource: a ConfigMap's `data` is then replaced, a Service left as it is, and so
            is a Job or an SAETrainingJob, which is fed back into the store.
        status: the whole status; it replaces the stored one, and is written only when it differs.
        events: to post on the resource, after the status.
        delete_objects: kind and name of ConfigMaps and Services to delete, before the Jobs: as long as a Job is there,
            an operator that starts anew knows that something is left to delete.
        delete_jobs: names of Jobs to delete with propagationPolicy Foreground (the Job stays until its pods have ended,
            so that two attempts never write at once).
        delete_training_jobs: names and UIDs of SAETrainingJobs of a sweep to delete.
        requeue_after: seconds until the resource is looked at again in any case; None when only a change can matter.
        poll_pods: list this resource's pods, and poll the running ones' progress, before it is looked at again.
    """

    apply_cache: CacheApplication | None = None
    patch_training_jobs: tuple[TrainingJobPatch, ...] = ()
    create: tuple[dict[str, Any], ...] = ()
    status: dict[str, Any] = field(default_factory=dict)
    events: tuple[EventWanted, ...] = ()
    delete_objects: tuple[tuple[str, str], ...] = ()
    delete_jobs: tuple[str, ...] = ()
    delete_training_jobs: tuple[tuple[str, str], ...] = ()
    requeue_after: float | None = None
    poll_pods: bool = False
