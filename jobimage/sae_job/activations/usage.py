"""When a cache was last used: by the newest of its objects, one of which readers renew.

Whoever builds a cache writes objects all the time; whoever reads it renews `last-used.json`, at most once a day. So the
time of the newest object is the time of the last use, to a day.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime

from sae_job.activations.marker import LAST_USED_KEY
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectInfo, ObjectNotFound, ObjectStore, StoreError

logger = logging.getLogger(__name__)


def note_use(store: ObjectStore, now: float) -> None:
    """Record that a cache is being read: one object, written anew at most once a day.

    Reading needs no more than permission to read, so a store that refuses the write is told in the log alone.

    Args:
        store: the cache's folder.
        now: seconds since the epoch.
    """
    today = datetime.fromtimestamp(now, UTC).date().isoformat()
    data = (json.dumps({"date": today}) + "\n").encode()
    try:
        if _stored(store) != data:
            store.put(LAST_USED_KEY, data)
    except (InvalidInput, StoreError) as error:
        logger.info("the use of %s is not recorded: %s", store.uri, error)


def _stored(store: ObjectStore) -> bytes | None:
    try:
        return store.get(LAST_USED_KEY)
    except ObjectNotFound:
        return None


def last_use(objects: Iterable[ObjectInfo]) -> datetime | None:
    """When the cache that these objects are was last used; None when one of them has no time, or there are none."""
    times = [info.modified for info in objects]
    known = [time for time in times if time is not None]
    return max(known) if known and len(known) == len(times) else None
