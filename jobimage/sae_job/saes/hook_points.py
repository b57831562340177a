"""Named places in an SAE's forward pass where a caller may read or replace what passes.

A hook point is a module that gives back what it gets, so PyTorch's own `register_forward_hook` works on it; nothing
else is needed. In the order in which they fire:

    hook_sae_input       the input, flattened, in the SAE's number format
    hook_sae_acts_pre    pre-activations (of a gated SAE: those of the magnitudes)
    hook_sae_acts_post   activations of the latents
    hook_sae_recons      what the decoder gives, before normalisation is undone and before a skip connection
    hook_sae_error       the error term, where it is used
    hook_sae_output      what the SAE gives
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

INPUT, ACTS_PRE, ACTS_POST = "hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post"
RECONS, ERROR, OUTPUT = "hook_sae_recons", "hook_sae_error", "hook_sae_output"
HOOK_POINTS = (INPUT, ACTS_PRE, ACTS_POST, RECONS, ERROR, OUTPUT)

# Called with the tensor and `hook=` its hook point; what it returns takes the tensor's place, None leaves it.
HookFunction = Callable[..., Tensor | None]


class HookPoint(torch.nn.Module):
    """Gives back what it gets.

    Attributes:
        name: its name in the SAE.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return x

    @property
    def hooked(self) -> bool:
        """Whether anybody reads or replaces what passes here."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks)


class HookedModule(torch.nn.Module):
    """A module with the hook points of an SAE."""

    def __init__(self) -> None:
        super().__init__()
        for name in HOOK_POINTS:
            setattr(self, name, HookPoint(name))

    def at(self, name: str, tensor: Tensor, *, hooks: bool = True) -> Tensor:
        """What passes a hook point; without hooks, the tensor itself."""
        return getattr(self, name)(tensor) if hooks else tensor

    def hooked(self, name: str) -> bool:
        """Whether anybody reads or replaces what passes a hook point."""
        return getattr(self, name).hooked

    def run_with_hooks(
        self, x: Tensor, fwd_hooks: Sequence[tuple[str, HookFunction]] = (), *, target: Tensor | None = None
    ) -> Tensor:
        """`forward` of (x, target) with functions on hook points, which are gone afterwards.

        Args:
            fwd_hooks: names of hook points, and what is called there with the tensor and `hook=` its hook point; what
                it returns takes the tensor's place.

        Raises:
            ValueError: a name is not one of a hook point.
        """
        with ExitStack() as registered:
            for name, function in fwd_hooks:
                if name not in HOOK_POINTS:
                    raise ValueError(f"no hook point {name!r}; there are {', '.join(HOOK_POINTS)}")
                handle = getattr(self, name).register_forward_hook(_as_forward_hook(function))
                registered.callback(handle.remove)
            return self(x, target)

    def run_with_cache(self, x: Tensor, *, target: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """`forward` of (x, target), and what passed each hook point, in the order in which it did."""
        cache: dict[str, Tensor] = {}

        def keep(tensor: Tensor, *, hook: HookPoint) -> None:
            cache[hook.name] = tensor

        return self.run_with_hooks(x, [(name, keep) for name in HOOK_POINTS], target=target), cache


def _as_forward_hook(function: HookFunction) -> Callable[[torch.nn.Module, Any, Tensor], Tensor | None]:
    def forward_hook(point: torch.nn.Module, _: Any, output: Tensor) -> Tensor | None:
        return function(output, hook=point)

    return forward_hook
