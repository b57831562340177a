"""What an SAE costs the language model: cross-entropy with its reconstructions in place of the activations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_job.evaluation.metrics import Autoencoder

Replacement = Callable[[Tensor], Tensor]


class LanguageModel(Protocol):
    """What the score needs of a whole model."""

    def cross_entropy(
        self,
        tokens: Int[Tensor, "contexts context_size"],
        *,
        replace: Mapping[str, Replacement] | None,
        ignore_token_ids: Collection[int],
    ) -> tuple[float, int]:
        """Sum over positions whose predicted token is not ignored, and their number; `replace` maps hooks to functions
        of the activations [n, d_in] at the positions that hold no ignored token, in order."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Mean cross-entropies in nats per predicted token.

    Attributes:
        clean: of the model as it is.
        ablated: with activations replaced by 0.
        spliced: with activations replaced by the SAE's reconstruction.
    """

    clean: float
    ablated: float
    spliced: float

    @property
    def score(self) -> float | None:
        """(ablated − spliced) / (ablated − clean): 1 is perfect, 0 as bad as ablation; None when ablation costs
        nothing."""
        cost = self.ablated - self.clean
        return (self.ablated - self.spliced) / cost if cost != 0 else None


@torch.no_grad()
def cross_entropies(
    model: LanguageModel,
    contexts: Int[Tensor, "contexts context_size"],
    replaced: Bool[Tensor, "contexts context_size"],
    saes: Mapping[str, tuple[str, Autoencoder]],
    *,
    ignore_token_ids: Collection[int],
    batch_size: int,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[str, CrossEntropy]:
    """Cross-entropies of each SAE.

    Args:
        model: the whole language model.
        contexts: token ids.
        replaced: positions whose activations are replaced, by reconstructions and by 0 alike; the others (attention
            sinks, what the SAE has no part in), and those that hold an ignored token, keep the model's own.
        saes: name -> (hook, SAE in raw scale).
        ignore_token_ids: positions that predict one of these are left out of the means.
        batch_size: contexts per forward pass.
        between_batches: called before each forward pass; may raise to end the work.
    """

    ignored = torch.isin(contexts, torch.tensor(sorted(ignore_token_ids), dtype=contexts.dtype))

    def mean(hook: str | None, function: Replacement) -> float:
        total, count = 0.0, 0
        for start in range(0, len(contexts), batch_size):
            between_batches()
            batch = slice(start, start + batch_size)
            replace = {} if hook is None else {hook: _at(replaced[batch][~ignored[batch]], function)}
            batch_total, batch_count = model.cross_entropy(
                contexts[batch], replace=replace or None, ignore_token_ids=ignore_token_ids
            )
            total += batch_total
            count += batch_count
        if count == 0:
            raise ValueError("no position predicts a token that counts")
        return total / count

    clean = mean(None, torch.zeros_like)
    ablated = {hook: mean(hook, torch.zeros_like) for hook in dict.fromkeys(hook for hook, _ in saes.values())}
    return {
        name: CrossEntropy(clean=clean, ablated=ablated[hook], spliced=mean(hook, _reconstruction(sae)))
        for name, (hook, sae) in saes.items()
    }


def _reconstruction(sae: Autoencoder) -> Replacement:
    return lambda x: sae.reconstruct(x)[1]


def _at(positions: Bool[Tensor, " n"], function: Replacement) -> Replacement:
    """Apply a function of float32 rows to the activations at these positions; the rest stays untouched."""

    def replace(activations: Float[Tensor, "n d_in"]) -> Tensor:
        mask = positions.to(activations.device)
        changed = activations.clone()
        changed[mask] = function(activations[mask].to(torch.float32)).to(activations.dtype)
        return changed

    return replace
