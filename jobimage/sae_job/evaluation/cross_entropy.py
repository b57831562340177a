"""What an SAE costs the language model: its predictions with reconstructions in place of the activations.

Cross-entropy tells how much worse the model predicts the text, the Kullback-Leibler divergence how far its predictions
are from its own of before. Both are compared with ablation, where activations are replaced by 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_job.evaluation.metrics import Autoencoder

Replacement = Callable[[Tensor], Tensor]


class LanguageModel(Protocol):
    """What the scores need of a whole model."""

    def logits(
        self,
        tokens: Int[Tensor, "contexts context_size"],
        *,
        replace: Mapping[str, Replacement] | None,
        ignore_token_ids: Collection[int],
    ) -> Float[Tensor, "contexts context_size vocabulary"]:
        """Predictions of the token after each position; `replace` maps hooks to functions of the activations [n, d_in]
        at the positions that hold no ignored token, in order, and is called where the forward pass comes to them."""
        ...


@dataclass(frozen=True)
class Splice:
    """An SAE in the model's place.

    Attributes:
        hook: whose activations it encodes.
        sae: takes and gives activations in raw scale.
        target_hook: whose activations its output replaces; `hook` when None. It must not come before `hook`.
    """

    hook: str
    sae: Autoencoder
    target_hook: str | None = None

    @property
    def replaced(self) -> str:
        """The hook whose activations are replaced."""
        return self.hook if self.target_hook is None else self.target_hook


@dataclass(frozen=True)
class CrossEntropy:
    """Means over predictions, in nats.

    Attributes:
        clean: cross-entropy of the model as it is, per predicted token.
        ablated: with activations replaced by 0.
        spliced: with activations replaced by the SAE's reconstruction.
        kl_ablated: mean over positions of KL(clean || ablated), the sum over the vocabulary of p (log p − log q); None
            where it was not asked for.
        kl_spliced: the same of the model with the SAE.
    """

    clean: float
    ablated: float
    spliced: float
    kl_ablated: float | None = None
    kl_spliced: float | None = None

    @property
    def score(self) -> float | None:
        """(ablated − spliced) / (ablated − clean): 1 is perfect, 0 as bad as ablation; None when ablation costs
        nothing."""
        cost = self.ablated - self.clean
        return (self.ablated - self.spliced) / cost if cost != 0 else None

    @property
    def kl_score(self) -> float | None:
        """(KL ablated − KL spliced) / KL ablated: 1 is perfect, 0 as bad as ablation; None when ablation changes
        nothing, or divergences were not asked for."""
        if self.kl_ablated is None or self.kl_spliced is None or self.kl_ablated == 0:
            return None
        return (self.kl_ablated - self.kl_spliced) / self.kl_ablated


@torch.no_grad()
def cross_entropies(
    model: LanguageModel,
    contexts: Int[Tensor, "contexts context_size"],
    replaced: Bool[Tensor, "contexts context_size"],
    saes: Mapping[str, Splice],
    *,
    ignore_token_ids: Collection[int],
    batch_size: int,
    divergence: bool = False,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[str, CrossEntropy]:
    """Figures of each SAE. All share the clean pass of a batch, and those of one hook its ablated pass.

    Args:
        model: the whole language model.
        contexts: token ids.
        replaced: positions whose activations are replaced, by reconstructions and by 0 alike; the others (attention
            sinks, what the SAE has no part in), and those that hold an ignored token, keep the model's own.
        saes: name -> SAE and where it goes.
        ignore_token_ids: positions that predict one of these are left out of the cross-entropies, positions that hold
            one of the divergences.
        batch_size: contexts per forward pass.
        divergence: whether Kullback-Leibler divergences are computed too.
        between_batches: called before each forward pass; may raise to end the work.

    Raises:
        ValueError: no position predicts a token that counts, or the model comes to an SAE's target before its hook.
    """
    ablated = list(dict.fromkeys(splice.replaced for splice in saes.values()))
    sums = {kind: _Sums() for kind in (None, *(("hook", hook) for hook in ablated), *(("sae", name) for name in saes))}
    ignored = torch.isin(contexts, torch.tensor(sorted(ignore_token_ids), dtype=contexts.dtype))
    for start in range(0, len(contexts), batch_size):
        batch = slice(start, start + batch_size)
        tokens, skip = contexts[batch], ignored[batch]
        positions = replaced[batch][~skip]

        def predict(
            replace: Mapping[str, Replacement] | None, tokens: Tensor = tokens
        ) -> Float[Tensor, "batch context_size vocabulary"]:
            between_batches()
            return model.logits(tokens, replace=replace, ignore_token_ids=ignore_token_ids)

        clean = predict(None)
        sums[None].add(clean, None, tokens, skip)
        reference = clean if divergence else None
        for hook in ablated:
            logits = predict({hook: _at(positions, torch.zeros_like)})
            sums["hook", hook].add(logits, reference, tokens, skip)
        for name, splice in saes.items():
            logits = predict(_replacements(splice, positions))
            sums["sae", name].add(logits, reference, tokens, skip)
    return {
        name: CrossEntropy(
            clean=sums[None].cross_entropy,
            ablated=sums["hook", splice.replaced].cross_entropy,
            spliced=sums["sae", name].cross_entropy,
            kl_ablated=sums["hook", splice.replaced].divergence if divergence else None,
            kl_spliced=sums["sae", name].divergence if divergence else None,
        )
        for name, splice in saes.items()
    }


class _Sums:
    """Sums over the batches of one kind of forward pass, in float64."""

    def __init__(self) -> None:
        self._loss = self._divergence = 0.0
        self._predictions = self._positions = 0

    def add(
        self,
        logits: Float[Tensor, "batch context_size vocabulary"],
        clean: Float[Tensor, "batch context_size vocabulary"] | None,
        tokens: Int[Tensor, "batch context_size"],
        ignored: Bool[Tensor, "batch context_size"],
    ) -> None:
        """Add a batch's losses, and its divergences from the `clean` predictions where they are given."""
        for index, (row, log_q) in enumerate(_log_probabilities(logits)):
            kept = ~ignored[row].to(log_q.device)
            predicted = tokens[row, 1:].to(log_q.device, torch.int64)
            losses = -log_q[:-1].gather(1, predicted[:, None])[:, 0]
            self._loss += float(losses[kept[1:]].double().sum())
            self._predictions += int(kept[1:].sum())
            if clean is not None:
                log_p = torch.log_softmax(clean[index].float(), dim=-1)
                divergences = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
                self._divergence += float(divergences[kept].double().sum())
                self._positions += int(kept.sum())

    @property
    def cross_entropy(self) -> float:
        if self._predictions == 0:
            raise ValueError("no position predicts a token that counts")
        return self._loss / self._predictions

    @property
    def divergence(self) -> float:
        if self._positions == 0:
            raise ValueError("no position holds a token that counts")
        return self._divergence / self._positions


