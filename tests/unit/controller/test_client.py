"""Calls over real sockets: credentials that rotate, answers that refuse, and a server that is away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from sae_operator.controller.client import ApiClient, ApiError, ServerUnavailable, WebhookUnavailable
from sae_operator.controller.credentials import Credentials, CredentialsError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(handler: Handler, tokens: list[str]) -> AsyncIterator[ApiClient]:
    """A client of a server on loopback; each load of credentials takes the next token, the last one for ever."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]

    def load() -> Credentials:
        return Credentials(server=f"http://{host}:{port}", token=tokens.pop(0) if len(tokens) > 1 else tokens[0])

    client = ApiClient(load)
    try:
        yield client
    finally:
        await client.close()
        await runner.cleanup()


async def test_a_rotated_token_is_loaded_after_a_401() -> None:
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers["Authorization"])
        return web.json_response({}, status=200 if seen[-1] == "Bearer new" else 401)

    async with served(handler, ["old", "new"]) as client:
        assert await client.get("/x") == {}
        assert await client.get("/x") == {}
    assert seen == ["Bearer old", "Bearer new", "Bearer new"]


async def test_credentials_that_cannot_be_renewed_serve_on() -> None:
    """A plugin that needs the network must not end the operator, or its probing, while the network is away."""
    now, accepts = 0.0, True

    async def handler(request: web.Request) -> web.Response:
        return web.json_response({}, status=200 if accepts else 401)

    async with served(handler, ["t"]) as working:
        tokens = [working._load()]

        def load() -> Credentials:
            if not tokens:
                raise CredentialsError("the plugin gave none")
            return replace(tokens.pop(), refreshes=True)

        client = ApiClient(load, clock=lambda: now)
        try:
            assert await client.get("/x") == {}
            now = 3600.0
            assert await client.get("/x") == {}
            accepts = False
            with pytest.raises(ApiError) as caught:
                await client.get("/x")
            assert caught.value.status == 401
        finally:
            await client.close()


async def test_a_token_that_stays_wrong_is_an_error() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"reason": "Unauthorized", "message": "no"}, status=401)

    async with served(handler, ["wrong"]) as client:
        with pytest.raises(ApiError) as caught:
            await client.get("/x")
    assert caught.value.status == 401


async def test_a_refusal_carries_what_the_server_says() -> None:
    async def handler(request: web.Request) -> web.Response:
        details = {"causes": [{"reason": "NamespaceTerminating"}]}
        return web.json_response({"reason": "Forbidden", "message": "words", "details": details}, status=403)

    async with served(handler, ["t"]) as client:
        with pytest.raises(ApiError, match="words") as caught:
            await client.create("/x", {})
        assert caught.value.has_cause("NamespaceTerminating")
        assert not client.breaker.open


@pytest.mark.parametrize("body", ["null", '"no"', "[]", "<html>no</html>", '{"message": 5}'])
async def test_what_something_in_between_answers_is_told(body: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=403, text=body, content_type="application/json")

    async with served(handler, ["t"]) as client:
        with pytest.raises(ApiError) as caught:
            await client.get("/x")
    assert (caught.value.status, caught.value.reason) == (403, "")
    assert caught.value.message == ("5" if "message" in body else body)


async def test_a_refusal_without_end_is_cut() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"message": "no " * 100_000, "reason": "Forbidden"}, status=403)

    async with served(handler, ["t"]) as client:
        with pytest.raises(ApiError) as caught:
            await client.get("/x")
    assert len(caught.value.message) == 2048


async def test_being_asked_to_wait_is_not_being_away() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({}, status=429, headers={"Retry-After": "7"})

    async with served(handler, ["t"]) as client:
        for _ in range(5):
            with pytest.raises(ServerUnavailable) as caught:
                await client.get("/x")
            assert caught.value.retry_after == 7
        assert not client.breaker.open


