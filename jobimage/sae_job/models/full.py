"""The whole language model, with activations replaced on the way: what a reconstruction costs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sae_job.models.anatomy import first_tensor

Replacement = Callable[[Tensor], Tensor]


def zero_ablation(activations: Tensor) -> Tensor:
    """The replacement that removes what a hook carries."""
    return torch.zeros_like(activations)


class FullModel:
    """Next-token cross entropy of a model, clean or spliced."""

    def __init__(self, model: nn.Module, *, device: torch.device) -> None:
        self._model = model
        self.device = device

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
            replace: hook -> function from its activations [n, d_in] to what the model goes on with, in any number
                format; positions are flattened.
            ignore_token_ids: special tokens.
        """
        tokens = tokens.to(self.device, torch.int64)
        ignored = torch.isin(tokens, torch.tensor(sorted(ignore_token_ids), dtype=torch.int64, device=self.device))
        with ExitStack() as stack:
            for hook, replacement in (replace or {}).items():
                module = self._model.get_submodule(hook)
                handle = module.register_forward_hook(
                    lambda _module, _inputs, output, replacement=replacement: splice(output, replacement, ignored)
                )
                stack.callback(handle.remove)
            logits = _logits(self._model(tokens))
        total, count = 0.0, 0
        # One context at a time: logits in float32 of a whole batch can be larger than the model.
        for row, predicted, skip in zip(logits[:, :-1], tokens[:, 1:], ignored[:, 1:], strict=True):
            losses = -torch.log_softmax(row.float(), dim=-1).gather(1, predicted[:, None])[:, 0]
            total += float(losses[~skip].double().sum())
            count += int((~skip).sum())
        return total, count


def splice(output: Any, replacement: Replacement, keep: Tensor) -> Any:
    """A module's output with its activation replaced, but for positions to keep; cast back to its number format.

    Args:
        output: a tensor [batch, context, d_in], or a tuple that begins with one.
        keep: bool [batch, context].
    """
    activation = first_tensor(output)
    if activation is None:
        raise TypeError(f"cannot replace an output of type {type(output).__name__}")
    replaced = activation.clone()
    replaced[~keep] = replacement(activation[~keep]).to(activation)
    return (replaced, *output[1:]) if isinstance(output, tuple) else replaced


def _logits(output: Any) -> Tensor:
    """Logits of a model's output: its `logits`, the first element of a tuple, or the tensor itself."""
    found = getattr(output, "logits", None)
    found = first_tensor(output) if found is None else found
    if found is None:
        raise TypeError(f"the model's output has no logits: {type(output).__name__}")
    return found
