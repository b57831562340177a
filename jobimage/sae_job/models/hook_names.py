"""Names of hooks as specs give them, and which names were meant by wrong ones."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HookName:
    """A hook key taken apart.

    Attributes:
        key: `name`, or `name:head`.
        name: where in the model.
        head: the attention head that is taken alone; None for all of the activation.
        index: place in the spec's list of hooks.
    """

    key: str
    name: str
    head: int | None
    index: int = 0

    @property
    def name_field(self) -> str:
        """Path of the name in the spec, for messages."""
        return f"spec.hooks[{self.index}].name"

    @property
    def head_field(self) -> str:
        """Path of the head in the spec, for messages."""
        return f"spec.hooks[{self.index}].headIndex"


def parse_hook(key: str, index: int = 0) -> HookName:
    """`name` or `name:head`."""
    name, colon, head = key.partition(":")
    return HookName(key, name, int(head) if colon else None, index)


def parse_hooks(keys: Iterable[str]) -> list[HookName]:
    """Each key once, in order."""
    return [parse_hook(key, index) for index, key in enumerate(dict.fromkeys(keys))]


def nearest_names(name: str, names: Sequence[str], *, layers: Sequence[str] = (), count: int = 3) -> list[str]:
    """Names that are most like a wrong one, best first.

    Args:
        layers: names of the outputs of layers, with `{}` for the number: what stands for layer 8 in another library's
            names, such as `blocks.8.hook_resid_post` or `model.layers.8`, stands for layer 8 here.
    """
    nearest: list[str] = []
    if numbered := re.search(r"\.(\d+)(\.|$)", name):
        nearest = [there for pattern in layers if (there := pattern.format(numbered[1])) in names]
    nearest += difflib.get_close_matches(name, [there for there in names if there not in nearest], n=count, cutoff=0)
    return nearest[:count]