@pytest.mark.parametrize(("asked", "wait"), [("86400", 60.0), ("\xb2", None), ("soon", None), ("-1", None)])
async def test_no_server_puts_work_off_for_a_day(asked: str, wait: float | None) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({}, status=503, headers={"Retry-After": asked})

    async with served(handler, ["t"]) as client:
        with pytest.raises(ServerUnavailable) as caught:
            await client.get("/x")
        assert caught.value.retry_after == wait


async def test_a_webhook_that_does_not_answer_is_not_the_server() -> None:
    said = 'Internal error occurred: failed calling webhook "mjob.kb.io": failed to call webhook: connection refused'

    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"reason": "InternalError", "message": said}, status=500)

    async with served(handler, ["t"]) as client:
        for _ in range(5):
            with pytest.raises(WebhookUnavailable, match="mjob"):
                await client.create("/x", {})
        assert not client.breaker.open


async def test_the_breaker_opens_while_the_server_is_away_and_closes_when_it_is_back() -> None:
    away = True

    async def handler(request: web.Request) -> web.Response:
        return web.json_response({}, status=503 if away else 200)

    async with served(handler, ["t"]) as client:
        for _ in range(3):
            with pytest.raises(ServerUnavailable):
                await client.get("/x")
        assert client.breaker.open
        away = False
        await asyncio.wait_for(client.breaker.wait_closed(), 60)
        assert await client.get("/x") == {}


@pytest.mark.parametrize("text", ["<html>a proxy</html>", "[]", "null"])
async def test_a_good_answer_that_is_no_object_is_none(text: str) -> None:
    """An empty list would say that everything has been deleted."""

    async def handler(request: web.Request) -> web.Response:
        return web.Response(text=text)

    async with served(handler, ["t"]) as client:
        with pytest.raises(ServerUnavailable, match="GET /x"):
            await client.get("/x")


async def test_a_list_is_read_page_by_page() -> None:
    asked: list[tuple[str | None, str | None]] = []

    async def handler(request: web.Request) -> web.Response:
        token = request.query.get("continue")
        asked.append((request.query.get("limit"), token))
        following = {None: "two", "two": "three"}.get(token)
        meta = {"resourceVersion": "7"} | ({"continue": following} if following else {})
        return web.json_response({"items": [{"page": token or "one"}], "metadata": meta})

    async with served(handler, ["t"]) as client:
        pages = [page async for page in client.pages("/x", {"labelSelector": "a=b"}, limit=2)]
    assert [item["page"] for page in pages for item in page.items] == ["one", "two", "three"]
    assert {page.version for page in pages} == {7}
    assert asked == [("2", None), ("2", "two"), ("2", "three")]


EVENT = b'{"type": "ADDED", "object": {}}\n'


async def test_a_watch_outlives_credentials_that_rotate_often() -> None:
    accepted, ends = "Bearer a", asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path != "/watch":
            return web.json_response({}, status=200 if request.headers["Authorization"] == accepted else 401)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(EVENT)
        await ends.wait()
        await response.write(EVENT)
        return response

    async with served(handler, ["a", "b", "c", "d", "e"]) as client, asyncio.timeout(60):
        events = client.stream("/watch", {}, silence_seconds=60.0)
        await anext(events)
        for token in "bcd":
            accepted = f"Bearer {token}"
            assert await client.get("/x") == {}
        ends.set()
        assert len([event async for event in events]) == 1
        # Its session is closed by the next change.
        assert len(client._retired) == 2
        accepted = "Bearer e"
        assert await client.get("/x") == {}
        assert len(client._retired) == 1


async def test_a_watch_that_breaks_off_amid_what_is_no_chunk_is_left() -> None:
    hangs = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(EVENT)
        assert request.transport is not None
        # Else both would arrive as one, which aiohttp takes better.
        await asyncio.sleep(0.05)
        request.transport.write(b"no chunk\r\n")
        await hangs.wait()
        return response

    async with served(handler, ["t"]) as client, asyncio.timeout(60):
        async with contextlib.aclosing(client.stream("/watch", {}, silence_seconds=0.2)) as events:
            with pytest.raises(ServerUnavailable):
                _ = [event async for event in events]
        hangs.set()
