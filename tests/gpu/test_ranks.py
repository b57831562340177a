"""Sums, rows and words among processes on GPUs, one each; with one GPU there is one process, whose sums are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sae_job.training.ranks import DistributedRanks, whole_batch
from tests.gpu.device import DEVICE
from tests.rank_processes import on_ranks

ROWS = torch.arange(24.0).view(8, 3)


def size() -> int:
    return 2 if DEVICE == "cpu" else min(2, torch.cuda.device_count())


def sums(ranks: DistributedRanks, given: str) -> Any:
    def here(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(given)

    mine = here(ROWS[ranks.index :: ranks.size])
    value, stop = ranks.together(lambda: ranks.index, asked_to_stop=ranks.index == 0)
    found = {
        "sum": ranks.sum_(mine.sum(dim=0)),
        "scalar": ranks.sum_(here(torch.tensor(1.0))),
        "rows": whole_batch(mine, ranks),
        "flags": ranks.gather(here(torch.tensor([True, ranks.index == 0]))),
        "first": ranks.broadcast_(here(torch.tensor([ranks.index]))),
        # Said beside the GPUs.
        "on the CPU": ranks.gather(torch.tensor([ranks.index])),
    }
    assert value == ranks.index
    return {name: tensor.cpu() for name, tensor in found.items()} | {"stop": stop}


def test_processes_on_gpus_see_the_sums_and_rows_of_all(tmp_path: Path) -> None:
    for seen in on_ranks(size(), sums, tmp_path, DEVICE, device=DEVICE):
        assert torch.equal(seen["sum"], ROWS.sum(dim=0))
        assert seen["scalar"] == size()
        assert torch.equal(seen["rows"], ROWS)
        assert seen["flags"].tolist() == [True, True, True, False][: 2 * size()]
        assert seen["first"].tolist() == [0]
        assert seen["on the CPU"].tolist() == list(range(size()))
        assert seen["stop"] is True
