"""A language model that runs as far as its hooks and no further."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sae_job.models.anatomy import LastHookReached, first_tensor


class HookedModel:
    """Activations at several hooks from one forward pass, which ends right after the last of them."""

    def __init__(self, model: nn.Module, hooks: Sequence[str], *, device: torch.device) -> None:
        """
        Args:
            model: in evaluation mode, on `device`.
            hooks: paths of its modules.
        """
        self._model = model
        self._hooks = tuple(dict.fromkeys(hooks))
        self._captured: dict[str, Tensor] = {}
        self.device = device
        for hook in self._hooks:
            model.get_submodule(hook).register_forward_hook(partial(self._capture, hook))

    def _capture(self, hook: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        activation = first_tensor(output)
        if activation is None:
            raise TypeError(f"module {hook} gave {type(output).__name__}, not a tensor")
        if len(self._captured) + 1 == len(self._hooks):
            self._captured[hook] = activation
            raise LastHookReached
        # What follows in this pass may add to the tensor in place.
        self._captured[hook] = activation.clone()

    @torch.no_grad()
    def activations(self, tokens: Tensor) -> dict[str, Tensor]:
        """Output of each hooked module.

        Args:
            tokens: integer [batch, context].

        Returns:
            hook -> [batch, context, d_in], on the model's device, in its number format.
        """
        self._captured = {}
        with suppress(LastHookReached):
            self._model(tokens.to(self.device, torch.int64))
        captured, self._captured = self._captured, {}
        return {hook: captured[hook] for hook in self._hooks}

    def parameter_bytes(self) -> int:
        """Memory of the weights that were loaded; weights that are tied count once."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._model.parameters())

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self._model
