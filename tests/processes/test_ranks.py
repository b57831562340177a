"""Sums, gathering and agreement among processes that train together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sae_job.errors import InvalidInput, Stopped
from sae_job.saes.trainable import ONE_PROCESS
from sae_job.training.ranks import DistributedRanks, SharedStream, whole_batch
from tests.rank_processes import on_ranks


def sums(ranks: DistributedRanks, given: Any) -> Any:
    own = torch.arange(6, dtype=torch.float32).view(2, 3) + 10 * ranks.index
    transposed = own.clone().t()
    counts = torch.tensor([ranks.index, 1])
    scalar = torch.tensor(0.5 + ranks.index)
    ranks.sum_(transposed)
    return {
        "matrix": ranks.sum_(own.clone()),
        "not contiguous": transposed,
        "counts": ranks.sum_(counts),
        "scalar": ranks.sum_(scalar),
        "gathered": ranks.gather(own),
        "scalars": ranks.gather(torch.tensor(float(ranks.index))),
        "flags": ranks.gather(torch.tensor([ranks.index == 0, True])),
        "of the first": ranks.broadcast_(own.clone()),
        "largest": ranks.agreed(ranks.index),
    }


def test_every_rank_sees_the_same_sums_and_rows(tmp_path: Path) -> None:
    first = torch.arange(6, dtype=torch.float32).view(2, 3)
    for seen in on_ranks(2, sums, tmp_path):
        assert torch.equal(seen["matrix"], 2 * first + 10)
        assert torch.equal(seen["not contiguous"], (2 * first + 10).t())
        assert seen["counts"].tolist() == [1, 2]
        assert seen["scalar"] == 2.0
        assert torch.equal(seen["gathered"], torch.cat([first, first + 10]))
        assert seen["scalars"].tolist() == [0.0, 1.0]
        assert seen["flags"].tolist() == [True, True, False, True]
        assert torch.equal(seen["of the first"], first)
        assert seen["largest"] == 1


def sum_of_noise(ranks: DistributedRanks, given: Any) -> Any:
    generator = torch.Generator().manual_seed(ranks.index)
    noise = torch.randn(1000, 37, generator=generator)
    return ranks.sum_(noise.clone()), ranks.sum_(noise.clone())


def test_a_sum_made_again_has_the_same_bits(tmp_path: Path) -> None:
    found = [total for totals in on_ranks(4, sum_of_noise, tmp_path) for total in totals]
    assert all(torch.equal(found[0], other) for other in found[1:])


def failing_on_the_second(ranks: DistributedRanks, given: Any) -> Any:
    def act() -> None:
        if ranks.index == 1:
            raise given

    ranks.together(act)


def test_a_failure_of_one_ends_all(tmp_path: Path) -> None:
    first, second = on_ranks(2, failing_on_the_second, tmp_path, OSError("disk"))
    assert first == ("PeerLost", "process 1 failed: OSError: disk")
    assert second == ("OSError", "disk")


def wrong_input_on_the_second(ranks: DistributedRanks, given: Any) -> Any:
    def act() -> None:
        if ranks.index == 1:
            raise InvalidInput("ShardCorrupt", "shard 3 is corrupt", field="spec.activations")

    ranks.together(act)


def test_wrong_input_that_one_meets_is_told_alike_by_all(tmp_path: Path) -> None:
    told = ("InvalidInput", "spec.activations: shard 3 is corrupt")
    assert on_ranks(2, wrong_input_on_the_second, tmp_path) == [told, told]


class Numbers:
    """Batches that are their own numbers; this rank's rows of them."""

    training_rows = 100

    def __init__(self) -> None:
        self.read = 0

    def next_batch(self) -> dict[str, torch.Tensor]:
        self.read += 1
        return {"hook": torch.tensor([float(self.read)])}

    def state(self) -> dict[str, Any]:
        return {"read": self.read}

    def restore(self, state: dict[str, Any]) -> None:
        self.read = state["read"]


def stopping_after_three(ranks: DistributedRanks, given: Any) -> Any:
    numbers = Numbers()
    stream = SharedStream(numbers, ranks, lambda: ranks.index == 1 and numbers.read >= 3)
    while not stream.should_stop():
        stream.next_batch()
    return stream.state()["read"]


def test_all_stop_at_the_step_after_which_one_is_asked_to(tmp_path: Path) -> None:
    assert on_ranks(2, stopping_after_three, tmp_path) == [4, 4]


def concluding(ranks: DistributedRanks, given: Any) -> Any:
    if ranks.index == 0:
        while not ranks.stop_wanted():
            pass
        ranks.conclude(Stopped("stopped"))
        return None
    return ranks.await_conclusion(lambda: ranks.index == 1)


def test_those_that_wait_hear_how_it_ended_and_can_ask_to_stop(tmp_path: Path) -> None:
    assert on_ranks(3, concluding, tmp_path) == [None, "Stopped", "Stopped"]


def interleaved(ranks: DistributedRanks, given: torch.Tensor) -> Any:
    return whole_batch(given[ranks.index :: ranks.size], ranks)


def test_a_whole_batch_has_its_rows_in_the_order_of_one_process(tmp_path: Path) -> None:
    rows = torch.arange(24.0).view(8, 3)
    for seen in on_ranks(4, interleaved, tmp_path, rows):
        assert torch.equal(seen, rows)
    assert whole_batch(rows, ONE_PROCESS) is rows
