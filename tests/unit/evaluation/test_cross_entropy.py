"""The scores of a spliced model, on models whose losses and divergences can be done by hand."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import pytest
import torch
from torch import Tensor

from sae_job.evaluation.cross_entropy import CrossEntropy, Replacement, Splice, cross_entropies


class PayingModel:
    """Activations at `hook` are the token ids, one wide, those at `out` 3 times as much. The loss of a prediction is 10
    minus a third of the activation at `out`: the logits of the token that follows make it so."""

    def __init__(self) -> None:
        self.calls = 0

    def logits(
        self, tokens: Tensor, *, replace: Mapping[str, Replacement] | None, ignore_token_ids: Collection[int]
    ) -> Tensor:
        self.calls += 1
        activations = tokens.to(torch.bfloat16).unsqueeze(-1)
        kept = torch.tensor([[int(token) not in ignore_token_ids for token in row] for row in tokens])
        for hook, factor in (("hook", 1), ("out", 3)):
            activations = activations * factor
            if replace and hook in replace:
                activations[kept] = replace[hook](activations[kept])
        log_p = activations[..., 0].to(torch.float64) / 3 - 10
        vocabulary = 9
        rest = torch.log((1 - log_p.exp()) / (vocabulary - 1))
        logits = rest.unsqueeze(-1).repeat(1, 1, vocabulary)
        logits[:, :-1].scatter_(2, tokens[:, 1:, None], log_p[:, :-1, None])
        return logits


class Times:
    """Reconstructs a multiple of everything."""

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.float32
        return x, x * self._factor


CONTEXTS = torch.tensor([[2, 4, 6, 1], [8, 2, 4, 6], [4, 4, 0, 2]])
EVERYWHERE = torch.ones_like(CONTEXTS, dtype=torch.bool)
HALVES = Splice("hook", Times(0.5))


def measure(
    replaced: Tensor, *, ignore: tuple[int, ...] = (), batch_size: int = 2, splice: Splice = HALVES
) -> CrossEntropy:
    found = cross_entropies(
        PayingModel(), CONTEXTS, replaced, {"a": splice}, ignore_token_ids=ignore, batch_size=batch_size
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
    one, three = measure(EVERYWHERE, batch_size=1), measure(EVERYWHERE, batch_size=3)
    assert (one.clean, one.ablated, one.spliced) == pytest.approx((three.clean, three.ablated, three.spliced))


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
    model = PayingModel()
    cross_entropies(
        model, CONTEXTS, EVERYWHERE, dict.fromkeys("abc", HALVES), ignore_token_ids=(), batch_size=3, divergence=True
    )
    assert model.calls == 2 + 3


def test_a_transcoder_reads_one_hook_and_replaces_another() -> None:
    perfect = measure(EVERYWHERE, splice=Splice("hook", Times(3), "out"))
    assert perfect.score == pytest.approx(1)
    half = measure(EVERYWHERE, splice=Splice("hook", Times(1.5), "out"))
    assert (half.ablated, half.spliced) == pytest.approx((10, 10 - 17 / 9))


def test_a_transcoders_target_cannot_come_before_its_hook() -> None:
    with pytest.raises(ValueError, match="comes to 'hook' before 'out'"):
        measure(EVERYWHERE, splice=Splice("out", Times(1), "hook"))


class TwoWords:
    """A vocabulary of two words, whose probabilities are `p` while the activation is the token's own, `q` for half of
    it and `r` for 0. Two words more have next to no probability: their logits are so low that it underflows."""

    P, Q, R = 0.75, 0.5, 0.25

    def logits(
        self, tokens: Tensor, *, replace: Mapping[str, Replacement] | None, ignore_token_ids: Collection[int]
    ) -> Tensor:
        activations = torch.ones(*tokens.shape, 1)
        kept = torch.tensor([[int(token) not in ignore_token_ids for token in row] for row in tokens])
        if replace:
            activations[kept] = replace["hook"](activations[kept])
        chances = {1.0: self.P, 0.5: self.Q, 0.0: self.R}
        first = torch.tensor([[chances[float(value)] for value in row] for row in activations[..., 0]])
        low = torch.full_like(first, -1e4)
        return torch.stack([first.log(), (1 - first).log(), low, low], dim=-1)


def kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def divergences(replaced: Tensor, ignore: tuple[int, ...] = ()) -> CrossEntropy:
    contexts = torch.tensor([[0, 1, 1], [1, 0, 2]])
    return cross_entropies(
        TwoWords(), contexts, replaced, {"a": HALVES}, ignore_token_ids=ignore, batch_size=1, divergence=True
    )["a"]


def test_divergence_is_from_the_clean_predictions_and_its_score_is_1_for_none() -> None:
    figures = divergences(torch.ones(2, 3, dtype=torch.bool))
    spliced, ablated = kl(TwoWords.P, TwoWords.Q), kl(TwoWords.P, TwoWords.R)
    assert figures.kl_spliced == pytest.approx(spliced, rel=1e-6)
    assert figures.kl_ablated == pytest.approx(ablated, rel=1e-6)
    assert figures.kl_score == pytest.approx((ablated - spliced) / ablated, rel=1e-6)


def test_divergence_is_a_mean_over_the_positions_that_hold_no_ignored_token() -> None:
    replaced = torch.tensor([[True, False, False], [False, False, False]])
    assert divergences(replaced).kl_spliced == pytest.approx(kl(TwoWords.P, TwoWords.Q) / 6, rel=1e-6)
    assert divergences(replaced, ignore=(2,)).kl_spliced == pytest.approx(kl(TwoWords.P, TwoWords.Q) / 5, rel=1e-6)


def test_where_ablation_changes_nothing_there_is_no_score() -> None:
    figures = divergences(torch.zeros(2, 3, dtype=torch.bool))
    assert (figures.kl_ablated, figures.kl_score, figures.score) == (0.0, None, None)


def test_divergence_is_left_out_where_nobody_asks() -> None:
    assert measure(EVERYWHERE).kl_score is None


def test_the_work_ends_between_two_passes() -> None:
    passes = 0

    def stop_at_the_third() -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise InterruptedError

    model = PayingModel()
    with pytest.raises(InterruptedError):
        cross_entropies(
            model,
            CONTEXTS,
            EVERYWHERE,
            {"a": HALVES},
            ignore_token_ids=(),
            batch_size=1,
            between_batches=stop_at_the_third,
        )
    assert model.calls == 2
