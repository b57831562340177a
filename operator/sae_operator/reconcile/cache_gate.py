"""The gate between a training job and the activations it reads: open, or closed with the reason why.

An inline cache is created, joined, extended or re-armed here, by one server-side apply with a field manager of the
job's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from sae_operator.api.activation_cache import MAX_HOOKS, ActivationCacheSpec, Hook
from sae_operator.api.base import API_VERSION
from sae_operator.api.identity import cache_location, cache_of, inline_cache_name, live_location
from sae_operator.api.resources import ACTIVATION_CACHE, SAE_TRAINING_JOB
from sae_operator.api.status import ActivationCacheStatus, SAETrainingJobStatus
from sae_operator.api.store import StoreLocation
from sae_operator.api.training_job import SAETrainingJobSpec
from sae_operator.reconcile.conditions import READY
from sae_operator.reconcile.diagnosis import Failure
from sae_operator.reconcile.names import LABEL_MANAGED_BY, MANAGED_BY, field_manager, owner_reference
from sae_operator.reconcile.observed import CacheFacts, InvalidSpec, Metadata
from sae_operator.reconcile.projection import parse_time
from sae_operator.reconcile.wanted import CacheApplication, EventWanted


@dataclass(frozen=True)
class Gate:
    """Whether the training may start.

    Attributes:
        open: the activations are there.
        reason, message: why it is closed.
        failure: why it will never open.
        apply_cache, event: what must be done to the inline cache, and what to tell of it.
    """

    open: bool
    reason: str = ""
    message: str = ""
    failure: Failure | None = None
    apply_cache: CacheApplication | None = None
    event: EventWanted | None = None


def activations_of(
    spec: SAETrainingJobSpec, cache: CacheFacts | None, namespace: str
) -> tuple[StoreLocation, ActivationCacheSpec | None] | Gate:
    """Where the activations are (or will be), and the cache's spec where there is one; a closed gate while unknown."""
    source = spec.activations
    if source.uri is not None:
        location = StoreLocation(
            uri=source.uri, endpoint_url=source.endpoint_url, region=source.region, secret_ref=source.secret_ref
        )
        return location, None
    if source.cache is not None:
        return cache_location(source.cache, namespace), source.cache
    if source.live is not None:
        return live_location(spec), cache_of(spec)
    name = source.cache_ref.name if source.cache_ref is not None else ""
    if cache is None:
        return Gate(
            False, "CacheNotFound", f"waits for ActivationCache {name}, which does not exist in namespace {namespace}"
        )
    if isinstance(cache.spec, InvalidSpec):
        return Gate(
            False, "CacheInvalid", f"waits for ActivationCache {name}, whose spec is invalid: {cache.spec.message}"
        )
    return cache_location(cache.spec, namespace), cache.spec


def cache_gate(
    spec: SAETrainingJobSpec, cache: CacheFacts | None, metadata: Metadata, previous: SAETrainingJobStatus
) -> Gate:
    """Whether a job may train, once its preflight has succeeded."""
    if spec.activations.uri is not None or spec.activations.live is not None:
        return Gate(True)
    if spec.activations.cache is not None:
        return _inline_gate(spec.activations.cache, cache, metadata, previous)
    if cache is None or isinstance(cache.spec, InvalidSpec):
        unknown = activations_of(spec, cache, metadata.namespace)
        return unknown if isinstance(unknown, Gate) else Gate(False, "CacheNotFound", "waits for its ActivationCache")
    status = cache.status
    if status.phase == "Ready" and status.observed_generation == cache.generation:
        return Gate(True)
    if has_failed(cache):
        message = f"ActivationCache {cache.name} failed: {_told(cache)}; this job starts when it is Ready"
        return Gate(False, "CacheFailed", message)
    return Gate(False, "WaitingForCache", _waits(cache))


def has_failed(cache: CacheFacts) -> bool:
    """Whether a cache has failed and nothing has re-armed it."""
    status, spec = cache.status, cache.spec
    if status.phase != "Failed" or isinstance(spec, InvalidSpec):
        return False
    keys = {hook.key for hook in spec.hooks}
    more = spec.tokens > (status.observed_tokens or 0) or not keys <= set(status.observed_hooks or keys)
    return spec.retry <= (status.observed_retry or 0) and not more


