"""Kept-alive connections to a test's API server: a TLS handshake for each look would cost more than the look."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from typing import Any

from sae_operator.controller.client import connection_info
from sae_operator.controller.credentials import load_credentials
from tests.testbed.control_plane import ControlPlane

TIMEOUT_SECONDS = 60.0


class ApiConnection:
    """An administrator's connection, one for each thread that uses it."""

    def __init__(self, control_plane: ControlPlane) -> None:
        self._host = control_plane.server.removeprefix("https://")
        self._tls: ssl.SSLContext = connection_info(load_credentials(str(control_plane.kubeconfig))).as_ssl_context()
        self._local = threading.local()
        self._opened: list[http.client.HTTPSConnection] = []

    def __del__(self) -> None:
        for connection in self._opened:
            connection.close()

    def request(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json"
    ) -> tuple[int, bytes]:
        """Status and body of the answer. A connection that the server has closed is opened once more."""
        data = None if body is None else json.dumps(body)
        for attempt in (1, 2):
            connection = self._connection(fresh=attempt == 2)
            try:
                connection.request(method, path, body=data, headers={"Content-Type": content_type})
                answer = connection.getresponse()
                return answer.status, answer.read()
            except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError):
                if attempt == 2:
                    raise
        raise AssertionError("unreachable: the second attempt returns or raises")

    def stream(self, path: str, *, timeout: float = TIMEOUT_SECONDS) -> http.client.HTTPResponse:
        """The answer to a GET, unread, on a connection of its own, which may be silent for `timeout` seconds."""
        connection = self._open(timeout)
        connection.request("GET", path)
        return connection.getresponse()

    def _connection(self, *, fresh: bool) -> http.client.HTTPSConnection:
        if fresh or not hasattr(self._local, "connection"):
            self._local.connection = self._open()
        return self._local.connection

    def _open(self, timeout: float = TIMEOUT_SECONDS) -> http.client.HTTPSConnection:
        connection = http.client.HTTPSConnection(self._host, context=self._tls, timeout=timeout)
        self._opened.append(connection)
        return connection
