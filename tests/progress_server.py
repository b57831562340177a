"""What the pods of the fake kubelet answer when the operator asks for their progress."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from sae_operator.api.steps import PROGRESS_PORT
from tests.fake_kubelet import POD_IP


@contextmanager
def progress_served(**fields: Any) -> Iterator[None]:
    """Inside the block every pod says this of its training, e.g. `tokens=640, checkpointTokens=640`."""
    told = {"step": "train", "totalTokens": 1000, "updatedAt": datetime.now(UTC).isoformat(), **fields}
    body = json.dumps(told).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer((POD_IP, PROGRESS_PORT), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
