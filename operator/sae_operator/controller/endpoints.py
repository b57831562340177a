"""The operator's own HTTP endpoints: `/metrics` for Prometheus, and `/readyz`, which tells what is missing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

from aiohttp import web
from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client.exposition import choose_encoder

READY_PATH = "/readyz"
DEFAULT_METRICS_PATH = "/metrics"
# A scrape that is still being answered when the operator stops.
STOP_SECONDS = 1.0


def parse_address(url: str) -> tuple[str, int, str]:
    """Host, port and path of an address such as `http://0.0.0.0:8082/metrics`.

    Raises:
        ValueError: it is none, or lacks the port.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.port is None or parts.query or parts.fragment:
        raise ValueError(f"must be an address such as http://0.0.0.0:8082/metrics, not {url}")
    path = parts.path if parts.path not in ("", "/") else DEFAULT_METRICS_PATH
    if path == READY_PATH:
        raise ValueError(f"{READY_PATH} is the path of readiness; name another one")
    return parts.hostname, parts.port, path


class AddressUnusable(Exception):
    """The address cannot be served; the message says why."""


@contextlib.asynccontextmanager
async def serving(
    url: str | None, registry: CollectorRegistry, not_ready: Callable[[], str | None]
) -> AsyncIterator[None]:
    """Serves inside the block; nothing without a `url`. `not_ready` tells why the operator is not ready; None when it
    is.

    Raises:
        AddressUnusable: something else listens there, or the machine has no such address.
    """
    if url is None:
        yield
        return
    host, port, path = parse_address(url)

    async def metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    async def ready(_: web.Request) -> web.Response:
        why = not_ready()
        return web.Response(text="ready\n") if why is None else web.Response(status=503, text=f"not ready: {why}\n")

    # When each counter began is of no use to anybody here, and would be a third of the lines.
    disable_created_metrics()
    served = web.Application()
    served.router.add_get(path, metrics)
    served.router.add_get(READY_PATH, ready)
    runner = web.AppRunner(served, access_log=None, shutdown_timeout=STOP_SECONDS)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise AddressUnusable(f"metrics cannot be served at {url}: {error.strerror or error}") from error
        yield
    finally:
        await runner.cleanup()
