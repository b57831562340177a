"""A namespace's defaults are read once for a burst, and forgotten soon: namespaces come and go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sae_operator.controller.client import ApiError, ServerUnavailable
from sae_operator.controller.defaults import REMEMBER_SECONDS, NamespaceDefaults


class Server:
    """Answers with a region by namespace; `gate` holds answers back."""

    def __init__(self, regions: dict[str, str]) -> None:
        self.regions, self.asked = regions, []
        self.gate = asyncio.Event()
        self.gate.set()
        self.away = False
        self.time = 0.0

    async def get(self, path: str) -> dict[str, Any]:
        namespace = path.split("/")[4]
        self.asked.append(namespace)
        await self.gate.wait()
        if self.away:
            raise ServerUnavailable("away")
        if namespace not in self.regions:
            raise ApiError(404, "NotFound", "none")
        return {"data": {"region": self.regions[namespace], "queueName": "gpus"}}


def defaults_of(server: Server) -> NamespaceDefaults:
    return NamespaceDefaults(server, clock=lambda: server.time)  # type: ignore[arg-type]


async def test_a_burst_asks_once_and_a_change_is_seen_a_little_later() -> None:
    server = Server({"lab": "eu-1"})
    server.gate.clear()
    defaults = defaults_of(server)
    asking = [asyncio.create_task(defaults.of("lab")) for _ in range(20)]
    await asyncio.sleep(0)
    server.gate.set()
    assert {(found.region, found.queue_name) for found in await asyncio.gather(*asking)} == {("eu-1", "gpus")}
    assert server.asked == ["lab"]
    server.regions["lab"] = "eu-2"
    server.time = REMEMBER_SECONDS - 1
    assert (await defaults.of("lab")).region == "eu-1"
    server.time = REMEMBER_SECONDS
    assert (await defaults.of("lab")).region == "eu-2"


async def test_a_namespace_without_the_config_map_has_none() -> None:
    server = Server({})
    defaults = defaults_of(server)
    assert (await defaults.of("lab")).region is None
    assert (await defaults.of("lab")).region is None
    assert server.asked == ["lab"]


async def test_no_answer_is_not_remembered() -> None:
    server = Server({"lab": "eu-1"})
    server.away = True
    defaults = defaults_of(server)
    with pytest.raises(ServerUnavailable):
        await defaults.of("lab")
    server.away = False
    assert (await defaults.of("lab")).region == "eu-1"


async def test_what_is_known_does_not_grow_with_the_namespaces_that_there_have_been() -> None:
    server = Server({})
    defaults = defaults_of(server)
    for number in range(1000):
        server.time = float(number)
        await defaults.of(f"team-{number}")
    assert len(defaults._known) <= REMEMBER_SECONDS
    assert not defaults._locks
