"""Mark and sweep: what vanished while no watch looked is found by comparing, and nothing else is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pytest

from sae_operator.api.resources import KINDS
from sae_operator.controller import census, paths
from sae_operator.controller.census import Sweeper
from sae_operator.controller.client import Page, ServerUnavailable
from sae_operator.controller.queue import Key
from sae_operator.controller.store import Store

JOB = "SAETrainingJob"


class Breaker:
    def __init__(self) -> None:
        self.on_close: list[Callable[[], None]] = []

    async def wait_closed(self) -> None:
        return


class Server:
    """Lists metadata, by path; `while_listing` happens after the first LIST."""

    def __init__(self) -> None:
        self.breaker = Breaker()
        self.listed: dict[str, list[dict[str, Any]]] = {}
        self.while_listing: Callable[[], None] = lambda: None
        self.failures = 0

    async def pages(self, path: str, query: Any, **_: Any) -> AsyncIterator[Page]:
        if self.failures:
            self.failures -= 1
            raise ServerUnavailable("away")
        yield Page([{"metadata": meta} for meta in self.listed.get(path, [])], 1)
        self.while_listing()


def meta(name: str, *, parent: str | None = None) -> dict[str, Any]:
    found = {"name": name, "namespace": "ns", "uid": f"uid-{name}", "resourceVersion": "1", "generation": 1}
    owner = {"kind": JOB, "name": parent, "uid": f"uid-{parent}", "controller": True}
    return {**found, "ownerReferences": [owner] if parent else []}


def stored(*names: str, jobs: Iterable[tuple[str, str]] = ()) -> Store:
    store = Store()
    for name in names:
        store.put_resource(JOB, {"metadata": meta(name), "spec": {}, "status": {}})
    for name, parent in jobs:
        store.put_job({"metadata": meta(name, parent=parent), "spec": {}, "status": {}})
    return store


def sweeper_of(server: Server, store: Store) -> tuple[Sweeper, set[Key]]:
    looked_at: set[Key] = set()
    return Sweeper(server, store, looked_at.update, namespace=None), looked_at  # type: ignore[arg-type]


def listing(server: Server, *names: str, jobs: Iterable[tuple[str, str]] = ()) -> None:
    server.listed = {
        paths.resources(JOB, None): [meta(name) for name in names],
        paths.jobs(None): [meta(name, parent=parent) for name, parent in jobs],
    }


async def test_what_is_not_listed_any_more_is_dropped_and_its_resource_looked_at() -> None:
    server, store = Server(), stored("a", "gone", jobs=[("a-1", "a"), ("a-2", "a")])
    listing(server, "a", jobs=[("a-1", "a")])
    sweeper, looked_at = sweeper_of(server, store)
    await sweeper.sweep()
    assert store.resource_uids(JOB) == {"uid-a"}
    assert set(store.children("uid-a").jobs) == {"a-1"}
    assert looked_at == {Key(JOB, "ns", "a")}


async def test_what_arrives_while_the_list_is_read_stays() -> None:
    server, store = Server(), stored("a")
    listing(server, "a")

    def arrive() -> None:
        store.put_resource(JOB, {"metadata": meta("new"), "spec": {}, "status": {}})
        store.put_job({"metadata": meta("new-1", parent="new"), "spec": {}, "status": {}})

    server.while_listing = arrive
    sweeper, _ = sweeper_of(server, store)
    await sweeper.sweep()
    assert store.resource_uids(JOB) == {"uid-a", "uid-new"}
    assert set(store.children("uid-new").jobs) == {"new-1"}


async def test_a_sweep_that_fails_is_not_put_off_until_the_next_regular_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "SETTLE_SECONDS", 0.0)
    server, store = Server(), stored("gone")
    server.failures = 2
    swept = asyncio.Event()
    sweeper = Sweeper(server, store, lambda keys: swept.set(), namespace=None)  # type: ignore[arg-type]
    running = asyncio.create_task(sweeper.run())
    sweeper.relisted()
    try:
        await asyncio.wait_for(swept.wait(), 60)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert server.failures == 0
    assert not store.resource_uids(JOB)


async def test_work_begins_when_everything_that_is_listed_has_arrived() -> None:
    server, store = Server(), stored("a")
    listing(server, "a", jobs=[("a-1", "a")])
    sweeper, _ = sweeper_of(server, store)
    waiting = asyncio.create_task(sweeper.wait_until_listed())
    for _ in range(len(KINDS) + 5):
        await asyncio.sleep(0)
    assert not waiting.done(), "the Job has not arrived yet"
    store.put_job({"metadata": meta("a-1", parent="a"), "spec": {}, "status": {}})
    await asyncio.wait_for(waiting, 60)
