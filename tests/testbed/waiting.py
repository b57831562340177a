"""Waiting for a condition, always with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def wait_for(
    condition: Callable[[], Result],
    timeout: float = 90.0,
    *,
    what: str | Callable[[], str] = "the condition",
    interval: float = 0.05,
) -> Result:
    """Ask `condition` every `interval` seconds until its answer is true, and return that answer.

    Raises `TimeoutError` naming `what` (a function is asked at the end, so that it can tell the last state) after
    `timeout` seconds. Exceptions of the condition are not caught.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            told = what() if callable(what) else what
            raise TimeoutError(f"not within {timeout:g} s: {told}")
        time.sleep(interval)
