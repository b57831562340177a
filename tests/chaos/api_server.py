"""The API server as a model in memory, with the semantics that the operator relies on.

Objects are plain JSON with UID, resourceVersion and generation. Creates answer AlreadyExists, deletes keep to their
preconditions, foreground deletion waits for dependents, writes that change nothing make no version, and every change is
told to those who watch. Server-side apply knows the fields of each manager; lists are replaced whole, but
ownerReferences are merged by UID.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from sae_operator.api.base import API_VERSION
from sae_operator.api.resources import KINDS

Object = dict[str, Any]
# Plural, namespace, name.
Place = tuple[str, str, str]

KIND_OF = {
    **{kind.plural: kind.kind for kind in KINDS.values()},
    "jobs": "Job",
    "pods": "Pod",
    "configmaps": "ConfigMap",
    "services": "Service",
    "events": "Event",
    "leases": "Lease",
}
PLURAL_OF = {kind: plural for plural, kind in KIND_OF.items()}
OURS = frozenset(kind.plural for kind in KINDS.values())
FOREGROUND = "foregroundDeletion"
# Small, so that every list has several pages.
LARGEST_PAGE = 3


class Refusal(Exception):
    """An answer that is not 2xx."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message

    def body(self) -> Object:
        return {
            "kind": "Status",
            "status": "Failure",
            "code": self.status,
            "reason": self.reason,
            "message": self.message,
        }


@dataclass(frozen=True)
class Write:
    """One change; `before` is None for a create, `after` None for an object that is gone."""

    version: int
    place: Place
    before: Object | None
    after: Object | None

    @property
    def plural(self) -> str:
        return self.place[0]

    @property
    def type(self) -> str:
        if self.before is None:
            return "ADDED"
        return "DELETED" if self.after is None else "MODIFIED"

    @property
    def object(self) -> Object:
        found = self.after if self.after is not None else self.before
        assert found is not None
        return found


