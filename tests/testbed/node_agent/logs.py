"""What the API server asks for `kubectl logs`: the logs of containers, over HTTPS with client certificates."""

from __future__ import annotations

import http.server
import shutil
import ssl
import threading
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

_FOLLOW_SECONDS = 0.1


def serve_logs(
    logs: Path, is_running: Callable[[str], bool], *, certificate: str, key: str, client_authority: str
) -> int:
    """Serve `/containerLogs/NAMESPACE/POD/CONTAINER` in a thread; `is_running` is asked for a uid. Returns the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Requests are not worth a line."""

        def do_GET(self) -> None:
            address = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(address.query))
            file = _log_file(logs, address.path.strip("/").split("/"), previous=query.get("previous") == "true")
            if file is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            self._send(file, int(query["tailLines"]) if "tailLines" in query else None, query.get("follow") == "true")

        def _send(self, file: Path, tail_lines: int | None, follow: bool) -> None:
            pause = threading.Event()  # never set
            uid = file.parent.name.rsplit("_", 1)[1]
            with open(file, "rb") as log:
                if tail_lines is not None:
                    lines = log.readlines()
                    self.wfile.write(b"".join(lines[max(0, len(lines) - tail_lines) :]))
                shutil.copyfileobj(log, self.wfile)
                while follow:
                    follow = is_running(uid)  # asked before reading, so that the last lines are read
                    shutil.copyfileobj(log, self.wfile)
                    self.wfile.flush()
                    pause.wait(_FOLLOW_SECONDS)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    tls.load_verify_locations(client_authority)
    tls.verify_mode = ssl.CERT_REQUIRED
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, name="logs", daemon=True).start()
    return server.server_address[1]


def _log_file(logs: Path, parts: list[str], *, previous: bool) -> Path | None:
    """The log of the newest pod of that name, of the container's last run or of the one before."""
    if len(parts) != 4 or parts[0] != "containerLogs":
        return None
    _, namespace, pod, container = parts
    files = sorted(logs.glob(f"{namespace}_{pod}_*/{container}-*.log"), key=lambda file: file.stat().st_mtime)
    wanted = 2 if previous else 1
    return files[-wanted] if len(files) >= wanted else None
