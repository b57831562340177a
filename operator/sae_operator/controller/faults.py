"""Kills the process at the n-th API call, so that tests can prove that a crash at any point does no harm."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# `n` or `n:after` ends the process right after the n-th call was answered, `n:before` right before it is sent; `0` only
# numbers the calls.
ENV_EXIT_AFTER_CALLS = "SAE_OPERATOR_EXIT_AFTER_CALLS"
EXIT_CODE = 137


@dataclass
class CallFaults:
    """Numbers the API calls and ends the process, as SIGKILL would, at call `number` (0: never)."""

    number: int
    before: bool
    count: int = 0

    @classmethod
    def from_environment(cls) -> CallFaults | None:
        """None, at no cost, unless a test asks for it."""
        text = os.environ.get(ENV_EXIT_AFTER_CALLS)
        if not text:
            return None
        number, _, moment = text.partition(":")
        return cls(number=int(number), before=moment == "before")

    def sending(self, method: str, path: str) -> int:
        """Counts a call that is about to be sent and returns its number."""
        self.count += 1
        logger.info("API call %d: %s %s", self.count, method, path)
        if self.before and self.count == self.number:
            os._exit(EXIT_CODE)
        return self.count

    def answered(self, number: int) -> None:
        """The call with this number was answered, whatever the answer."""
        if not self.before and number == self.number:
            os._exit(EXIT_CODE)
