"""A stand-in for the server of Weights & Biases, on the loopback interface: takes runs, refuses, or never answers."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

Behaviour = Literal["serve", "refuse", "stall"]


class WandbServer:
    """The part of the server that the client needs to open a run and to send its history.

    Attributes:
        behaviour: `serve`; `refuse`: status 500 to everything; `stall`: no answer.
        last_steps: id of runs that exist already -> their last step.
    """

    def __init__(self) -> None:
        self.behaviour: Behaviour = "serve"
        self.last_steps: dict[str, int] = {}
        self._steps: dict[str, list[int]] = {}
        self._released = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if owner.behaviour == "stall":
                    owner._released.wait()
                    self.close_connection = True
                    return
                answer = b"" if owner.behaviour == "refuse" else owner._answer(self.path, body)
                self.send_response(500 if owner.behaviour == "refuse" else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST

            def log_message(self, format: str, *args: object) -> None:
                """The tests' output is no place for requests."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def steps(self, id: str) -> list[int]:
        """Steps of the rows that arrived of a run."""
        return self._steps.get(id, [])

    def _answer(self, path: str, body: bytes) -> bytes:
        if path.endswith("/graphql"):
            request = json.loads(body)
            return json.dumps({"data": self._data(request["query"], request.get("variables") or {})}).encode()
        if found := re.search(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            rows = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self._steps.setdefault(found[1], []).extend(json.loads(row)["_step"] for row in rows)
        return b"{}"

    def _data(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
        if "RunResumeStatus" in query:
            return {"model": {**project, "bucket": self._bucket(variables["name"])}}
        if "upsertBucket" in query:
            bucket = {"id": variables.get("name"), "name": variables.get("name"), "displayName": "", "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
        if "CreateRunFiles" in query:
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": []}}
        return {
            "project": None,
            "viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
        }

    def _bucket(self, id: str) -> dict[str, Any] | None:
        """What the client asks of a run that exists; None of one that does not."""
        if id not in self.last_steps:
            return None
        last = self.last_steps[id]
        return {
            "id": id,
            "name": id,
            "summaryMetrics": json.dumps({"_step": last}),
            "displayName": id,
            "logLineCount": 0,
            "historyLineCount": last,
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps({"_step": last, "_runtime": 1})]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            # Without it the client takes the run for one that never began.
            "wandbConfig": json.dumps({"t": 1}),
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
