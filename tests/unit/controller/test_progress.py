"""Looking at pods: whose they are, and how long the next look may wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import aiohttp
import pytest

from sae_operator.api.steps import Progress, SaeProgress
from sae_operator.controller.client import Page, ServerUnavailable
from sae_operator.controller.progress import ANSWER_LIMIT_BYTES, LISTINGS_AT_ONCE, PodPoller, ask
from sae_operator.controller.queue import Key
from sae_operator.controller.store import Store
from sae_operator.reconcile.names import LABEL_UID
from sae_operator.reconcile.observed import PodFacts

KEY = Key("SAETrainingJob", "ns", "a")


class Server:
    """Lists pods, in one page; while it does so the first times, `meanwhile` happens, one call for each."""

    def __init__(self, pods: list[dict[str, Any]], meanwhile: Iterable[Callable[[], None]] = ()) -> None:
        self._pods, self._meanwhile, self.asked = pods, iter(meanwhile), 0

    async def pages(self, path: str, query: Any) -> AsyncIterator[Page]:
        self.asked += 1
        next(self._meanwhile, lambda: None)()
        yield Page(self._pods, self.asked)


def pod(name: str, namespace: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace, "labels": {LABEL_UID: "uid-a"}}, "status": {}}


def poller_of(pods: list[dict[str, Any]]) -> tuple[PodPoller, Store]:
    return poller_on(Server(pods))


def poller_on(server: Server) -> tuple[PodPoller, Store]:
    store = Store()
    meta = {"name": "a", "namespace": "ns", "uid": "uid-a", "resourceVersion": "1", "generation": 1}
    store.put_resource(KEY.kind, {"metadata": meta, "spec": {}, "status": {}})
    poller = PodPoller(server, store, lambda keys: None, namespace=None, poll_seconds=5.0)  # type: ignore[arg-type]
    poller.watch(KEY, True)
    return poller, store


@pytest.mark.parametrize(
    ("took", "gap"),
    [
        pytest.param(0.001, 0.5, id="a short tick"),
        pytest.param(0.06, 2.0, id="a tick that costs something"),
        pytest.param(2.0, 5.0, id="a tick in which a pod did not answer"),
    ],
)
def test_the_next_look_is_never_later_than_without_haste(took: float, gap: float) -> None:
    poller, _ = poller_of([])
    assert poller.gap_after(took) == pytest.approx(gap)


@pytest.mark.parametrize(("watched", "seconds"), [(1, 5.0), (500, 10.0), (3000, 25.0)])
def test_many_are_looked_at_less_often_but_always_within_half_a_minute(watched: int, seconds: float) -> None:
    poller, _ = poller_of([])
    poller.watch(KEY, False)
    for number in range(watched):
        poller.watch(Key("SAETrainingJob", "ns", f"job-{number}"), True)
    assert poller.interval == seconds


async def test_a_tick_that_began_before_all_pods_were_listed_tells_nothing() -> None:
    poller, store = poller_of([])
    ended = PodFacts(name="p", job_name="j", step="train", phase="Succeeded")
    runs = PodFacts(name="q", job_name="j", step="train", phase="Running", running=True)
    store.put_pods("uid-a", [ended, runs], 2)
    await poller._tick(None)  # type: ignore[arg-type]
    assert store.children("uid-a").pods == (ended, runs)
    assert not store.children("uid-a").pods_due


def listing(*meanwhile: Callable[[Store], None]) -> tuple[Server, PodPoller, Store]:
    """What lists the due pods of the resource, and what happens to the store while it does."""
    server = Server([], [lambda change=change: change(store) for change in meanwhile])
    poller, store = poller_on(server)
    store.children("uid-a").pods_due = True
    return server, poller, store


async def list_due(poller: PodPoller, store: Store) -> None:
    stored = store.get(KEY)
    assert stored is not None
    await poller.list_due_pods(stored)


def a_pod_ends(store: Store) -> None:
    store.children("uid-a").pods_due = True


async def test_pods_are_listed_again_when_one_ends_while_they_are_listed() -> None:
    """Else its Job, of which that is told already, would be judged without it."""
    server, poller, store = listing(a_pod_ends)
    await list_due(poller, store)
    assert (server.asked, store.children("uid-a").pods_due) == (2, False)
    await list_due(poller, store)
    assert server.asked == 2


async def test_pods_that_end_all_the_time_are_not_listed_for_ever() -> None:
    server, poller, store = listing(*[a_pod_ends] * 10)
    await list_due(poller, store)
    assert (server.asked, store.children("uid-a").pods_due) == (LISTINGS_AT_ONCE, True)


@pytest.mark.parametrize(
    "error", [ServerUnavailable("away"), KeyError("a pod as no other")], ids=["the server is away", "a fault of ours"]
)
async def test_pods_that_could_not_be_listed_stay_due(error: Exception) -> None:
    def fails(_: Store) -> None:
        raise error

    _, poller, store = listing(fails)
    with pytest.raises(type(error)):
        await list_due(poller, store)
    assert store.children("uid-a").pods_due


async def test_a_pod_of_another_namespace_is_nobodys_whatever_its_label_says() -> None:
    poller, store = poller_of([pod("mine", "ns"), pod("foreign", "elsewhere")])
    await poller._tick(None)  # type: ignore[arg-type]
    assert [found.name for found in store.children("uid-a").pods] == ["mine"]


async def answer_of(body: bytes) -> Progress | str:
    """What is made of an answer that arrives in two parts, the second one when the first has been read."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:100])
        await writer.drain()
        await first_part.wait()
        writer.write(body[100:])
        writer.close()

    first_part = asyncio.Event()
    traced = aiohttp.TraceConfig()

    async def received(*_: Any) -> None:
        first_part.set()

    traced.on_response_chunk_received.append(received)
    traced.on_request_end.append(received)
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, aiohttp.ClientSession(trace_configs=[traced]) as session:
        return await ask(session, "127.0.0.1", server.sockets[0].getsockname()[1])


async def test_an_answer_that_arrives_in_parts_is_read_whole() -> None:
    said = Progress(step="train", updated_at="now", saes=[SaeProgress(name=f"sae-{i}") for i in range(200)])
    assert await answer_of(said.model_dump_json(by_alias=True).encode()) == said


async def test_an_answer_without_end_is_not_read_on() -> None:
    answer = await answer_of(b" " * (4 * ANSWER_LIMIT_BYTES) + b"{}")
    assert isinstance(answer, str)
    assert answer.endswith("not a progress report")
