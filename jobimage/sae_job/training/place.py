"""Where a process stands among those that train together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """One of the processes that train together.

    Attributes:
        index: which it is of all, from 0; the first one alone writes.
        size: how many there are.
        local_index: which it is in its pod: its GPU.
    """

    index: int = 0
    size: int = 1
    local_index: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """The place that torchrun gives a process in its environment."""
        return cls(
            int(environment.get("RANK", "0")),
            int(environment.get("WORLD_SIZE", "1")),
            int(environment.get("LOCAL_RANK", "0")),
        )


ALONE = Place()
