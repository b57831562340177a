"""The CE-loss score, on a model whose cross-entropy is a sum that can be done by hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest
import torch
from torch import Tensor

from sae_job.evaluation.cross_entropy import CrossEntropy, Replacement, cross_entropies


class SummingModel:
    """Activations are the token ids, one wide; the loss at a position is 10 minus its activation."""

    def __init__(self) -> None:
        self.calls = 0

    def cross_entropy(
        self, tokens: Tensor, *, replace: Mapping[str, Replacement] | None, ignore_token_ids: Collection[int]
    ) -> tuple[float, int]:
        self.calls += 1
        activations = tokens.to(torch.bfloat16).unsqueeze(-1)
        kept = torch.tensor([[int(token) not in ignore_token_ids for token in row] for row in tokens])
        if replace:
            activations[kept] = replace["hook"](activations[kept])
        losses = 10 - activations[:, :-1, 0].to(torch.float64)
        return float(losses[kept[:, 1:]].sum()), int(kept[:, 1:].sum())


class Halves:
    """Reconstructs half of everything."""

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.float32
        return x, x / 2


CONTEXTS = torch.tensor([[2, 4, 6, 1], [8, 2, 4, 6], [4, 4, 0, 2]])
EVERYWHERE = torch.ones_like(CONTEXTS, dtype=torch.bool)


def measure(replaced: Tensor, *, ignore: tuple[int, ...] = (), batch_size: int = 2) -> CrossEntropy:
    found = cross_entropies(
        SummingModel(), CONTEXTS, replaced, {"a": ("hook", Halves())}, ignore_token_ids=ignore, batch_size=batch_size
    )
    return found["a"]


def test_score_is_the_recovered_part_of_what_ablation_costs() -> None:
    figures = measure(EVERYWHERE)
    # Positions that predict: 2 4 6 / 8 2 4 / 4 4 0, sum 34, of 9.
    assert figures.clean == pytest.approx(10 - 34 / 9)
    assert figures.ablated == pytest.approx(10)
    assert figures.spliced == pytest.approx(10 - 17 / 9)
    assert figures.score == pytest.approx(0.5)


def test_batches_are_weighted_by_their_tokens() -> None:
    assert measure(EVERYWHERE, batch_size=1) == measure(EVERYWHERE, batch_size=3)


def test_positions_that_are_not_replaced_keep_the_original_in_both() -> None:
    replaced = EVERYWHERE.clone()
    replaced[:, 0] = False
    figures = measure(replaced)
    # First positions (2, 8, 4) stay.
    assert figures.ablated == pytest.approx(10 - 14 / 9)
    assert figures.spliced == pytest.approx(10 - (14 + 10) / 9)
    nothing = measure(torch.zeros_like(EVERYWHERE))
    assert nothing.clean == nothing.ablated == nothing.spliced
    assert nothing.score is None


def test_ignored_are_the_positions_that_predict_the_token() -> None:
    # Predicting 6: the second position of the first context (activation 4) and the third of the second (4).
    figures = measure(EVERYWHERE, ignore=(6,))
    assert figures.clean == pytest.approx(10 - (34 - 8) / 7)
    # The position that holds it (third of the first context) keeps its activation, also when all others are ablated.
    assert figures.ablated == pytest.approx(10 - 6 / 7)


def test_clean_and_ablated_passes_are_shared_by_saes_of_one_hook() -> None:
    model = SummingModel()
    saes = {name: ("hook", Halves()) for name in "abc"}
    cross_entropies(model, CONTEXTS, EVERYWHERE, saes, ignore_token_ids=(), batch_size=3)
    assert model.calls == 2 + 3
