"""A language model that runs as far as its hooks and no further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from sae_job.models.forward import Forward
from sae_job.models.hook_names import parse_hooks
from sae_job.models.sites import LastHookReached, Site, take


class HookedModel:
    """Activations at several hooks from one forward pass, which ends right after the last of them."""

    def __init__(self, model: nn.Module, forward: Forward, sites: Mapping[str, Site], hooks: Sequence[str]) -> None:
        """
        Args:
            model: in evaluation mode.
            forward: its forward pass.
            sites: the place of each name.
            hooks: hook keys, `name` or `name:head`.
        """
        self._model = model
        self._forward = forward
        self._hooks = parse_hooks(hooks)
        self._names = list(dict.fromkeys(hook.name for hook in self._hooks))
        self._captured: dict[str, Tensor] = {}
        for name in self._names:
            sites[name].watch(forward.outside(partial(self._capture, name)))

    def _capture(self, name: str, activation: Tensor) -> None:
        # Of a module that runs several times, such as a layer that is shared, the first counts.
        if name in self._captured:
            return
        last = len(self._captured) + 1 == len(self._names)
        # What follows in this pass may add to the tensor in place.
        self._captured[name] = activation if last else activation.clone()
        if last:
            raise LastHookReached

    @torch.no_grad()
    def activations(self, tokens: Tensor) -> dict[str, Tensor]:
        """Activations at each hook.

        Args:
            tokens: integer [batch, context].

        Returns:
            hook key -> [batch, context, d_in], on the model's device, in its number format.
        """
        self._captured = {}
        with suppress(LastHookReached):
            self._forward(tokens)
        captured, self._captured = self._captured, {}
        # Of a model that is spread over several devices each hook may lie on another.
        return {hook.key: take(captured[hook.name], hook.head).to(self.device) for hook in self._hooks}

    def parameter_bytes(self) -> int:
        """Memory of the weights that were loaded; weights that are tied count once."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._model.parameters())

    @property
    def device(self) -> torch.device:
        """Where activations are given."""
        return self._forward.device

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self._model
