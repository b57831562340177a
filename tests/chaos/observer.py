"""Watches a namespace of a real API server and notes what must never be: two Jobs of a resource that live at once, one
for what another one has done, an end that is taken back."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from http.client import HTTPException
from typing import Any

from tests.api_connection import ApiConnection
from tests.operator_world import PLURALS
from tests.testbed.control_plane import ControlPlane

TERMINAL = frozenset({"Succeeded", "Ready", "Failed"})
RETRY_SECONDS = 0.3


class Observer:
    """Runs between `start` and `stop`; what it has seen go wrong is in `violations`."""

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self._control_plane, self._namespace = control_plane, namespace
        self._stop = threading.Event()
        self._jobs: dict[str, dict[str, str]] = defaultdict(dict)
        # Jobs that are there and have done their work, by what that is.
        self._done: dict[str, tuple[str, str, str]] = {}
        self._ended: dict[str, tuple[str, str]] = {}
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._watch, args=(kind,), daemon=True)
            for kind in ("Job", "SAETrainingJob", "ActivationCache")
        ]
        self.violations: list[str] = []
        self.seen = 0

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)

    def _watch(self, kind: str) -> None:
        """Begins anew, with a list, whenever the connection is lost."""
        path = PLURALS[kind].format(self._namespace)
        while not self._stop.is_set():
            api = ApiConnection(self._control_plane)
            try:
                status, body = api.request("GET", path)
                if status == 200:
                    listed = json.loads(body)
                    if kind == "Job":
                        self._relist(listed["items"])
                    for item in listed["items"]:
                        self._take(kind, "LISTED", item)
                    version = listed["metadata"]["resourceVersion"]
                    # Short, so that the end is noticed.
                    for line in api.stream(f"{path}?watch=true&resourceVersion={version}&timeoutSeconds=5"):
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            break
                        self._take(kind, event["type"], event["object"])
                        if self._stop.is_set():
                            break
            except (OSError, HTTPException):
                self._stop.wait(RETRY_SECONDS)

    def _relist(self, jobs: list[dict[str, Any]]) -> None:
        with self._lock:
            there = {job["metadata"]["uid"] for job in jobs}
            for live in self._jobs.values():
                for uid in [uid for uid in live if uid not in there]:
                    del live[uid]
            self._done = {uid: purpose for uid, purpose in self._done.items() if uid in there}

    def _take(self, kind: str, event: str, found: dict[str, Any]) -> None:
        with self._lock:
            self.seen += 1
            if kind == "Job":
                self._job(event, found)
            else:
                self._resource(event, found)

    def _job(self, event: str, job: dict[str, Any]) -> None:
        meta = job["metadata"]
        owner = next((one["uid"] for one in meta.get("ownerReferences") or [] if one.get("controller")), "")
        live = self._jobs[owner]
        ended = {
            condition["type"]
            for condition in (job.get("status") or {}).get("conditions") or []
            if condition["type"] in ("Complete", "Failed") and condition["status"] == "True"
        }
        purpose = owner, meta["labels"]["sae-operator.dev/step"], meta["annotations"]["sae-operator.dev/work"]
        if event == "ADDED" and purpose in self._done.values():
            self.violations.append(f"Job {meta['name']} does what was done already")
        if event == "DELETED":
            self._done.pop(meta["uid"], None)
        elif "Complete" in ended:
            self._done[meta["uid"]] = purpose
        if event == "DELETED" or ended:
            live.pop(meta["uid"], None)
        else:
            live[meta["uid"]] = meta["name"]
            if len(live) > 1:
                self.violations.append(f"Jobs {sorted(live.values())} live at once")

    def _resource(self, event: str, found: dict[str, Any]) -> None:
        uid, status = found["metadata"]["uid"], found.get("status") or {}
        phase, asked = status.get("phase") or "", f"{status.get('observedRetry')} {status.get('observedTokens')}"
        before = self._ended.get(uid)
        if before is not None and before != (phase, asked) and before[1] == asked:
            self.violations.append(f"{found['kind']} {found['metadata']['name']} was {before[0]} and became {phase}")
        if phase in TERMINAL:
            self._ended[uid] = phase, asked
        elif before is not None and before[1] != asked:
            del self._ended[uid]
