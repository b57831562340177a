"""Applies what `reconcile` wants, call by call, and feeds every answer back into the store.

A process that dies between two calls leaves a state from which the next reconcile goes on: names are deterministic,
creates tolerate what is there already, and nothing is written that is so already.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sae_operator.api.resources import ACTIVATION_CACHE, SAE_TRAINING_JOB
from sae_operator.controller import paths
from sae_operator.controller.client import ApiClient, ApiError, WebhookUnavailable
from sae_operator.controller.events import EventRecorder
from sae_operator.controller.merge import merge_patch
from sae_operator.controller.pods import list_pods
from sae_operator.controller.queue import Key, RetryAfter
from sae_operator.controller.store import Store, StoredResource
from sae_operator.reconcile.names import is_controlled_by
from sae_operator.reconcile.wanted import CacheApplication, EventWanted, TrainingJobPatch, Wanted

logger = logging.getLogger(__name__)

# A refused create (a quota, say) is tried again after this; nothing tells us when its cause is gone.
REFUSED_RETRY_SECONDS = 15.0
# What was written was not up to date, or another write came in between.
CONFLICT_RETRY_SECONDS = 0.5
# Where objects that reconciles want are created.
CHILDREN: dict[str, Callable[[str], str]] = {
    "ConfigMap": paths.config_maps,
    "Service": paths.services,
    "Job": paths.jobs,
    SAE_TRAINING_JOB.kind: functools.partial(paths.resources, SAE_TRAINING_JOB.kind),
}


class Refused(Exception):
    """The API server does not take an object that is wanted; `message` says which and why."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Executor:
    """`look_at` is told which keys an own write concerns."""

    def __init__(
        self, client: ApiClient, store: Store, events: EventRecorder, look_at: Callable[[Iterable[Key]], None]
    ) -> None:
        self._client, self._store, self._events, self._look_at = client, store, events, look_at

    async def execute(self, stored: StoredResource, wanted: Wanted) -> None:
        """Applies `wanted`.

        Raises:
            RetryAfter: an object was refused (status and an event say why), or what was observed was out of date.
            ServerUnavailable: the rest is to be applied by a later reconcile.
        """
        refused: Refused | None = None
        if any(manifest["kind"] == "Job" for manifest in wanted.create):
            await self._confirm_absence(stored)
        try:
            if wanted.apply_cache is not None:
                await self._apply_cache(stored, wanted.apply_cache)
            refused = await self._patch_training_jobs(stored, wanted.patch_training_jobs)
            known = False
            for manifest in wanted.create:
                if known and manifest["kind"] == "Job":
                    # With the ConfigMap its Job may have been made, too, and been deleted since.
                    await self._confirm_no_pod_lives(stored)
                there = await self._create(stored, manifest)
                known = known or (there and manifest["kind"] == "ConfigMap")
        except Refused as error:
            refused = error
        except WebhookUnavailable as error:
            refused = Refused(f"nothing can be created while an admission webhook does not answer: {error}")
        if stored.metadata.deleting or self._latest(stored) is None:
            return
        status = wanted.status if refused is None else _with_refusal(wanted.status, refused.message)
        await self._write_status(stored, status)
        for event in wanted.events:
            await self._events.post(stored.key, stored.metadata.uid, event)
        if refused is not None:
            await self._events.post(
                stored.key, stored.metadata.uid, EventWanted("Warning", "CreateRefused", refused.message)
            )
        for kind, name in wanted.delete_objects:
            await self._delete_object(stored, kind, name)
        for name in wanted.delete_jobs:
            await self._delete_job(stored, name)
        for name, uid in wanted.delete_training_jobs:
            await self._delete_training_job(stored, name, uid)
        if refused is not None:
            raise RetryAfter(REFUSED_RETRY_SECONDS)

    async def look_up_told_job(self, stored: StoredResource) -> None:
        """Learns of the Job that the status of unfinished work tells of, where its watch has not brought it yet: where
        another operator works, too, the watch of resources may be ahead. Else it would be taken for deleted."""
        if stored.finished or stored.phase in (None, "Ready", "Suspended"):
            return
        told, uid = stored.status_manifest().get("jobName"), stored.metadata.uid
        if told is None or told in self._store.children(uid).jobs:
            return
        try:
            job = await self._client.get(f"{paths.jobs(stored.key.namespace)}/{told}")
        except ApiError as error:
            if error.status != 404:
                raise
        else:
            self._store.put_job(job)

    async def _confirm_absence(self, stored: StoredResource) -> None:
        """Before a Job is made in place of one that the status tells of: that one must really be gone. The watch of
        resources may be ahead of that of Jobs, where another operator works, too.

        Raises:
            RetryAfter: it is there, or pods of it are, or the resource has changed.
        """
        told, uid = stored.status_manifest().get("jobName"), stored.metadata.uid
        if told is None or told in self._store.children(uid).jobs:
            return
        try:
            job = await self._client.get(f"{paths.jobs(stored.key.namespace)}/{told}")
        except ApiError as error:
            if error.status != 404:
                raise
        else:
            if self._store.put_job(job) != (None, False):
                raise RetryAfter(0.0)
        before = self._store.get(stored.key)
        await self._refresh(stored)
        if self._store.get(stored.key) is not before:
            raise RetryAfter(0.0)
        await self._confirm_no_pod_lives(stored)

    async def _confirm_no_pod_lives(self, stored: StoredResource) -> None:
        """A Job that somebody deletes is gone before its pods are, which may never have been listed.

        Raises:
            RetryAfter: there are some.
        """
        pods, version = await list_pods(self._client, stored)
        if any(not pod.finished for pod in pods):
            self._store.put_pods(stored.metadata.uid, pods, version)
            raise RetryAfter(CONFLICT_RETRY_SECONDS)

    async def _refresh(self, stored: StoredResource) -> None:
        """Looks the resource up, without waiting for its watch."""
        key = stored.key
        try:
            found = await self._client.get(paths.resource(key.kind, key.namespace, key.name))
        except ApiError as error:
            if error.status != 404:
                raise
            self._look_at({*self._store.drop_resource(stored.metadata.uid), key})
        else:
            self._look_at(self._store.put_resource(key.kind, found) - {key})

    async def _apply_cache(self, stored: StoredResource, application: CacheApplication) -> None:
        name = application.manifest["metadata"]["name"]
        path = paths.resource(ACTIVATION_CACHE.kind, stored.key.namespace, name)
        try:
            answer = await self._client.apply(path, application.manifest, application.field_manager)
        except ApiError as error:
            raise _refusal(error, f"ActivationCache {name}") from error
        self._look_at(self._store.put_resource(ACTIVATION_CACHE.kind, answer) - {stored.key})

    async def _create(self, stored: StoredResource, manifest: Mapping[str, Any]) -> bool:
        """Whether it was there already."""
        kind, name, namespace = manifest["kind"], manifest["metadata"]["name"], stored.key.namespace
        path = CHILDREN[kind](namespace)
        try:
            answer = await self._client.create(path, manifest, metadata_only=kind in ("ConfigMap", "Service"))
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise _refusal(error, f"{kind} {name}") from error
            answer, known = await self._adopt(stored, manifest, f"{path}/{name}"), True
        else:
            known = False
        if kind == "Job":
            self._store.put_job(answer)
        elif kind == SAE_TRAINING_JOB.kind:
            self._look_at(self._store.put_resource(kind, answer) - {stored.key})
        return known

    async def _patch_training_jobs(self, stored: StoredResource, patches: Iterable[TrainingJobPatch]) -> Refused | None:
        """Changes training jobs of a sweep; a refused change is no reason to leave out others."""
        refused: Refused | None = None
        for patch in patches:
            try:
                await self._patch_training_job(stored, patch)
            except Refused as error:
                refused = error
        return refused

    async def _patch_training_job(self, stored: StoredResource, wanted: TrainingJobPatch) -> None:
        """Changes a training job of a sweep; one that is gone by now, the watch tells of."""
        key = Key(SAE_TRAINING_JOB.kind, stored.key.namespace, wanted.name)
        job = self._store.get(key)
        if job is None or job.metadata.uid != wanted.uid:
            return
        spec = changes_of(self._store.spec_manifest(job), wanted.changes)
        body = {"metadata": {"uid": wanted.uid, "annotations": dict(wanted.annotations)}, "spec": spec}
        try:
            answer = await self._client.merge_patch(paths.resource(*key), body)
        except ApiError as error:
            if error.status == 404:
                return
            raise _refusal(error, f"a change of SAETrainingJob {wanted.name}") from error
        self._look_at(self._store.put_resource(key.kind, answer) - {stored.key})

    async def _delete_training_job(self, stored: StoredResource, name: str, uid: str) -> None:
        """Deletes a training job of a sweep, and with it its Jobs and pods; what it wrote to the store stays."""
        try:
            answer = await self._client.delete(paths.resource(SAE_TRAINING_JOB.kind, stored.key.namespace, name), uid)
        except ApiError as error:
            if error.status == 409:
                # Another one by now: the watch tells.
                raise RetryAfter(CONFLICT_RETRY_SECONDS) from error
            if error.status != 404:
                raise
            answer = {}
        if answer.get("kind") == SAE_TRAINING_JOB.kind:
            # A finalizer of somebody's holds it.
            self._store.put_resource(SAE_TRAINING_JOB.kind, answer)
        else:
            self._look_at(self._store.drop_resource(uid) - {stored.key})

    async def _adopt(self, stored: StoredResource, manifest: Mapping[str, Any], path: str) -> dict[str, Any]:
        """What has the wanted name already, if it is ours: made by this operator before it died, or by another one."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        try:
            there = await self._client.get(path)
        except ApiError as error:
            # It was deleted in between.
            raise RetryAfter(CONFLICT_RETRY_SECONDS) if error.status == 404 else error from error
        if not is_controlled_by(there["metadata"], stored.metadata.uid):
            raise Refused(
                f"{kind} {name} exists already and belongs to something else; delete it or rename this resource"
            )
        if kind == "ConfigMap" and there.get("data") != manifest.get("data"):
            try:
                return await self._client.merge_patch(path, {"data": manifest.get("data")})
            except ApiError as error:
                raise _refusal(error, f"{kind} {name}") from error
        return there

    def _latest(self, stored: StoredResource) -> StoredResource | None:
        """The resource as it is now; None when it is gone, also where another one has its name by now."""
        latest = self._store.get(stored.key)
        return latest if latest is not None and latest.metadata.uid == stored.metadata.uid else None

    async def _write_status(self, stored: StoredResource, status: Mapping[str, Any]) -> None:
        key, latest = stored.key, self._latest(stored)
        if latest is None:
            return
        patch = merge_patch(latest.status_manifest(), status)
        if not patch:
            return
        path = paths.resource(key.kind, key.namespace, key.name) + "/status"
        try:
            # With the version, a patch never lands on a status that another operator has written since, nor on a new
            # resource of the same name.
            answer = await self._client.merge_patch(
                path,
                {"metadata": {"uid": latest.metadata.uid, "resourceVersion": str(latest.version)}, "status": patch},
            )
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            logger.info("it has changed or is gone; its status is not written")
            await self._refresh(stored)
            if self._latest(stored) is None:
                return
            raise RetryAfter(CONFLICT_RETRY_SECONDS) from error
        self._look_at(self._store.put_resource(key.kind, answer) - {key})

    async def _delete_object(self, stored: StoredResource, kind: str, name: str) -> None:
        """Deletes a child by its name, which no other resource's child can have."""
        try:
            await self._client.delete(f"{CHILDREN[kind](stored.key.namespace)}/{name}")
        except ApiError as error:
            if error.status != 404:
                raise

    async def _delete_job(self, stored: StoredResource, name: str) -> None:
        job = self._store.children(stored.metadata.uid).jobs.get(name)
        if job is None:
            return
        path = f"{paths.jobs(stored.key.namespace)}/{name}"
        try:
            answer = await self._client.delete(path, job.uid, propagation="Foreground")
        except ApiError as error:
            # Gone: the watch tells.
            if error.status == 404:
                return
            raise RetryAfter(CONFLICT_RETRY_SECONDS) if error.status == 409 else error from error
        if answer.get("kind") == "Job":
            self._store.put_job(answer)


