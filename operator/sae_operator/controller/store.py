"""What was observed, as slim projections: a resource is a few fields and two JSON texts, a Job is its `JobFacts`.

Everything that arrives, by a watch or as the answer to an own write, goes through `put_*`, which refuses what is older
than what is known, and returns the keys that should be looked at because of it.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json, to_json

from sae_operator.api.problems import describe_errors
from sae_operator.api.resources import ACTIVATION_CACHE, KINDS, SAE_SWEEP, SAE_TRAINING_JOB
from sae_operator.api.steps import Progress
from sae_operator.controller.queue import Key
from sae_operator.reconcile import projection
from sae_operator.reconcile.observed import InvalidSpec, JobFacts, Metadata, PodFacts, SpecProblem
from sae_operator.reconcile.sweep_observed import TrialJobFacts, sweep_of, trial_job_facts

# Parsed specs that are kept: a resource is read a few times while its Jobs are made, and hardly ever afterwards.
PARSED_SPECS = 128
# UIDs of deleted objects that are remembered, so that a late answer to an own write does not bring one back.
TOMBSTONES = 4096
FINISHED_PHASES = frozenset({"Succeeded", "Failed"})


@dataclass(slots=True)
class StoredResource:
    """One resource.

    Attributes:
        version: resourceVersion.
        owners: (name, UID) of the SAETrainingJobs in the ownerReferences.
        spec, status: as compact JSON; a tenth of the memory of the parsed objects.
        cache_ref: name of the cache that a training job reads.
        sweep: UID of the sweep that a training job belongs to.
    """

    key: Key
    metadata: Metadata
    version: int
    owners: tuple[tuple[str, str], ...]
    spec: bytes
    status: bytes
    suspended: bool
    phase: str | None
    cache_ref: str | None
    sweep: str | None

    @property
    def finished(self) -> bool:
        return self.phase in FINISHED_PHASES

    def status_manifest(self) -> dict[str, Any]:
        return from_json(self.status)


@dataclass(slots=True)
class Offspring:
    """Children of one UID.

    Attributes:
        pods_due: a pod has ended since the last listing of all was begun.
        pods_listed: they have been listed at all.
        pods_version: the version of the listing that shows them.
    """

    jobs: dict[str, JobFacts] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    pods: tuple[PodFacts, ...] = ()
    progress: dict[str, Progress] = field(default_factory=dict)
    unreachable: dict[str, str] = field(default_factory=dict)
    pods_due: bool = False
    pods_listed: bool = False
    pods_version: int = 0


class Store:
    """Everything that is known; only ever touched from the event loop."""

    def __init__(self) -> None:
        self._resources: dict[Key, StoredResource] = {}
        self._keys: dict[str, Key] = {}
        self._offspring: dict[str, Offspring] = {}
        self._readers: dict[tuple[str, str], set[Key]] = {}
        self._caches_of: dict[str, set[Key]] = {}
        # Training jobs of each sweep, by their names.
        self._trial_jobs: dict[str, dict[str, TrialJobFacts]] = {}
        self._parsed: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._tombstones: OrderedDict[str, None] = OrderedDict()

    def get(self, key: Key) -> StoredResource | None:
        return self._resources.get(key)

    def children(self, uid: str) -> Offspring:
        """Children of a UID; an empty record when none was seen, and one that nobody keeps when it is gone."""
        return Offspring() if uid in self._tombstones else self._offspring.setdefault(uid, Offspring())

    def __len__(self) -> int:
        return len(self._resources)

    # Resources

    def put_resource(self, kind: str, raw: Mapping[str, Any]) -> set[Key]:
        meta = raw["metadata"]
        key = Key(kind, meta["namespace"], meta["name"])
        old, version = self._resources.get(key), int(meta["resourceVersion"])
        if meta["uid"] in self._tombstones or (old and old.version >= version):
            return set()
        keys = {key}
        if old and old.metadata.uid != meta["uid"]:
            keys |= self.drop_resource(old.metadata.uid)
            old = None
        new = _resource(key, raw, version, old)
        self._resources[key] = new
        self._keys[new.metadata.uid] = key
        if old is None or old.owners != new.owners or old.cache_ref != new.cache_ref:
            self._unlink(old)
            self._link(new)
        if kind == ACTIVATION_CACHE.kind:
            keys |= self.readers_of(new)
        elif old is None or _seen_by_caches(old) != _seen_by_caches(new):
            keys |= self._caches_of.get(new.metadata.uid, set())
        return keys | self._note_trials(old, new, raw)

    def drop_resource(self, uid: str) -> set[Key]:
        """The resource is gone; returns who should hear of it."""
        self._bury(uid)
        key = self._keys.pop(uid, None)
        old = self._resources.get(key) if key else None
        if key is None or old is None or old.metadata.uid != uid:
            return set()
        keys = self.readers_of(old) if key.kind == ACTIVATION_CACHE.kind else set(self._caches_of.get(uid, ()))
        self._unlink(old)
        del self._resources[key]
        self._offspring.pop(uid, None)
        self._trial_jobs.pop(uid, None)
        return keys | self._forget_trials(old)

    def _note_trials(self, old: StoredResource | None, new: StoredResource, raw: Mapping[str, Any]) -> set[Key]:
        """Keeps the facts of a sweep's training job; returns the sweep's key if they have changed."""
        keys = self._forget_trials(old) if old is not None and old.sweep != new.sweep else set()
        # A child that is told of after its sweep was deleted is deleted soon.
        if new.sweep is None or new.sweep in self._tombstones:
            return keys
        jobs = self._trial_jobs.setdefault(new.sweep, {})
        facts, before = trial_job_facts(raw), jobs.get(new.key.name)
        jobs[new.key.name] = facts
        return keys | (self._sweep_keys(new.sweep) if facts != before else set())

    def _forget_trials(self, job: StoredResource) -> set[Key]:
        jobs = self._trial_jobs.get(job.sweep) if job.sweep is not None else None
        if job.sweep is None or jobs is None or jobs.pop(job.key.name, None) is None:
            return set()
        if not jobs:
            del self._trial_jobs[job.sweep]
        return self._sweep_keys(job.sweep)

    def _sweep_keys(self, uid: str) -> set[Key]:
        key = self._keys.get(uid)
        return {key} if key is not None and key.kind == SAE_SWEEP.kind else set()

    def trial_jobs(self, sweep_uid: str) -> tuple[TrialJobFacts, ...]:
        """The training jobs of a sweep."""
        return tuple(self._trial_jobs.get(sweep_uid, {}).values())

    def readers_of(self, cache: StoredResource) -> set[Key]:
        """Training jobs that read a cache: those that refer to it, and those that own it."""
        readers = set(self._readers.get((cache.key.namespace, cache.key.name), ()))
        for name, uid in cache.owners:
            owner = Key(SAE_TRAINING_JOB.kind, cache.key.namespace, name)
            if self._keys.get(uid) == owner:
                readers.add(owner)
        return readers

    def spec_of(self, stored: StoredResource) -> Any:
        """The parsed spec, or an `InvalidSpec`."""
        index = (stored.metadata.uid, stored.metadata.generation)
        parsed = self._parsed.get(index)
        if parsed is None:
            model = KINDS[stored.key.kind].spec
            try:
                parsed = model.model_validate_json(stored.spec)
            except ValidationError as error:
                problems = describe_errors(error, model)
                parsed = InvalidSpec(tuple(SpecProblem(problem.field, problem.message) for problem in problems))
            self._parsed[index] = parsed
            while len(self._parsed) > PARSED_SPECS:
                self._parsed.popitem(last=False)
        return parsed

    def spec_manifest(self, stored: StoredResource) -> dict[str, Any]:
        return from_json(stored.spec)

    def status_of(self, stored: StoredResource) -> Any:
        return KINDS[stored.key.kind].status.model_validate_json(stored.status)

    # Children

    def put_job(self, raw: Mapping[str, Any]) -> tuple[Key | None, bool]:
        """The key of the Job's resource, and whether anything about it changed that a reconcile could see.

        That pods were made means nothing before they are listed, which then leads to a look.
        """
        meta = raw["metadata"]
        uid = parent_uid(meta)
        if uid is None or uid in self._tombstones or meta["uid"] in self._tombstones:
            return None, False
        family, name, version = self.children(uid), meta["name"], int(meta["resourceVersion"])
        if family.versions.get(name, -1) >= version:
            return self._keys.get(uid), False
        facts = projection.job_facts(raw)
        old = family.jobs.get(name)
        family.jobs[name], family.versions[name] = facts, version
        if old is None:
            # A Job that was finished when it was seen first: its pods have never been listed.
            family.pods_due |= facts.finished or facts.failed > 0
        elif (old.succeeded, old.failed, old.finished) != (facts.succeeded, facts.failed, facts.finished):
            family.pods_due = True
        if old is not None and not family.pods and replace(old, active=facts.active) == facts:
            return self._keys.get(uid), False
        return self._keys.get(uid), facts != old

    def drop_job(self, meta: Mapping[str, Any]) -> Key | None:
        self._bury(meta["uid"])
        uid = parent_uid(meta)
        family = self._offspring.get(uid) if uid else None
        if uid is None or family is None:
            return None
        known = family.jobs.get(meta["name"])
        if known is not None and known.uid == meta["uid"]:
            del family.jobs[meta["name"]], family.versions[meta["name"]]
            return self._keys.get(uid)
        return None

    def put_pods(self, uid: str, pods: Iterable[PodFacts], version: int) -> bool:
        """All pods of a UID, as a listing of this version shows them; returns whether anything changed that is worth a
        look. Of two listings that are under way at once the older one may be answered last: it tells nothing, and pods
        are due again."""
        family, fresh = self.children(uid), tuple(sorted(pods, key=lambda pod: pod.name))
        if version < family.pods_version:
            family.pods_due = True
            return False
        family.pods_version = version
        changed = [pod for pod in fresh if not _merely_waits(pod)] != [
            pod for pod in family.pods if not _merely_waits(pod)
        ]
        family.pods, family.pods_listed = fresh, True
        names = {pod.name for pod in fresh}
        family.progress = {name: value for name, value in family.progress.items() if name in names}
        family.unreachable = {name: value for name, value in family.unreachable.items() if name in names}
        return changed

    # Census

    def phases(self) -> Counter[tuple[str, str]]:
        """How many resources there are of each kind and phase."""
        return Counter((key.kind, stored.phase or "Pending") for key, stored in self._resources.items())

    def active_jobs(self) -> Counter[str]:
        """How many Jobs have a pod that is pending or running, by the kind of their resource."""
        found: Counter[str] = Counter()
        for uid, family in self._offspring.items():
            key = self._keys.get(uid)
            if key is not None:
                found[key.kind] += sum(job.active > 0 and not job.finished for job in family.jobs.values())
        return found

    def resource_uids(self, kind: str) -> set[str]:
        return {stored.metadata.uid for key, stored in self._resources.items() if key.kind == kind}

    def knows_job(self, uid: str, parent: str) -> bool:
        """The Job has been seen, now or before it or its resource was deleted."""
        if uid in self._tombstones or parent in self._tombstones:
            return True
        family = self._offspring.get(parent)
        return family is not None and any(facts.uid == uid for facts in family.jobs.values())

    def jobs(self) -> dict[str, tuple[str, str]]:
        """Of every known Job, by its UID: its parent's UID and its name."""
        return {
            facts.uid: (uid, name) for uid, family in self._offspring.items() for name, facts in family.jobs.items()
        }

    def knows(self, uid: str) -> bool:
        """The resource has been seen, now or before it was deleted."""
        return uid in self._keys or uid in self._tombstones

    def drop_unlisted_job(self, parent: str, name: str) -> Key | None:
        family = self._offspring.get(parent)
        if family is None or name not in family.jobs:
            return None
        self._bury(family.jobs[name].uid)
        del family.jobs[name], family.versions[name]
        return self._keys.get(parent)

    def _bury(self, uid: str) -> None:
        self._tombstones[uid] = None
        while len(self._tombstones) > TOMBSTONES:
            self._tombstones.popitem(last=False)

    def _link(self, stored: StoredResource) -> None:
        if stored.cache_ref:
            self._readers.setdefault((stored.key.namespace, stored.cache_ref), set()).add(stored.key)
        for _, uid in stored.owners:
            self._caches_of.setdefault(uid, set()).add(stored.key)

    def _unlink(self, stored: StoredResource | None) -> None:
        if stored is None:
            return
        if stored.cache_ref:
            _discard(self._readers, (stored.key.namespace, stored.cache_ref), stored.key)
        for _, uid in stored.owners:
            _discard(self._caches_of, uid, stored.key)


