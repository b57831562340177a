"""Errors that end a step with a message for its user."""

from __future__ import annotations


class InvalidInput(Exception):
    """The specification or the data is wrong, and retrying cannot help: exit code 2.

    Attributes:
        reason: CamelCase word for a condition, e.g. `HookNotFound`.
        field: camelCase path of the field to change, e.g. `spec.hooks[0].name`; empty when none is to blame.
        message: one line: what is wrong, and the fix.
    """

    def __init__(self, reason: str, message: str, *, field: str = "") -> None:
        self.reason = reason
        self.field = field
        self.message = message
        super().__init__(f"{field}: {message}" if field else message)


class Stopped(Exception):
    """The step was asked to stop (SIGTERM) and has stored what it did: exit code 143.

    Attributes:
        message: what is stored and what is left.
        tokens: tokens of the last checkpoint, where there is one.
    """

    def __init__(self, message: str, *, tokens: int | None = None) -> None:
        self.message = message
        self.tokens = tokens
        super().__init__(message)


class PeerLost(Exception):
    """Another process of the same training ended or cannot be reached: exit code 1, and all are started again."""


class ClusterUnavailable(Exception):
    """A cluster's API server cannot be reached, or failed: exit code 1, and the same command may work later."""
