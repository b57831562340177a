"""The marker of a cache's folder: what carries it is a cache of ours, and nothing without it is ever deleted."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore, PreconditionFailed
from sae_operator.api.identity import CACHE_FORMAT_VERSION

MARKER_KEY = "sae-operator.json"
CACHE_KIND = "ActivationCache"
LAST_USED_KEY = "last-used.json"
# A copy of the model's files, where one was asked for.
MIRROR_PREFIX = "model/"

_AT_THE_TOP = r"(?:manifest|sae-operator|last-used)\.json"
# What we write below a cache's folder. A folder `model/` with what stands at the top of a cache is another cache.
_OURS = re.compile(
    rf"{_AT_THE_TOP}"
    r"|shards/\d{6,}(-\d+)?(\.g\d+)?\.(safetensors|json)"
    r"|tokens/(index\.json|\d{6,}\.(safetensors|json))"
    rf"|{MIRROR_PREFIX}(?!{_AT_THE_TOP}$)[^/]+"
)
_IN_A_FOLDER = re.compile(rf"(?P<folder>(?:.*?/)?)(?:{_OURS.pattern})")


@dataclass(frozen=True)
class Marker:
    """What a marker tells: kind of the resource that lies there, and the identity of a cache."""

    kind: str
    identity: str


def is_ours(key: str) -> bool:
    """Whether a key below a cache's folder is one that we write."""
    return _OURS.fullmatch(key) is not None


def folder_of(key: str) -> str | None:
    """The folder (`""`, or with a trailing slash) of the cache that an object with this key would belong to; None for
    keys that no cache has."""
    match = _IN_A_FOLDER.fullmatch(key)
    return None if match is None else match["folder"]


def marker_bytes(identity: str) -> bytes:
    """The marker of a cache with this identity."""
    marker = {"kind": CACHE_KIND, "formatVersion": CACHE_FORMAT_VERSION, "identity": identity}
    return (json.dumps(marker, sort_keys=True) + "\n").encode()


def mark(store: ObjectStore, identity: str) -> bool:
    """Say that this folder is a cache of ours; returns whether the marker is new. One that is there stays."""
    try:
        store.put(MARKER_KEY, marker_bytes(identity), if_absent=True)
    except PreconditionFailed:
        return False
    return True


def read_marker(store: ObjectStore) -> Marker | None:
    """The marker of a folder; None when there is none, or what is there is no marker."""
    try:
        found = json.loads(store.get(MARKER_KEY))
        return Marker(kind=str(found["kind"]), identity=str(found.get("identity", "")))
    except (ObjectNotFound, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_is_cache(store: ObjectStore) -> Marker:
    """The marker of a folder that is a cache.

    Raises:
        InvalidInput: it is none of ours.
    """
    marker = read_marker(store)
    if marker is None:
        raise InvalidInput(
            "NotACache",
            f"{store.uri} is no cache of ours: it has no marker ({MARKER_KEY}); "
            "`sae-job cache ls URI` shows the caches below a prefix",
        )
    if marker.kind != CACHE_KIND:
        raise InvalidInput("NotACache", f"{store.uri} holds a {marker.kind}, not an {CACHE_KIND}: give a cache's URI")
    return marker
