"""Events: said once, counted when they are repeated, and said again when they have expired."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from sae_operator.controller.client import ApiError
from sae_operator.controller.events import REPEAT_SECONDS, EventRecorder
from sae_operator.controller.queue import Key
from sae_operator.reconcile.wanted import EventWanted

KEY = Key("SAETrainingJob", "ns", "a")
EVENT = EventWanted("Warning", "CreateRefused", "exceeded quota")


class Server:
    """Keeps events by path."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}

    async def create(self, path: str, manifest: Mapping[str, Any], *, metadata_only: bool = False) -> None:
        self.events[f"{path}/{manifest['metadata']['name']}"] = dict(manifest)

    async def merge_patch(self, path: str, patch: Mapping[str, Any]) -> None:
        if path not in self.events:
            raise ApiError(404, "NotFound", "gone")
        self.events[path] |= patch


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("expired", "count"), [(False, 3), (True, 1)])
async def test_a_repeated_event_is_counted_and_an_expired_one_is_news(expired: bool, count: int) -> None:
    server, clock = Server(), Clock()
    recorder = EventRecorder(server, clock=clock, now=lambda: datetime(2026, 1, 1, tzinfo=UTC))  # type: ignore[arg-type]
    await recorder.post(KEY, "uid", EVENT)
    await recorder.post(KEY, "uid", EVENT)
    assert [event["count"] for event in server.events.values()] == [1], "no write for each repetition"
    clock.now += REPEAT_SECONDS
    if expired:
        server.events.clear()
    await recorder.post(KEY, "uid", EVENT)
    assert [event["count"] for event in server.events.values()] == [count]
