"""Requests to the API server, with the standard library alone."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"

_REQUEST_SECONDS = 30.0
_WATCH_SECONDS = 300


class ApiError(Exception):
    """The API server answered with an error; `reason` and `message` are those of its Status."""

    def __init__(self, status: int, body: bytes) -> None:
        try:
            told = json.loads(body)
        except ValueError:
            told = {"message": body.decode(errors="replace")}
        self.status = status
        self.message: str = told.get("message", "")
        super().__init__(f"{status}: {self.message}")


class ApiClient:
    """Keeps one connection per thread; made from a kubeconfig in JSON with a client certificate."""

    def __init__(self, kubeconfig: Path) -> None:
        content = json.loads(kubeconfig.read_text())
        cluster, user = content["clusters"][0]["cluster"], content["users"][0]["user"]
        address = urllib.parse.urlsplit(cluster["server"])
        self.host = address.hostname or ""
        self.port = address.port or 443
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._tls = ssl.create_default_context(cadata=authority)
        with tempfile.NamedTemporaryFile() as certificate, tempfile.NamedTemporaryFile() as key:
            certificate.write(base64.b64decode(user["client-certificate-data"]))
            certificate.flush()
            key.write(base64.b64decode(user["client-key-data"]))
            key.flush()
            self._tls.load_cert_chain(certificate.name, key.name)
        self._local = threading.local()

    def _connect(self, timeout: float) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self.host, self.port, context=self._tls, timeout=timeout)

    def __call__(self, method: str, path: str, body: Any = None, content_type: str = JSON) -> Any:
        """Send one request and return the parsed answer; raises `ApiError`, or `OSError` without a connection."""
        data = None if body is None else json.dumps(body)
        status, answer = self._send(method, path, data, content_type)
        if status >= 400:
            raise ApiError(status, answer)
        return json.loads(answer) if answer else None

    def _send(self, method: str, path: str, data: str | None, content_type: str) -> tuple[int, bytes]:
        kept: http.client.HTTPSConnection | None = getattr(self._local, "connection", None)
        # A kept connection may have been closed by the server since: then a new one gets a try.
        for connection in (kept, self._connect(_REQUEST_SECONDS)):
            if connection is None:
                continue
            try:
                connection.request(method, path, body=data, headers={"Content-Type": content_type})
                answer = connection.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException):
                connection.close()
                self._local.connection = None
                if connection is not kept:
                    raise
                continue
            self._local.connection = connection
            return answer.status, content
        raise ConnectionError(f"no connection to {self.host}:{self.port}")

    def watch(self, path: str, resource_version: str) -> Iterator[dict[str, Any]]:
        """Events of a collection after a version, until the server ends the watch; `path` holds its query."""
        connection = self._connect(_WATCH_SECONDS + 30)
        query = f"watch=1&allowWatchBookmarks=true&timeoutSeconds={_WATCH_SECONDS}&resourceVersion={resource_version}"
        try:
            connection.request("GET", f"{path}&{query}")
            answer = connection.getresponse()
            if answer.status >= 400:
                raise ApiError(answer.status, answer.read())
            while line := answer.readline():
                yield json.loads(line)
        finally:
            connection.close()
