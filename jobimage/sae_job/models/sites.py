"""Places in a model where activations are seen and replaced.

An activation is a tensor [batch, context, width], or [batch, context, heads, width] where the model splits it into
attention heads; what a hook makes of it is [batch, context, d_in]: all heads one after the other, or one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

# Given an activation; what it returns, unless None, is what the model goes on with.
Look = Callable[[Tensor], Tensor | None]


class LastHookReached(Exception):
    """Ends a forward pass once every hook has its activation."""


class NoTensor(TypeError):
    """A hook lies where the model has something else than a tensor."""

    def __init__(self, name: str, there: object) -> None:
        self.name = name
        super().__init__(f"{name} is a {type(there).__name__}, not a tensor")


class Removable(Protocol):
    def remove(self) -> None: ...


class Site(Protocol):
    """One place in a model."""

    def watch(self, look: Look) -> Removable:
        """Call `look` with every activation from now on.

        The model raises `NoTensor` when it has none there.
        """
        ...


@dataclass(frozen=True)
class ModuleOutput:
    """The output of a module: the tensor, or the first element of a tuple where that is one.

    Attributes:
        name: what the site is called.
        heads: into how many heads the last dimension is split; None leaves it whole.
    """

    name: str
    module: nn.Module
    heads: int | None = None

    def watch(self, look: Look) -> Removable:
        def see(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            replaced = _seen(self.name, output, look, self.heads)
            if replaced is None:
                return None
            return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

        return self.module.register_forward_hook(see)


@dataclass(frozen=True)
class ModuleInput:
    """The first input of a module.

    Attributes:
        name, heads: as in `ModuleOutput`.
    """

    name: str
    module: nn.Module
    heads: int | None = None

    def watch(self, look: Look) -> Removable:
        def see(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            replaced = _seen(self.name, inputs, look, self.heads)
            return None if replaced is None else (replaced, *inputs[1:])

        return self.module.register_forward_pre_hook(see)


def first_tensor(output: Any) -> Tensor | None:
    """The activation in a module's output: the tensor, or the first element of a tuple where that is one."""
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _seen(name: str, output: Any, look: Look, heads: int | None) -> Tensor | None:
    activation = first_tensor(output)
    if activation is None:
        raise NoTensor(name, output)
    if heads is None:
        return look(activation)
    replaced = look(activation.unflatten(-1, (heads, -1)))
    return None if replaced is None else replaced.flatten(2)


def take(activation: Tensor, head: int | None) -> Tensor:
    """What a hook makes of an activation: [batch, context, d_in]; a view where it can be."""
    if head is not None:
        return activation[:, :, head]
    return activation.flatten(2) if activation.ndim > 3 else activation


def put(activation: Tensor, head: int | None, changed: Tensor) -> Tensor:
    """A copy of an activation in which a hook's part is `changed`, [batch, context, d_in]."""
    if head is None:
        return changed.reshape(activation.shape)
    copy = activation.clone()
    copy[:, :, head] = changed
    return copy
