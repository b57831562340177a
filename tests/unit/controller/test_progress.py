"""Looking at pods: whose they are, and how long the next look may wait."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from sae_operator.controller.progress import PodPoller
from sae_operator.controller.queue import Key
from sae_operator.controller.store import Store
from sae_operator.reconcile.names import LABEL_UID

KEY = Key("SAETrainingJob", "ns", "a")


class Server:
    """Lists pods, in one page."""

    def __init__(self, pods: list[dict[str, Any]]) -> None:
        self._pods = pods

    async def pages(self, path: str, query: Any) -> AsyncIterator[list[dict[str, Any]]]:
        yield self._pods


def pod(name: str, namespace: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": namespace, "labels": {LABEL_UID: "uid-a"}}, "status": {}}


def poller_of(pods: list[dict[str, Any]]) -> tuple[PodPoller, Store]:
    store = Store()
    meta = {"name": "a", "namespace": "ns", "uid": "uid-a", "resourceVersion": "1", "generation": 1}
    store.put_resource(KEY.kind, {"metadata": meta, "spec": {}, "status": {}})
    poller = PodPoller(Server(pods), store, lambda keys: None, namespace=None, poll_seconds=5.0)  # type: ignore[arg-type]
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


async def test_a_pod_of_another_namespace_is_nobodys_whatever_its_label_says() -> None:
    poller, store = poller_of([pod("mine", "ns"), pod("foreign", "elsewhere")])
    await poller._tick(None)  # type: ignore[arg-type]
    assert [found.name for found in store.children("uid-a").pods] == ["mine"]
