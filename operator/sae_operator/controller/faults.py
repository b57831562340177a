"""Kills the process at a chosen API call, so that tests can prove that a crash at any point does no harm."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Self

logger = logging.getLogger(__name__)

# `POST jobs#2:after` ends the process right after the second Job was answered, `POST jobs#2:before` right before it is
# sent; `never` only tells the calls in the log.
ENV_EXIT_AT_CALL = "SAE_OPERATOR_EXIT_AT_CALL"
EXIT_CODE = 137


@dataclass(frozen=True, order=True)
class Call:
    """One API call of a process: the n-th of its kind, from 1.

    Attributes:
        kind: method, resource and subresource, e.g. `PATCH activationcaches/status`.
    """

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}#{self.number}"

    @classmethod
    def parse(cls, text: str) -> Self:
        kind, _, number = text.rpartition("#")
        return cls(kind, int(number))


def kind_of(method: str, path: str) -> str:
    """The kind of a call; paths without a resource are discovery."""
    parts = path.strip("/").split("/")
    below = parts[2 if parts[0] == "api" else 3 :]
    if below[:1] == ["namespaces"] and len(below) > 2:
        below = below[2:]
    return f"{method} {'/'.join((*below[:1], *below[2:])) or 'discovery'}"


@dataclass
class CallFaults:
    """Counts the API calls of each kind and ends the process, as SIGKILL would, at one of them (None: never)."""

    at: Call | None
    before: bool
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_environment(cls) -> CallFaults | None:
        """None, at no cost, unless a test asks for it."""
        text = os.environ.get(ENV_EXIT_AT_CALL)
        if not text:
            return None
        call, _, moment = text.partition(":")
        return cls(None if call == "never" else Call.parse(call), before=moment == "before")

    def sending(self, method: str, path: str) -> Call:
        """Counts a call that is about to be sent, and tells which one it is."""
        kind = kind_of(method, path)
        self.counts[kind] += 1
        call = Call(kind, self.counts[kind])
        logger.info("API call %s: %s", call, path)
        if self.before and call == self.at:
            os._exit(EXIT_CODE)
        return call

    def answered(self, call: Call) -> None:
        """The call was answered, whatever the answer."""
        if not self.before and call == self.at:
            os._exit(EXIT_CODE)
