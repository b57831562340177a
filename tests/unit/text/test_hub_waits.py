"""How long servers of the Hub are asked again, by a clock of the test's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sae_job.text.hub_waits import HubUnreachable, HubWaits, Watch

WAITS = HubWaits(answer_seconds=10, upload_seconds=60, trouble_seconds=90)


class Asking:
    """Requests at chosen times."""

    def __init__(self) -> None:
        self.now = 0.0
        self._watch = Watch(WAITS, clock=lambda: self.now)

    def ask(self, host: str = "hub", *, at: float, answer: int | None = None) -> Any:
        """Send a request; `answer` is its status, None when nothing comes back."""
        self.now = at
        request = SimpleNamespace(method="GET", url=SimpleNamespace(host=host, port=None), extensions={})
        self._watch.before(request)
        if answer is not None:
            self._watch.after(SimpleNamespace(status_code=answer, request=request))
        return request


def test_a_server_in_trouble_is_asked_for_a_while_and_then_no_more() -> None:
    asking = Asking()
    for at in (0, 30, 60, 90):
        asking.ask(at=at, answer=503)
    with pytest.raises(HubUnreachable, match="hub has given no good answer for 90 seconds"):
        asking.ask(at=91)


def test_a_good_answer_ends_the_trouble() -> None:
    asking = Asking()
    asking.ask(at=0)
    asking.ask(at=80, answer=404)
    asking.ask(at=120)
    asking.ask(at=200)


def test_the_trouble_of_one_server_is_not_anothers() -> None:
    asking = Asking()
    for at in (0, 30, 60, 90):
        asking.ask("files", at=at)
    asking.ask("hub", at=91)


def test_after_a_pause_it_is_another_attempt() -> None:
    asking = Asking()
    asking.ask(at=0)
    asking.ask(at=1 + WAITS.pause_seconds)
    asking.ask(at=60 + WAITS.pause_seconds)


def test_a_request_waits_no_longer_than_it_is_told_to() -> None:
    assert Asking().ask(at=0).extensions["timeout"] == dict.fromkeys(("connect", "read", "write", "pool"), 10)
