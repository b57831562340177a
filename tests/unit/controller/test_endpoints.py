"""The operator's HTTP endpoints."""

from __future__ import annotations

import socket

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter

from sae_operator.controller.endpoints import AddressUnusable, parse_address, serving
from tests.testbed.processes import free_ports


@pytest.mark.parametrize("text", ["", "8082", "https://0.0.0.0:8082/metrics", "http://0.0.0.0/metrics", "http://:1/x"])
def test_addresses_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be an address such as http://0\.0\.0\.0:8082/metrics"):
        parse_address(text)


def test_the_path_of_readiness_is_taken() -> None:
    with pytest.raises(ValueError, match="/readyz is the path of readiness"):
        parse_address("http://0.0.0.0:8082/readyz")
    assert parse_address("http://0.0.0.0:8082") == ("0.0.0.0", 8082, "/metrics")


async def test_metrics_and_readiness_are_served_and_end_with_the_block() -> None:
    registry, reasons = CollectorRegistry(), [None, "the API server is away"]
    Counter("things", "Things.", registry=registry).inc()
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    async with aiohttp.ClientSession() as session:
        async with serving(f"{address}/metrics", registry, lambda: reasons[0]):
            async with session.get(f"{address}/metrics") as answer:
                assert answer.status == 200
                assert answer.headers["Content-Type"].startswith("text/plain; version=")
                text = await answer.text()
                assert "things_total 1.0" in text
                assert "_created" not in text
            openmetrics = {"Accept": "application/openmetrics-text; version=1.0.0"}
            async with session.get(f"{address}/metrics", headers=openmetrics) as answer:
                assert (await answer.text()).endswith("# EOF\n")
            async with session.get(f"{address}/readyz") as answer:
                assert (answer.status, await answer.text()) == (200, "ready\n")
            reasons.pop(0)
            async with session.get(f"{address}/readyz") as answer:
                assert (answer.status, await answer.text()) == (503, "not ready: the API server is away\n")
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get(f"{address}/readyz")


async def test_an_address_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/metrics"
        with pytest.raises(AddressUnusable, match=f"metrics cannot be served at {url}: "):
            async with serving(url, CollectorRegistry(), lambda: None):
                raise AssertionError("served")


async def test_without_an_address_nothing_is_served() -> None:
    async with serving(None, CollectorRegistry(), lambda: None):
        pass
