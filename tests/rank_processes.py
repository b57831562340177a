"""Functions run in several processes that train together: gloo on this machine, met through a file."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from sae_job.training.place import Place
from sae_job.training.ranks import DistributedRanks, joined

Act = Callable[[DistributedRanks, Any], Any]


def on_ranks(size: int, act: Act, folder: Path, given: Any = None) -> list[Any]:
    """What `act` returns on each rank, or the exception that it raises there.

    Args:
        size: how many processes.
        act: a function of a module, given the ranks and `given`.
        folder: an empty one, which the processes meet in.
        given: for each of them.
    """
    # A process that has imported torch once, and does nothing else but fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sae_job.training.ranks", "sae_job.steps.train"])
    processes = [context.Process(target=_run, args=(index, size, act, folder, given)) for index in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0, process.exitcode
    return [pickle.loads((folder / f"{index}.pickle").read_bytes()) for index in range(size)]


def _run(index: int, size: int, act: Act, folder: Path, given: Any) -> None:
    torch.set_num_threads(1)
    place = Place(index, size, index)
    with joined(place, torch.device("cpu"), lambda: FileStore(str(folder / "store"), size)) as ranks:
        try:
            value = act(ranks, given)
        except Exception as error:  # noqa: BLE001 - for the test to look at
            # Exceptions with arguments of their own do not survive pickle.
            value = (type(error).__name__, str(error))
    (folder / f"{index}.pickle").write_bytes(pickle.dumps(value))
