"""The whole language model, with activations replaced on the way: what a reconstruction costs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sae_job.models.forward import Forward
from sae_job.models.hook_names import parse_hook
from sae_job.models.sites import Site, first_tensor, put, take

Replacement = Callable[[Tensor], Tensor]


class FullModel:
    """Next-token cross entropy of a model, clean or spliced."""

    def __init__(self, forward: Forward, sites: Mapping[str, Site], *, module: nn.Module | None = None) -> None:
        """
        Args:
            forward: the model's forward pass, which gives logits.
            sites: the place of each name that a hook may have.
            module: the model's weights, where they may be moved between uses.
        """
        self._forward = forward
        self._sites = sites
        self._module = module
        self._replaced: set[str] = set()

    @property
    def device(self) -> torch.device:
        return self._forward.device

    @property
    def movable(self) -> bool:
        """Whether the weights can leave the device between uses: all lie on one, and none is compiled for it."""
        module = self._module
        return module is not None and not self._forward.compiled and len({p.device for p in module.parameters()}) == 1

    def move_to(self, device: torch.device | str) -> None:
        """Bring the weights of a `movable` model to a device; before the next use they must be back on `device`."""
        assert self._module is not None
        self._module.to(device)

    @torch.no_grad()
    def logits(
        self,
        tokens: Tensor,
        *,
        replace: Mapping[str, Replacement] | None = None,
        ignore_token_ids: Iterable[int] = (),
    ) -> Tensor:
        """Predictions [batch, context, vocabulary] of the token after each position, on `device`.

        Args:
            tokens: integer [batch, context].
            replace: hook key -> function from its activations [n, d_in] to what the model goes on with, in any number
                format; positions are flattened.
            ignore_token_ids: at positions that hold one, activations stay as they are.

        Raises:
            ValueError: the model never comes to a hook, so that nothing was replaced.
        """
        tokens = tokens.to(self.device, torch.int64)
        return self._run(tokens, _ignored(tokens, ignore_token_ids), replace or {})

    @torch.no_grad()
    def cross_entropy(
        self,
        tokens: Tensor,
        *,
        replace: Mapping[str, Replacement] | None = None,
        ignore_token_ids: Iterable[int] = (),
    ) -> tuple[float, int]:
        """Sum of the next-token cross entropy over predictions that count, and their number.

        A prediction counts unless the predicted token is ignored. At positions that hold an ignored token, activations
        stay as they are: neither reconstructed nor ablated.

        Args:
            tokens: integer [batch, context].
            replace: hook key -> function from its activations [n, d_in] to what the model goes on with, in any number
                format; positions are flattened.
            ignore_token_ids: special tokens.

        Raises:
            ValueError: the model never comes to a hook, so that nothing was replaced.
        """
        tokens = tokens.to(self.device, torch.int64)
        ignored = _ignored(tokens, ignore_token_ids)
        logits = self._run(tokens, ignored, replace or {})
        total, count = 0.0, 0
        # One context at a time: logits in float32 of a whole batch can be larger than the model.
        for row, predicted, skip in zip(logits[:, :-1], tokens[:, 1:], ignored[:, 1:], strict=True):
            losses = -torch.log_softmax(row.float(), dim=-1).gather(1, predicted[:, None])[:, 0]
            total += float(losses[~skip].double().sum())
            count += int((~skip).sum())
        return total, count

    def _run(self, tokens: Tensor, ignored: Tensor, replace: Mapping[str, Replacement]) -> Tensor:
        with ExitStack() as stack:
            for key, replacement in replace.items():
                hook = parse_hook(key)
                look = partial(self._replace, key, replacement, ignored, hook.head)
                stack.callback(self._sites[hook.name].watch(self._forward.outside(look)).remove)
            self._replaced = set()
            logits = _logits(self._forward(tokens)).to(self.device)
        if missed := set(replace) - self._replaced:
            raise ValueError(f"the forward pass did not come to {sorted(missed)}")
        return logits

    def _replace(
        self, key: str, replacement: Replacement, keep: Tensor, head: int | None, activation: Tensor
    ) -> Tensor:
        self._replaced.add(key)
        return splice(activation, replacement, keep, head=head)


def splice(activation: Tensor, replacement: Replacement, keep: Tensor, *, head: int | None = None) -> Tensor:
    """An activation with a hook's part replaced, but for positions to keep; cast back to its number format.

    Args:
        activation: [batch, context, width] or [batch, context, heads, width].
        replacement: from [n, d_in] on the positions that are not kept, in order.
        keep: bool [batch, context], where the replacement is computed.
        head: the head that the hook takes alone.
    """
    there = ~keep.to(activation.device)
    changed = take(activation, head).clone()
    # Of a model that is spread over several devices the activation may lie on another; the replacement is exact where
    # the model is cast.
    with torch.autocast(keep.device.type, enabled=False):
        changed[there] = replacement(changed[there].to(keep.device)).to(changed)
    return put(activation, head, changed)


def _ignored(tokens: Tensor, ids: Iterable[int]) -> Tensor:
    """Which tokens are among these ids; bool, of the shape of `tokens`."""
    return torch.isin(tokens, torch.tensor(sorted(ids), dtype=tokens.dtype, device=tokens.device))


def _logits(output: Any) -> Tensor:
    """Logits of a model's output: its `logits`, the first element of a tuple, or the tensor itself."""
    found = getattr(output, "logits", None)
    found = first_tensor(output) if found is None else found
    if found is None:
        raise TypeError(f"the model's output has no logits: {type(output).__name__}")
    return found