def changes_of(spec: Mapping[str, Any], changes: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """The merge patch of a spec after which each path has its value; a mapping loses what the value does not have."""
    patch: dict[str, Any] = {}
    for (*parents, last), value in changes:
        there: Any = spec
        at = patch
        for part in parents:
            there = there.get(part) or {}
            at = at.setdefault(part, {})
        at.update(merge_patch({last: there[last]} if last in there else {}, {last: value}))
    return patch


def _refusal(error: ApiError, what: str) -> Exception:
    if error.has_cause("NamespaceTerminating"):
        # Nothing to tell and nothing to do: the resource goes with its namespace.
        return RetryAfter(REFUSED_RETRY_SECONDS)
    if error.status == 409:
        # Two writes at once, e.g. to a quota.
        return RetryAfter(CONFLICT_RETRY_SECONDS)
    if error.status in (400, 403, 404, 413, 422):
        return Refused(f"{what} was refused by the API server: {error.message}")
    return error


def _with_refusal(status: Mapping[str, Any], message: str) -> dict[str, Any]:
    """The status with the refusal as the reason why the resource is not Ready."""
    conditions = [
        {**condition, "reason": "CreateRefused", "message": message}
        if condition["type"] == "Ready" and condition["status"] != "True"
        else condition
        for condition in status.get("conditions") or []
    ]
    return {**status, "conditions": conditions}