def _log_probabilities(logits: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Log-probabilities [context_size, vocabulary] in float32, one context at a time: those of a whole batch can be
    larger than the model. From log-softmax, so that what underflows as a probability stays finite."""
    for row, context in enumerate(logits):
        yield row, torch.log_softmax(context.float(), dim=-1)


def _replacements(splice: Splice, positions: Bool[Tensor, " n"]) -> dict[str, Replacement]:
    """What the forward pass is given at the hooks of an SAE."""
    if splice.replaced == splice.hook:
        return {splice.hook: _at(positions, lambda x: splice.sae.reconstruct(x)[1])}
    seen: list[Tensor] = []

    def look(activations: Float[Tensor, "n d_in"]) -> Tensor:
        seen.append(activations[positions.to(activations.device)].to(torch.float32))
        return activations

    def put(activations: Float[Tensor, "n d_out"]) -> Tensor:
        if not seen:
            raise ValueError(f"the model comes to {splice.replaced!r} before {splice.hook!r}")
        return splice.sae.reconstruct(seen.pop())[1]

    return {splice.hook: look, splice.replaced: _at(positions, put)}


def _at(positions: Bool[Tensor, " n"], function: Replacement) -> Replacement:
    """Apply a function of float32 rows to the activations at these positions; the rest stays untouched."""

    def replace(activations: Float[Tensor, "n d_in"]) -> Tensor:
        mask = positions.to(activations.device)
        changed = activations.clone()
        changed[mask] = function(activations[mask].to(torch.float32)).to(activations.dtype)
        return changed

    return replace
