"""The liveness probe fails when a restart may help, and only then."""

from __future__ import annotations

from typing import Any, cast

import pytest

from sae_operator.controller.client import ApiClient
from sae_operator.controller.heartbeat import LONGEST_SILENCE_SECONDS, OLDEST_KEY_SECONDS, Heartbeat, Unhealthy


class Breaker:
    open = False


class Client:
    def __init__(self) -> None:
        self.breaker = Breaker()
        self.applied: list[dict[str, Any]] = []

    async def apply(self, path: str, manifest: dict[str, Any], field_manager: str) -> dict[str, Any]:
        self.applied.append(manifest)
        return manifest


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def heart() -> tuple[Heartbeat, Client, Clock]:
    client, clock = Client(), Clock()
    beat = Heartbeat(cast(ApiClient, client), namespace="ns", identity="me", clock=clock)
    return beat, client, clock


async def test_a_beat_that_comes_back_proves_that_the_watch_works() -> None:
    beat, client, clock = heart()
    await beat.beat()
    clock.now += LONGEST_SILENCE_SECONDS - 1
    beat.seen(client.applied[-1])
    clock.now += LONGEST_SILENCE_SECONDS - 1
    assert beat.check(0.0)["heartbeat_age_seconds"] == LONGEST_SILENCE_SECONDS - 1


async def test_an_old_beat_or_anothers_proves_nothing() -> None:
    beat, client, clock = heart()
    await beat.beat()
    old = client.applied[-1]
    await beat.beat()
    clock.now += LONGEST_SILENCE_SECONDS + 1
    beat.seen(old)
    beat.seen({"spec": {"renewTime": "2026-01-01T00:00:00.000000Z"}})
    with pytest.raises(Unhealthy, match="heartbeat"):
        beat.check(0.0)


async def test_a_resource_that_waits_too_long_is_unhealthy() -> None:
    beat, _, _ = heart()
    assert beat.check(OLDEST_KEY_SECONDS)["oldest_key_seconds"] == OLDEST_KEY_SECONDS
    with pytest.raises(Unhealthy, match="waited"):
        beat.check(OLDEST_KEY_SECONDS + 1)


async def test_an_api_server_that_is_away_is_no_reason_to_restart() -> None:
    beat, client, clock = heart()
    client.breaker.open = True
    clock.now += 10 * LONGEST_SILENCE_SECONDS
    beat.check(10 * OLDEST_KEY_SECONDS)
    client.breaker.open = False
    clock.now += LONGEST_SILENCE_SECONDS - 1
    beat.check(0.0)