@dataclass
class ApiServer:
    """Objects by place; every stored object is replaced, never changed, so that whoever holds one keeps a snapshot.

    Attributes:
        now: the time of day as the API writes it.
        listeners: called with every change.
        refuses: asked before a create; the message of a refusal (a quota), or None.
    """

    random: Random
    now: Callable[[], str]
    objects: dict[Place, Object] = field(default_factory=dict)
    listeners: list[Callable[[Write], None]] = field(default_factory=list)
    refuses: Callable[[str, Object], str | None] = lambda plural, manifest: None
    version: int = 1000
    _managers: dict[str, dict[str, Object]] = field(default_factory=dict)

    # Reading

    def get(self, plural: str, namespace: str, name: str) -> Object:
        found = self.objects.get((plural, namespace, name))
        if found is None:
            raise Refusal(404, "NotFound", f'{plural} "{name}" not found')
        return found

    def all(self, plural: str, namespace: str | None = None) -> list[Object]:
        """By name, as the API server lists."""
        return [
            found
            for place, found in sorted(self.objects.items())
            if place[0] == plural and namespace in (None, place[1])
        ]

    def page(self, plural: str, namespace: str | None, query: Mapping[str, str]) -> Object:
        """One page of a LIST; `continue` names the object after which the next one begins."""
        items = [
            found
            for found in self.all(plural, namespace)
            if matches(found, query.get("labelSelector"), query.get("fieldSelector"))
        ]
        after = query.get("continue")
        if after:
            items = [found for found in items if _position(found) > after]
        limit = min(int(query.get("limit") or LARGEST_PAGE), LARGEST_PAGE)
        meta: Object = {"resourceVersion": str(self.version)}
        if len(items) > limit:
            meta["continue"] = _position(items[limit - 1])
        return {"kind": f"{KIND_OF[plural]}List", "metadata": meta, "items": items[:limit]}

    # Writing

    def create(self, plural: str, namespace: str, manifest: Object) -> Object:
        name = manifest["metadata"]["name"]
        if (plural, namespace, name) in self.objects:
            raise Refusal(409, "AlreadyExists", f'{plural} "{name}" already exists')
        refusal = self.refuses(plural, manifest)
        if refusal is not None:
            raise Refusal(403, "Forbidden", f'{plural} "{name}" is forbidden: {refusal}')
        made = copy.deepcopy(manifest)
        made["kind"] = KIND_OF[plural]
        made["metadata"] |= {
            "namespace": namespace,
            "uid": str(uuid.UUID(int=self.random.getrandbits(128), version=4)),
            "creationTimestamp": self.now(),
            "generation": 1,
        }
        if plural in OURS:
            made["status"] = {"observedGeneration": -1}
        elif plural in ("jobs", "pods"):
            made["status"] = dict(manifest.get("status") or {})
        return self._store((plural, namespace, name), None, made)

    def merge(self, plural: str, namespace: str, name: str, patch: Object, *, subresource: str | None = None) -> Object:
        """A merge patch of an object (then its status stays) or of its status (then all else stays)."""
        old = self.get(plural, namespace, name)
        uid = (patch.get("metadata") or {}).get("uid")
        if uid is not None and uid != old["metadata"]["uid"]:
            raise Refusal(409, "Conflict", f"Precondition failed: UID in precondition: {uid}")
        version = (patch.get("metadata") or {}).get("resourceVersion")
        if version is not None and version != old["metadata"]["resourceVersion"]:
            raise Refusal(409, "Conflict", "the object has been modified")
        if subresource == "status":
            new = {**old, "status": merged(old.get("status") or {}, patch.get("status") or {})}
        else:
            kept = {"status": old["status"]} if "status" in old else {}
            new = {**merged(old, patch), **kept}
        return self._update((plural, namespace, name), old, new)

    def apply(self, plural: str, namespace: str, name: str, manifest: Object, manager: str) -> Object:
        """Server-side apply, with force."""
        place = (plural, namespace, name)
        old = self.objects.get(place)
        if old is None:
            made = self.create(plural, namespace, {**manifest, "metadata": {**manifest["metadata"], "name": name}})
            self._managers[made["metadata"]["uid"]] = {manager: manifest}
            return made
        managers = self._managers.setdefault(old["metadata"]["uid"], {})
        before = managers.get(manager, {})
        others = [other for who, other in managers.items() if who != manager]
        removed = set_fields(before) - set_fields(manifest) - set().union(*map(set_fields, others))
        new = copy.deepcopy(old)
        for path in removed:
            _take_away(new, path)
        for path, value in _leaves(manifest):
            _set(new, path, copy.deepcopy(value))
        gone = _owner_uids(before) - _owner_uids(manifest) - set().union(*map(_owner_uids, others))
        references = {one["uid"]: one for one in old["metadata"].get("ownerReferences") or [] if one["uid"] not in gone}
        references |= {one["uid"]: one for one in manifest["metadata"].get("ownerReferences") or []}
        if references:
            new["metadata"]["ownerReferences"] = list(references.values())
        managers[manager] = manifest
        return self._update(place, old, new)

    def delete(
        self, plural: str, namespace: str, name: str, *, uid: str | None = None, propagation: str = "Background"
    ) -> Object:
        """Deletes an object, or (in the foreground, or with a grace period) marks it; the answer of the API server."""
        old = self.get(plural, namespace, name)
        if uid is not None and uid != old["metadata"]["uid"]:
            raise Refusal(409, "Conflict", f"Precondition failed: UID in precondition: {uid}")
        graceful = plural == "pods" and (old.get("spec") or {}).get("nodeName") and not ended_pod(old)
        if propagation == "Foreground" or graceful or old["metadata"].get("finalizers"):
            if "deletionTimestamp" in old["metadata"]:
                return old
            finalizers = [FOREGROUND] if propagation == "Foreground" else []
            marked = {**old, "metadata": {**old["metadata"], "deletionTimestamp": self.now()}}
            if finalizers:
                marked["metadata"]["finalizers"] = finalizers
            return self._store((plural, namespace, name), old, marked)
        self.remove((plural, namespace, name))
        return {"kind": "Status", "status": "Success", "details": {"name": name, "uid": old["metadata"]["uid"]}}

    def remove(self, place: Place) -> None:
        """The object is gone."""
        old = self.objects.pop(place, None)
        if old is None:
            return
        self._managers.pop(old["metadata"]["uid"], None)
        self.version += 1
        last = {**old, "metadata": {**old["metadata"], "resourceVersion": str(self.version)}}
        self._tell(Write(self.version, place, last, None))

    def set_status(self, found: Object, **fields: Any) -> Object:
        """What a controller writes: status fields of an object that is still there (else nothing happens)."""
        place = place_of(found)
        old = self.objects.get(place)
        if old is None or old["metadata"]["uid"] != found["metadata"]["uid"]:
            return found
        return self._update(place, old, {**old, "status": {**(old.get("status") or {}), **fields}})

    def _update(self, place: Place, old: Object, new: Object) -> Object:
        if new == old:
            return old
        if new.get("spec") != old.get("spec"):
            new = {**new, "metadata": {**new["metadata"], "generation": old["metadata"]["generation"] + 1}}
        return self._store(place, old, new)

    def _store(self, place: Place, old: Object | None, new: Object) -> Object:
        self.version += 1
        new = {**new, "metadata": {**new["metadata"], "resourceVersion": str(self.version)}}
        self.objects[place] = new
        self._tell(Write(self.version, place, old, new))
        return new

    def _tell(self, write: Write) -> None:
        for listener in list(self.listeners):
            listener(write)


