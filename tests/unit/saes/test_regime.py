"""When steps touch only active latents: the same on all ranks, and the same after a resume."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_job.saes.regime import SPARSE_BELOW, Regime
from sae_job.saes.trainable import ONE_PROCESS
from tests.unit.saes.simulated_ranks import SimulatedRank, on_ranks

CPU = torch.device("cpu")
D_SAE = 1000
FEW, MANY = int(D_SAE * SPARSE_BELOW) - 1, int(D_SAE * SPARSE_BELOW) + 1


def counts(per_row: int, rows: int) -> Tensor:
    """Entries by latent, so many on each row."""
    return (torch.arange(D_SAE) < per_row).to(torch.int64) * rows


def test_the_first_step_is_dense() -> None:
    assert not Regime(D_SAE, device=CPU, ranks=ONE_PROCESS).is_sparse


def test_a_share_below_the_limit_makes_the_next_step_sparse_and_one_above_dense_again() -> None:
    regime = Regime(D_SAE, device=CPU, ranks=ONE_PROCESS)
    taken = []
    for step, per_row in enumerate((FEW, MANY, FEW)):
        regime.note(step, counts(per_row, 8), 8)
        taken.append(regime.is_sparse)
    assert taken == [True, False, True]


def test_where_looking_is_dear_it_is_done_in_few_steps() -> None:
    regime = Regime(D_SAE, device=CPU, ranks=ONE_PROCESS, every=4)
    taken = []
    for step, per_row in enumerate((MANY, FEW, FEW, FEW, FEW, MANY, MANY, MANY, MANY)):
        regime.note(step, counts(per_row, 8), 8)
        taken.append(regime.is_sparse)
    assert taken == [False, False, False, False, True, True, True, True, False]


def test_a_buffer_that_a_checkpoint_wrote_decides() -> None:
    undisturbed, resumed = (Regime(D_SAE, device=CPU, ranks=ONE_PROCESS, every=4) for _ in range(2))
    undisturbed.note(0, counts(FEW, 8), 8)
    assert not resumed.is_sparse
    resumed.entries_per_row.copy_(undisturbed.entries_per_row)
    assert resumed.is_sparse


def test_all_ranks_go_by_the_mean_of_all_rows() -> None:
    def work(rank: SimulatedRank) -> tuple[bool, float]:
        regime = Regime(D_SAE, device=CPU, ranks=rank)
        # Alone, one rank would be sparse and the other dense.
        regime.note(0, counts((20, 160)[rank.index], 8), 16)
        return regime.is_sparse, float(regime.entries_per_row)

    assert on_ranks(2, work) == [(True, 90.0)] * 2
