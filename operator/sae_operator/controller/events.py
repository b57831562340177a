"""Kubernetes events on our resources, aggregated: what was said already is counted, not said again."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from sae_operator.api.base import API_VERSION
from sae_operator.api.redaction import redact
from sae_operator.controller import paths
from sae_operator.controller.client import ApiClient, ApiError, ServerUnavailable
from sae_operator.controller.queue import Key
from sae_operator.reconcile.wanted import EventWanted

logger = logging.getLogger(__name__)

COMPONENT = "sae-operator"
# An event that is repeated is counted at most this often.
REPEAT_SECONDS = 60.0
REMEMBERED = 2048
MESSAGE_LIMIT = 1024


@dataclass
class _Told:
    count: int
    at: float


class EventRecorder:
    """Posts core/v1 Events whose names follow from what they say, so that a restart does not say it twice."""

    def __init__(
        self,
        client: ApiClient,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client, self._clock, self._now = client, clock, now
        self._told: OrderedDict[tuple[str, str], _Told] = OrderedDict()

    async def post(self, key: Key, uid: str, event: EventWanted) -> None:
        """Posts one event on a resource. Events are a courtesy: one that cannot be written is logged and forgotten."""
        event = replace(event, message=redact(event.message))
        level = logging.WARNING if event.type == "Warning" else logging.INFO
        logger.log(level, "%s: %s", event.reason, event.message)
        digest = hashlib.sha256(f"{uid}/{event.type}/{event.reason}/{event.message}".encode()).hexdigest()[:16]
        name = f"{key.name}.{digest}"
        try:
            await self._write(key, uid, event, name)
        except (ApiError, ServerUnavailable) as error:
            logger.warning("Event %s was not written: %s", event.reason, error)

    async def _write(self, key: Key, uid: str, event: EventWanted, name: str) -> None:
        path, index = paths.events(key.namespace), (key.namespace, name)
        told = self._told.get(index)
        time_text = self._now().strftime("%Y-%m-%dT%H:%M:%SZ")
        if told is not None:
            told.count += 1
            if self._clock() - told.at < REPEAT_SECONDS:
                return
            told.at = self._clock()
            try:
                await self._client.merge_patch(f"{path}/{name}", {"count": told.count, "lastTimestamp": time_text})
                return
            except ApiError as error:
                # Events expire, after an hour mostly: this one is news again.
                if error.status != 404:
                    raise
        self._remember(index)
        try:
            await self._client.create(path, _manifest(key, uid, event, name, time_text), metadata_only=True)
        except ApiError as error:
            # Said by this operator before it was restarted.
            if error.reason != "AlreadyExists":
                raise

    def _remember(self, index: tuple[str, str]) -> None:
        self._told[index] = _Told(1, self._clock())
        while len(self._told) > REMEMBERED:
            self._told.popitem(last=False)


def _manifest(key: Key, uid: str, event: EventWanted, name: str, time_text: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": key.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": key.kind,
            "namespace": key.namespace,
            "name": key.name,
            "uid": uid,
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:MESSAGE_LIMIT],
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "firstTimestamp": time_text,
        "lastTimestamp": time_text,
        "count": 1,
    }
