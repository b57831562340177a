"""Rounds of work: what a status is about, and when another round begins.

A round is one walk through a resource's steps for one value of `retry` and of `tokens`. Its key stands on every Job, so
that Jobs of an earlier round are never taken for those of the current one. Terminal is terminal: only raising `tokens`,
or `retry` of a failed resource, begins another round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sae_operator.api.status import CommonStatus
from sae_operator.reconcile.names import work_key


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        retry: value of `spec.retry`.
        tokens: tokens asked for; 0 means all that there are.
        begins: it is not yet what the stored status is about.
    """

    retry: int
    tokens: int
    begins: bool = False

    @property
    def key(self) -> str:
        return work_key(self.retry, self.tokens)


def current_round(
    status: CommonStatus,
    ended: Literal["done", "failed"] | None,
    *,
    retry: int,
    tokens: int | None,
    more_tokens_interrupt: bool,
) -> Round:
    """The round that a resource is in.

    Args:
        status: as stored.
        ended: how the stored status' round ended; None while it has not.
        retry, tokens: what the spec asks for.
        more_tokens_interrupt: raised tokens end a round that is going on; otherwise it is finished first.
    """
    asked = Round(retry, tokens or 0, begins=True)
    if status.observed_tokens is None:
        return asked
    known = Round(status.observed_retry or 0, status.observed_tokens)
    if asked.tokens > known.tokens and (ended is not None or more_tokens_interrupt):
        return asked
    if ended == "failed" and asked.retry > known.retry:
        return asked
    return known