def _inline_gate(
    mine: ActivationCacheSpec, cache: CacheFacts | None, metadata: Metadata, previous: SAETrainingJobStatus
) -> Gate:
    name = inline_cache_name(mine)
    if cache is None:
        event = EventWanted("Normal", "CacheCreated", f"asked for ActivationCache {name}")
        return Gate(
            False,
            "WaitingForCache",
            f"waits for ActivationCache {name}",
            apply_cache=_application(name, mine, metadata),
            event=event,
        )
    if cache.deleting:
        return Gate(
            False, "CacheDeleting", f"waits for ActivationCache {name} to be deleted, and asks for it again then"
        )
    if isinstance(cache.spec, InvalidSpec):
        return Gate(False, "CacheInvalid", f"the spec of ActivationCache {name} is invalid: {cache.spec.message}")
    status = cache.status
    there = _holds(status, mine)
    failed = has_failed(cache) and not there
    rearm = failed and not _failed_for(cache, metadata.uid, previous)
    if failed and not rearm:
        return Gate(False, failure=Failure("CacheFailed", f"ActivationCache {name} failed: {_told(cache)}"))
    if len(cache.spec.hooks) + len(_missing_hooks(cache.spec, mine)) > MAX_HOOKS:
        message = (
            f"ActivationCache {name} would have more than {MAX_HOOKS} hooks; give the new ones another storage.uri"
        )
        return Gate(False, failure=Failure("TooManyHooks", message))
    application, event = _join(cache, cache.spec, mine, metadata, rearm=rearm)
    if there:
        return Gate(True, apply_cache=application, event=event)
    return Gate(False, "WaitingForCache", _waits(cache), apply_cache=application, event=event)


def _holds(status: ActivationCacheStatus, asked: ActivationCacheSpec) -> bool:
    """Whether what has been finished of a cache is enough, though more may be on its way."""
    hooks = {hook.name for hook in status.hooks or ()}
    enough = (status.tokens or 0) >= asked.tokens and {hook.key for hook in asked.hooks} <= hooks
    return status.manifest_uri is not None and enough


def _missing_hooks(existing: ActivationCacheSpec, asked: ActivationCacheSpec) -> list[Hook]:
    keys = {hook.key for hook in existing.hooks}
    return [hook for hook in asked.hooks if hook.key not in keys]


def _failed_for(cache: CacheFacts, uid: str, previous: SAETrainingJobStatus) -> bool:
    """Whether a cache failed for this job, in this round of its work; an earlier failure is re-armed instead."""
    if uid not in cache.owner_uids:
        return False
    failed, began = parse_time(cache.status.completion_time), parse_time(previous.start_time)
    if failed is None or began is None:
        return previous.phase == "WaitingForCache"
    return failed > began


def _join(
    cache: CacheFacts, existing: ActivationCacheSpec, mine: ActivationCacheSpec, metadata: Metadata, *, rearm: bool
) -> tuple[CacheApplication | None, EventWanted | None]:
    """Become an owner, raise tokens, add hooks, or re-arm; nothing when all is as it should be.

    The spec that exists stays: what differs (run, parallelism, credentials) was the first job's choice. Everything is
    computed from what is observed, so that applying it twice changes nothing.
    """
    joins = metadata.uid not in cache.owner_uids
    added = _missing_hooks(existing, mine)
    extensions = []
    if mine.tokens > existing.tokens:
        extensions.append(f"raises the tokens from {existing.tokens} to {mine.tokens}")
    if added:
        extensions.append(f"adds {', '.join(hook.key for hook in added)}")
    if not (joins or extensions or rearm):
        return None, None
    changes: dict[str, object] = {
        "tokens": max(existing.tokens, mine.tokens),
        "hooks": [*existing.hooks, *added],
    }
    if rearm:
        changes |= {"retry": (cache.status.observed_retry or 0) + 1, "run": mine.run}
        text = "; ".join([f"runs the failed ActivationCache {cache.name} again", *extensions])
        event = EventWanted("Normal", "CacheRetried", text)
    elif extensions:
        text = f"extends ActivationCache {cache.name}: {' and '.join(extensions)}"
        event = EventWanted("Normal", "CacheExtended", text)
    else:
        text = f"shares ActivationCache {cache.name}, which exists already; its run settings and parallelism serve"
        event = EventWanted("Normal", "CacheShared", text)
    return _application(cache.name, existing.model_copy(update=changes), metadata), event


def _application(name: str, spec: ActivationCacheSpec, metadata: Metadata) -> CacheApplication:
    manifest = {
        "apiVersion": API_VERSION,
        "kind": ACTIVATION_CACHE.kind,
        "metadata": {
            "name": name,
            "namespace": metadata.namespace,
            "labels": {LABEL_MANAGED_BY: MANAGED_BY},
            "ownerReferences": [owner_reference(SAE_TRAINING_JOB.kind, metadata, controller=False)],
        },
        "spec": spec.to_manifest(),
    }
    return CacheApplication(manifest, field_manager(metadata.uid))


def _waits(cache: CacheFacts) -> str:
    told = _told(cache)
    return f"waits for ActivationCache {cache.name} ({cache.status.phase or 'Pending'}){f': {told}' if told else ''}"


def _told(cache: CacheFacts) -> str:
    """What the cache's Ready condition says."""
    return next((c.message for c in cache.status.conditions or () if c.type == READY), "")
