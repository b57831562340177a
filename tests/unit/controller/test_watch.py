"""Our own watch, over real sockets: what an API server may say, and what it may leave unsaid."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from sae_operator.controller import watch as watches
from sae_operator.controller.client import ApiClient
from sae_operator.controller.credentials import Credentials
from sae_operator.controller.watch import Watch
from tests.testbed.waiting import wait_for

SELECTOR = "a=b"
Sleep = Callable[[float], Awaitable[None]]


def job(name: str, version: int) -> dict[str, Any]:
    return {"metadata": {"name": name, "resourceVersion": str(version)}}


def told(kind: str, found: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": found}).encode() + b"\n"


class Server:
    """Answers each watch with the next script: bytes to write, or an HTTP status; then it says nothing more.

    Attributes:
        asked: of each list its page (`list`, `list two`), and of each watch the version from which it begins.
    """

    def __init__(self, *scripts: list[bytes] | int, pages: int = 1, ends: bool = False) -> None:
        self.scripts, self.pages, self.ends = list(scripts), pages, ends
        self.asked: list[str] = []
        self.hangs = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        assert query["labelSelector"] == SELECTOR
        if "watch" not in query:
            token = query.get("continue", "")
            self.asked.append(f"list {token}".strip())
            meta = {"resourceVersion": "10"}
            if self.pages > 1 and not token:
                meta["continue"] = "two"
            return web.json_response({"metadata": meta, "items": [job(f"listed{token}", 5)]})
        self.asked.append(query["resourceVersion"])
        assert query["allowWatchBookmarks"] == "true"
        script = self.scripts.pop(0) if self.scripts else []
        if isinstance(script, int):
            return web.json_response({"message": "no", "reason": "Expired"}, status=script)
        response = web.StreamResponse()
        await response.prepare(request)
        for part in script:
            await response.write(part)
            # Else parts would arrive as one.
            await asyncio.sleep(0.005)
        if not self.ends or not self.scripts:
            await self.hangs.wait()
        return response


@asynccontextmanager
async def watched(
    server: Server, deliver: Callable[[Any], None] | None = None, *, sleep: Sleep = asyncio.sleep
) -> AsyncIterator[list[tuple[Any, str]]]:
    """Types and names of the events that a watch of the server delivers; and `relisted`."""
    application = web.Application()
    application.router.add_get("/jobs", server.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    client = ApiClient(lambda: Credentials(server=f"http://{host}:{port}", token="t"))
    taken: list[tuple[Any, str]] = []

    def take(event: Any) -> None:
        if deliver is not None:
            deliver(event)
        taken.append((event["type"], event["object"]["metadata"]["name"]))

    watch = Watch(
        client,
        "/jobs",
        SELECTOR,
        take,
        relisted=lambda: taken.append(("relisted", "")),
        uniform=lambda low, high: 0.01,
        sleep=sleep,
    )
    task = asyncio.create_task(watch.run())
    try:
        yield taken
        assert not task.done(), "nothing ends a watch"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.hangs.set()
        await client.close()
        await runner.cleanup()


async def until(holds: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_for, holds, 60.0, interval=0.01)


async def test_what_is_there_comes_page_by_page_and_then_what_changes() -> None:
    server = Server([told("ADDED", job("a", 11)), told("DELETED", job("a", 12))], pages=2)
    async with watched(server) as taken:
        await until(lambda: len(taken) == 4)
    assert taken == [(None, "listed"), (None, "listedtwo"), ("ADDED", "a"), ("DELETED", "a")]
    assert server.asked == ["list", "list two", "10"]


@pytest.mark.parametrize("cut", [1, 20, 60])
async def test_an_event_may_arrive_in_parts_and_several_as_one(cut: int) -> None:
    text = told("ADDED", job("a", 11)) + told("MODIFIED", job("b", 12))
    async with watched(Server([text[:cut], text[cut:]])) as taken:
        await until(lambda: len(taken) == 3)
    assert taken[1:] == [("ADDED", "a"), ("MODIFIED", "b")]


async def test_a_watch_that_ends_goes_on_where_it_was_without_a_list() -> None:
    bookmark = told("BOOKMARK", {"metadata": {"resourceVersion": "40"}})
    server = Server([told("ADDED", job("a", 11))], [bookmark], [], ends=True)
    async with watched(server) as taken:
        await until(lambda: len(server.asked) == 4)
    assert server.asked == ["list", "10", "11", "40"]
    assert taken == [(None, "listed"), ("ADDED", "a")], "a bookmark is no event"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param([told("ERROR", {"code": 410, "reason": "Expired", "message": "too old"})], id="told in the watch"),
        pytest.param(410, id="told at once"),
    ],
)
async def test_after_a_version_that_has_expired_everything_is_listed_again(script: Any) -> None:
    server = Server(script, [])
    async with watched(server) as taken:
        await until(lambda: len(server.asked) == 4)
    assert server.asked == ["list", "10", "list", "10"]
    assert taken == [(None, "listed"), (None, "listed"), ("relisted", "")]


async def test_between_watches_that_bring_nothing_it_pauses() -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    server = Server([], [], [told("ADDED", job("a", 11))], [], ends=True)
    async with watched(server, sleep=sleep):
        await until(lambda: len(server.asked) == 5)
    assert server.asked == ["list", "10", "10", "10", "11"]
    assert pauses == [0.01, 0.01]


@pytest.mark.parametrize(
    "script",
    [503, 429, 401, [b"<html>\n"], [b'{"status": "ok"}\n'], [b"null\n"]],
    ids=["away", "busy", "a token that has expired", "a proxy's page", "its JSON", "its null"],
)
async def test_a_server_that_is_away_for_a_moment_costs_no_list(script: Any) -> None:
    server = Server(script, [told("ADDED", job("a", 11))])
    async with watched(server) as taken:
        await until(lambda: len(taken) == 2)
    assert server.asked == ["list", "10", "10"]


async def test_a_connection_that_says_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    # Longer than a busy machine may keep the first event back: a connection that is left has told nothing.
    monkeypatch.setattr(watches, "SILENCE_SECONDS", 1.0)
    server = Server([told("ADDED", job("a", 11))])
    async with watched(server) as taken:
        await until(lambda: len(server.asked) >= 3)
    assert server.asked[:3] == ["list", "10", "11"]
    assert taken == [(None, "listed"), ("ADDED", "a")]


async def test_an_object_that_nobody_understands_keeps_no_other_back() -> None:
    def deliver(event: Any) -> None:
        if event["object"]["metadata"]["name"] == "odd":
            raise KeyError("spec")

    server = Server([told("ADDED", job("odd", 11)), told("ADDED", job("a", 12))])
    async with watched(server, deliver) as taken:
        await until(lambda: len(taken) == 2)
    assert taken == [(None, "listed"), ("ADDED", "a")]
    assert server.asked == ["list", "10"]


async def test_an_object_may_be_nested_deeper_than_the_faster_parser_reads() -> None:
    deep = job("deep", 11)
    for _ in range(300):
        deep = {**job("deep", 11), "spec": deep}
    server = Server([told("ADDED", deep), told("ADDED", job("a", 12))])
    async with watched(server) as taken:
        await until(lambda: len(taken) == 3)
    assert taken[1:] == [("ADDED", "deep"), ("ADDED", "a")]
