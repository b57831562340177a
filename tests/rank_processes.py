"""Functions run in several processes that train together: gloo on this machine, met through a file."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from sae_job.training.place import Place
from sae_job.training.ranks import DistributedRanks, joined
from tests.testbed.processes import free_ports

# How long processes of a test may take on a machine that is busy with others.
_SECONDS = 240

Act = Callable[[DistributedRanks, Any], Any]


def in_processes(size: int, act: Callable[[Place, Any], Any], folder: Path, given: Any = None) -> list[Any]:
    """As `on_ranks`, of functions that join the others by themselves, as torchrun's environment says."""
    return _results(size, _run_alone, folder, (act, free_port(), given))


def free_port() -> int:
    (port,) = free_ports(1)
    return port


def on_ranks(size: int, act: Act, folder: Path, given: Any = None, *, device: str = "cpu") -> list[Any]:
    """What `act` returns on each rank, or the exception that it raises there.

    Args:
        size: how many processes.
        act: a function of a module, given the ranks and `given`.
        folder: an empty one, which the processes meet in.
        given: for each of them.
        device: `cuda` for a GPU each.
    """
    return _results(size, _run, folder, (act, given, device))


def _results(size: int, run: Callable[..., None], folder: Path, arguments: tuple[Any, ...]) -> list[Any]:
    # A process that has imported torch once, and does nothing else but fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sae_job.training.ranks", "sae_job.steps.train"])
    processes = [context.Process(target=run, args=(index, size, folder, *arguments)) for index in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_SECONDS)
        assert process.exitcode == 0, process.exitcode
    return [pickle.loads((folder / f"{index}.pickle").read_bytes()) for index in range(size)]


def _run(index: int, size: int, folder: Path, act: Act, given: Any, device: str) -> None:
    torch.set_num_threads(1)
    own = torch.device(device, index) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    with joined(Place(index, size, index), own, lambda: FileStore(str(folder / "store"), size)) as ranks:
        _leave(folder / f"{index}.pickle", lambda: act(ranks, given))


def _run_alone(index: int, size: int, folder: Path, act: Callable[[Place, Any], Any], port: int, given: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(index),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(index),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    _leave(folder / f"{index}.pickle", lambda: act(Place.of(os.environ), given))


def _leave(path: Path, act: Callable[[], Any]) -> None:
    try:
        value = act()
    except Exception as error:  # noqa: BLE001 - for the test to look at
        # Exceptions with arguments of their own do not survive pickle.
        value = (type(error).__name__, str(error))
    path.write_bytes(pickle.dumps(value))


def in_parallel(*acts: Callable[[], Any]) -> list[Any]:
    """What functions return that wait for each other."""
    with ThreadPoolExecutor(len(acts)) as pool:
        return [future.result() for future in [pool.submit(act) for act in acts]]
