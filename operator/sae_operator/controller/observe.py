"""Turns what the store knows of a key into what `reconcile` takes."""

from __future__ import annotations

from sae_operator.api.resources import ACTIVATION_CACHE, SAE_TRAINING_JOB
from sae_operator.controller.queue import Key
from sae_operator.controller.store import Store, StoredResource
from sae_operator.reconcile.names import cache_name_of
from sae_operator.reconcile.observed import (
    CacheFacts,
    Defaults,
    InvalidSpec,
    ObservedCache,
    ObservedTrainingJob,
    OwnerFacts,
)
from sae_operator.reconcile.sweep_observed import ObservedSweep
from sae_operator.reconcile.sweep_trials import Outline


def observe_cache(store: Store, stored: StoredResource, defaults: Defaults) -> ObservedCache:
    children = store.children(stored.metadata.uid)
    return ObservedCache(
        metadata=stored.metadata,
        spec=store.spec_of(stored),
        status=store.status_of(stored),
        owners=tuple(_owner(store, stored.key.namespace, name, uid) for name, uid in stored.owners),
        defaults=defaults,
        jobs=tuple(children.jobs.values()),
        pods=children.pods,
        progress=dict(children.progress),
        unreachable=dict(children.unreachable),
        pods_listed=children.pods_listed,
    )


def observe_training_job(store: Store, stored: StoredResource, defaults: Defaults) -> ObservedTrainingJob:
    children, spec = store.children(stored.metadata.uid), store.spec_of(stored)
    cache_name = None if isinstance(spec, InvalidSpec) else cache_name_of(spec)
    return ObservedTrainingJob(
        metadata=stored.metadata,
        spec=spec,
        status=store.status_of(stored),
        cache=_cache(store, stored.key.namespace, cache_name) if cache_name else None,
        defaults=defaults,
        jobs=tuple(children.jobs.values()),
        pods=children.pods,
        progress=dict(children.progress),
        unreachable=dict(children.unreachable),
        pods_listed=children.pods_listed,
    )


def observe_sweep(
    store: Store, stored: StoredResource, outline: Outline | InvalidSpec | None, defaults: Defaults
) -> ObservedSweep:
    children = store.children(stored.metadata.uid)
    return ObservedSweep(
        metadata=stored.metadata,
        spec=store.spec_of(stored),
        status=store.status_of(stored),
        outline=outline,
        training_jobs=store.trial_jobs(stored.metadata.uid),
        defaults=defaults,
        jobs=tuple(children.jobs.values()),
        pods=children.pods,
        progress=dict(children.progress),
        unreachable=dict(children.unreachable),
        pods_listed=children.pods_listed,
    )


def _owner(store: Store, namespace: str, name: str, uid: str) -> OwnerFacts:
    owner = store.get(Key(SAE_TRAINING_JOB.kind, namespace, name))
    if owner is None or owner.metadata.uid != uid:
        return OwnerFacts(name, uid, finished=True)
    return OwnerFacts(name, uid, suspended=owner.suspended, finished=owner.finished)


def _cache(store: Store, namespace: str, name: str) -> CacheFacts | None:
    cache = store.get(Key(ACTIVATION_CACHE.kind, namespace, name))
    if cache is None:
        return None
    return CacheFacts(
        name=name,
        uid=cache.metadata.uid,
        generation=cache.metadata.generation,
        spec=store.spec_of(cache),
        status=store.status_of(cache),
        owner_uids=frozenset(uid for _, uid in cache.owners),
        deleting=cache.metadata.deleting,
    )