def place_of(found: Object) -> Place:
    return PLURAL_OF[found["kind"]], found["metadata"]["namespace"], found["metadata"]["name"]


def ended_pod(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def ended_job(job: Object) -> bool:
    """It is complete or has failed."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return any(item["type"] in ("Complete", "Failed") and item["status"] == "True" for item in conditions)


def controller_uid(found: Object) -> str | None:
    references = found["metadata"].get("ownerReferences") or []
    return next((one["uid"] for one in references if one.get("controller")), None)


def matches(found: Object, labels: str | None, fields: str | None) -> bool:
    """Label selectors `a=b,c=d`, field selectors `status.phase!=x,…`."""
    there = found["metadata"].get("labels") or {}
    for term in (labels or "").split(","):
        key, _, value = term.partition("=")
        if term and there.get(key) != value:
            return False
    for term in (fields or "").split(","):
        path, _, value = term.partition("!=")
        if term and _at(found, path.split(".")) == value:
            return False
    return True


def merged(old: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    base = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            base.pop(key, None)
        else:
            base[key] = merged(base.get(key), value)
    return base


def without_absent_owners(found: Object, uids: Iterable[str]) -> list[Object]:
    """The ownerReferences to objects that exist."""
    there = set(uids)
    return [one for one in found["metadata"].get("ownerReferences") or [] if one["uid"] in there]


def served_resources() -> Object:
    """Discovery of our group."""
    return {"groupVersion": API_VERSION, "resources": [{"name": plural} for plural in sorted(OURS)]}


def _position(found: Object) -> str:
    return f"{found['metadata']['namespace']}/{found['metadata']['name']}"


def _at(found: Any, path: Iterable[str]) -> Any:
    for part in path:
        found = found.get(part) if isinstance(found, dict) else None
    return found


Path = tuple[str, ...]


def _leaves(manifest: Object) -> list[tuple[Path, Any]]:
    """Fields that an apply sets, but for names, and ownerReferences, which are merged by UID."""
    found: list[tuple[Path, Any]] = []

    def walk(path: Path, value: Any) -> None:
        if path in (("metadata", "ownerReferences"), ("metadata", "name"), ("metadata", "namespace"), ("apiVersion",)):
            return
        if isinstance(value, dict) and value:
            for key, below in value.items():
                walk((*path, key), below)
        elif path != ("kind",):
            found.append((path, value))

    if manifest:
        walk((), manifest)
    return found


def set_fields(manifest: Object) -> set[Path]:
    """Paths of the fields that an apply of the manifest owns."""
    return {path for path, _ in _leaves(manifest)}


def _owner_uids(manifest: Object) -> set[str]:
    return {one["uid"] for one in (manifest.get("metadata") or {}).get("ownerReferences") or []}


def _set(found: Object, path: Path, value: Any) -> None:
    for part in path[:-1]:
        found = found.setdefault(part, {})
    found[path[-1]] = value


def _take_away(found: Object, path: Path) -> None:
    for part in path[:-1]:
        found = found.get(part) or {}
    found.pop(path[-1], None)
