"""Sweeps' trials in outline, kept for as long as a space stays as it is."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from dataclasses import dataclass

from sae_operator.api.identity import canonical_hash
from sae_operator.api.sweep import SAESweepSpec, Space
from sae_operator.api.sweep_expansion import SweepInvalid
from sae_operator.reconcile.observed import InvalidSpec, SpecProblem
from sae_operator.reconcile.sweep_trials import Outline, outline

# Trials of all sweeps that are kept, some 500 bytes each.
KEPT_TRIALS = 20_000
# Spaces of so many trials are expanded at once, in some 20 ms.
FEW_TRIALS = 50


@dataclass(frozen=True)
class _Kept:
    generation: int
    space: str
    found: Outline | InvalidSpec

    @property
    def size(self) -> int:
        return len(self.found.trials) if isinstance(self.found, Outline) else 1


class Outlines:
    """By a sweep's UID."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    async def of(self, uid: str, generation: int, spec: SAESweepSpec) -> Outline | InvalidSpec:
        """The trials, or what is wrong with the space. A large one takes seconds, in a thread: the event loop goes on
        meanwhile."""
        kept = self._kept.get(uid)
        if kept is None or kept.generation != generation:
            space = _space(spec)
            if kept is not None and kept.space == space:
                found = kept.found
            elif size_of(spec.space) <= FEW_TRIALS:
                found = _outline(spec)
            else:
                found = await asyncio.to_thread(_outline, spec)
            kept = self._kept[uid] = _Kept(generation, space, found)
            self._drop_oldest(uid)
        self._kept.move_to_end(uid)
        return kept.found

    def forget(self, uid: str) -> None:
        """The sweep is gone."""
        self._kept.pop(uid, None)

    def _drop_oldest(self, but: str) -> None:
        total = sum(kept.size for kept in self._kept.values())
        for uid in list(self._kept):
            if total <= KEPT_TRIALS:
                return
            if uid != but:
                total -= self._kept.pop(uid).size


def size_of(space: Space) -> int:
    """Trials of a space, by its method; it may be refused for them."""
    if space.method == "grid":
        return math.prod(len(parameter.values or ()) for parameter in space.parameters)
    return len(space.trials or ()) if space.method == "list" else space.count or 0


def _space(spec: SAESweepSpec) -> str:
    """Tells spaces apart; what else a spec says changes no trial."""
    stop = spec.median_stop.to_manifest() if spec.median_stop is not None else None
    return canonical_hash([spec.template.to_manifest(), spec.space.to_manifest(), spec.objective.to_manifest(), stop])


def _outline(spec: SAESweepSpec) -> Outline | InvalidSpec:
    try:
        return outline(spec)
    except SweepInvalid as error:
        return InvalidSpec(tuple(SpecProblem(problem.field, problem.message) for problem in error.problems))
