"""Every version of the objects of one kind, as a watch of the real API server shows them."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

from tests.api_connection import ApiConnection
from tests.operator_world import PLURALS
from tests.testbed.control_plane import ControlPlane
from tests.testbed.waiting import wait_for

# One request lasts so long, the next goes on from where it ended; also how long the end of a watch takes at most.
REQUEST_SECONDS = 2


class ObjectWatch:
    """Watches a kind in a namespace inside the block, from its beginning.

    Attributes:
        versions: the objects as they were shown, in order; those that were deleted as they were last.
        deleted: names of objects that are gone.
    """

    def __init__(self, control_plane: ControlPlane, namespace: str, kind: str) -> None:
        self.versions: list[dict[str, Any]] = []
        self.deleted: set[str] = set()
        self._path = PLURALS[kind].format(namespace)
        self._api = ApiConnection(control_plane)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"watch of {kind}", daemon=True)
        listed = wait_for(self._list, what=f"{kind} is served, which takes a moment after its definition")
        assert not listed["items"], "a watch sees whole lives only of what is created later"
        self._seen = listed["metadata"]["resourceVersion"]

    def __enter__(self) -> ObjectWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(REQUEST_SECONDS + 10)
        if self._failure is not None:
            raise self._failure

    def of(self, name: str) -> list[dict[str, Any]]:
        """All versions of one object so far."""
        return [copy.deepcopy(found) for found in self.versions if found["metadata"]["name"] == name]

    def wait_for(self, holds: Callable[[dict[str, Any]], bool], name: str, *, what: str) -> dict[str, Any]:
        """The first version of an object that the condition holds for."""

        def seen() -> dict[str, Any] | None:
            assert self._failure is None, self._failure
            return next((found for found in self.of(name) if holds(found)), None)

        found = wait_for(seen, 60.0, what=lambda: f"{what}; it is {json.dumps((self.of(name) or [{}])[-1], indent=1)}")
        assert found is not None
        return found

    def caught_up(self, resource: dict[str, Any]) -> None:
        """Returns when this version has been seen."""
        meta = resource["metadata"]
        self.wait_for(
            lambda found: found["metadata"]["resourceVersion"] == meta["resourceVersion"],
            meta["name"],
            what=f"version {meta['resourceVersion']} of {meta['name']} is seen",
        )

    def _list(self) -> dict[str, Any]:
        status, body = self._api.request("GET", self._path)
        assert status in (200, 429), body
        return json.loads(body) if status == 200 else {}

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._read()
        except (OSError, HTTPException, AssertionError) as error:
            self._failure = error

    def _read(self) -> None:
        answer = self._api.stream(
            f"{self._path}?watch=true&resourceVersion={self._seen}&timeoutSeconds={REQUEST_SECONDS}"
        )
        assert answer.status == 200, answer.read()
        for line in answer:
            event = json.loads(line)
            assert event["type"] in ("ADDED", "MODIFIED", "DELETED"), event
            found = event["object"]
            self._seen = found["metadata"]["resourceVersion"]
            if event["type"] == "DELETED":
                self.deleted.add(found["metadata"]["name"])
            self.versions.append(found)
