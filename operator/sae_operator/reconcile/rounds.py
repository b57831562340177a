"""Rounds of work: what a status is about, and when another round begins.

A round is one walk through a resource's steps for one value of `retry`, of `tokens` and of a cache's hooks. Its key
stands on every Job, so that Jobs of an earlier round are never taken for those of the current one. Terminal is
terminal: only asking for more tokens or hooks, or raising `retry` of a failed resource, begins another round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sae_operator.api.status import CommonStatus
from sae_operator.reconcile.names import work_key


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        retry: value of `spec.retry`.
        tokens: tokens asked for; 0 means all that there are.
        hooks: keys of the hooks asked for; none for what has no hooks of its own.
        begins: it is not yet what the stored status is about.
    """

    retry: int
    tokens: int
    hooks: tuple[str, ...] = ()
    begins: bool = False

    @property
    def key(self) -> str:
        return work_key(self.retry, self.tokens, self.hooks)

    def exceeds(self, other: Round) -> bool:
        """Whether it asks for tokens or hooks that the other does not."""
        return self.tokens > other.tokens or not set(self.hooks) <= set(other.hooks)


def current_round(
    status: CommonStatus,
    ended: Literal["done", "failed"] | None,
    asked: Round,
    *,
    observed_hooks: Sequence[str] | None = None,
    more_interrupts: bool,
) -> Round:
    """The round that a resource is in.

    Args:
        status: as stored.
        ended: how the stored status' round ended; None while it has not.
        asked: the one that the spec asks for.
        observed_hooks: the hooks that the status is about; those asked for when it does not say.
        more_interrupts: asking for more ends a round that is going on; otherwise it is finished first.
    """
    asked = replace(asked, begins=True)
    if status.observed_tokens is None:
        return asked
    known_hooks = asked.hooks if observed_hooks is None else tuple(observed_hooks)
    known = Round(status.observed_retry or 0, status.observed_tokens, known_hooks)
    if asked.exceeds(known) and (ended is not None or more_interrupts):
        return asked
    if ended == "failed" and asked.retry > known.retry:
        return asked
    return known