def _discard(index: dict[Any, set[Key]], at: Any, key: Key) -> None:
    members = index.get(at)
    if members is not None:
        members.discard(key)
        if not members:
            del index[at]


def _merely_waits(pod: PodFacts) -> bool:
    """Nothing can be said of the pod but that it has not started, which is what is taken for granted without one."""
    quiet = pod.waiting_reason in (None, "ContainerCreating", "PodInitializing")
    return pod.phase == "Pending" and quiet and pod.unschedulable is None and not pod.deleting


def _seen_by_caches(stored: StoredResource) -> tuple[bool, bool]:
    return stored.suspended, stored.finished


def _resource(key: Key, raw: Mapping[str, Any], version: int, old: StoredResource | None) -> StoredResource:
    meta, spec, status = projection.metadata(raw), raw.get("spec") or {}, raw.get("status") or {}
    same = old is not None and old.metadata.generation == meta.generation
    # An inline cache has its name from its identity, which the status tells.
    reference = ((spec.get("activations") or {}).get("cacheRef") or {}).get("name") or status.get("cacheName")
    owners = raw["metadata"].get("ownerReferences") or ()
    return StoredResource(
        key=key,
        metadata=meta,
        version=version,
        owners=tuple((owner["name"], owner["uid"]) for owner in owners if owner.get("kind") == SAE_TRAINING_JOB.kind),
        # A spec changes only with its generation.
        spec=old.spec if old is not None and same else _compact(spec),
        status=_compact(status),
        suspended=bool(spec.get("suspend")),
        phase=status.get("phase"),
        cache_ref=reference,
        sweep=sweep_of(raw["metadata"]) if key.kind == SAE_TRAINING_JOB.kind else None,
    )


def _compact(value: Any) -> bytes:
    try:
        return to_json(value)
    except ValueError:
        # Nested too deep for it, as it is for who parses the spec then, which tells so.
        return json.dumps(value).encode()


def parent_uid(meta: Mapping[str, Any]) -> str | None:
    """UID of the resource of ours that controls a Job; a label alone, which anybody may copy, makes it nobody's."""
    for owner in meta.get("ownerReferences") or ():
        if owner.get("controller") and owner.get("kind") in KINDS:
            return owner["uid"]
    return None
