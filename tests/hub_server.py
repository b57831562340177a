"""A stand-in for the Hugging Face Hub on the loopback interface: repositories are folders, at one commit each."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40

Trouble = Literal["unavailable", "stalls"]


@dataclass
class Hub:
    """
    Attributes:
        url: what HF_ENDPOINT is set to.
        models: folder of each model.
        datasets: folder of each data set.
        revisions: what branches and tags stand for.
        answers: path of a request -> status, the Hub's error code, commit; before anything else.
        troubles: part of a path -> what happens to requests of such paths.
        requests: methods and paths of the requests so far.
    """

    url: str
    models: dict[str, Path] = field(default_factory=dict)
    datasets: dict[str, Path] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    answers: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    troubles: dict[str, Trouble] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def folder(self, kind: str, name: str) -> Path | None:
        return (self.models if kind == "models" else self.datasets).get(name)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        self._serve(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _serve(self, body: bytes) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.hub.requests.append(f"{self.command} {path}")
        trouble = next((kind for part, kind in self.hub.troubles.items() if part in path), None)
        if trouble == "stalls":
            self.hub.ended.wait()
            self.close_connection = True
        elif trouble == "unavailable":
            self._send(503, b"")
        elif path in self.hub.answers:
            status, code, commit = self.hub.answers[path]
            self._json({"id": "x", "_id": "x", "sha": commit, "siblings": []}, status=status, code=code)
        elif path.startswith("/api/"):
            self._api(path.removeprefix("/api/"), body)
        elif "/resolve/" in path:
            self._file(path.removeprefix("/"))
        else:
            self._send(404, b"")

    def _api(self, path: str, body: bytes) -> None:
        """`models/team/name`, and `/revision/R`, `/tree/R/FOLDER`, `/paths-info/R` behind it."""
        kind, _, rest = path.partition("/")
        words = rest.split("/")
        name, action = "/".join(words[:2]), words[2] if len(words) > 2 else ""
        folder = self.hub.folder(kind, name)
        if folder is None:
            self._json({}, status=404, code="RepoNotFound")
            return
        revision = words[3] if len(words) > 3 else "main"
        commit = self._commit(revision)
        if commit is None:
            self._json({}, status=404, code="RevisionNotFound")
        elif action in ("", "revision"):
            siblings = [{"rfilename": entry["path"]} for entry in _tree(folder) if entry["type"] == "file"]
            self._json({"id": name, "_id": name, "sha": commit, "siblings": siblings, "private": False})
        elif action == "tree":
            below = "/".join(words[4:])
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            entries = [entry for entry in _tree(folder) if _below(entry["path"], below, recursive=recursive)]
            self._json(entries) if entries or not below else self._json({}, status=404, code="EntryNotFound")
        elif action == "paths-info":
            form = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            self._json([entry for entry in _tree(folder) if entry["path"] in form.get("paths", [])])
        else:
            self._json({}, status=404, code="EntryNotFound")

    def _commit(self, revision: str) -> str | None:
        known = self.hub.revisions
        return known.get(revision) or (revision if revision in known.values() else None)

    def _file(self, path: str) -> None:
        """`team/name/resolve/R/FILE`, and `datasets/` before it."""
        kind = "datasets" if path.startswith("datasets/") else "models"
        name, _, rest = path.removeprefix("datasets/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        folder, commit = self.hub.folder(kind, name), self._commit(revision)
        if folder is None or commit is None:
            self._json({}, status=404, code="RepoNotFound" if folder is None else "RevisionNotFound")
            return
        if not (folder / file).is_file():
            self._json({}, status=404, code="EntryNotFound", headers={"X-Repo-Commit": commit})
            return
        data = (folder / file).read_bytes()
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start, _, stop = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not start:
            self._send(200, data, headers)
            return
        last = min(int(stop) if stop else len(data) - 1, len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{last}/{len(data)}"
        self._send(206, data[int(start) : last + 1], headers)

    def _json(self, content: Any, *, status: int = 200, code: str = "", headers: dict[str, str] | None = None) -> None:
        told = {"Content-Type": "application/json", **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._send(status, json.dumps(content).encode(), told)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not worth a line."""


def _tree(folder: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            entries.append({"type": "directory", "path": name, "oid": "0" * 40, "size": 0})
        else:
            data = path.read_bytes()
            entries.append({"type": "file", "path": name, "oid": _digest(data), "size": len(data)})
    return entries


def _below(path: str, folder: str, *, recursive: bool) -> bool:
    rest = path.removeprefix(f"{folder}/") if folder else path
    return (not folder or rest != path) and (recursive or "/" not in rest)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
