"""Processes that train together: each step is the same decision, the same sums and the same weights on all of them.

Sums go through torch.distributed (NCCL between GPUs, gloo between CPUs). What is said beside them, who was asked to
stop and who failed, goes through a gloo group of its own, so that it never waits for a GPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, Store, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from sae_job.errors import InvalidInput, PeerLost, Stopped
from sae_job.saes.trainable import OneProcess, Ranks
from sae_job.training.place import Place

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

# Ranks that are done with their part wait for one that evaluates the whole model or stores a checkpoint.
WAIT = timedelta(hours=2)
# Sums begin when all ranks have said that they are there, so that only a lost one can keep them from ending.
SUM_TIMEOUT = timedelta(minutes=10)
# How often a rank that waits for the first one's end looks for it, and whether it is asked to stop.
POLL_SECONDS = 0.05
# How long the first rank stays for the others to hear how it ended.
HEARD_SECONDS = 20.0
_OUTCOME, _HEARD, _STOP_WANTED = "sae-job/outcome", "sae-job/heard", "sae-job/stop"
# What ranks tell each other at each step; the largest counts.
_FINE, _STOP, _FAILED = 0, 1, 2


class DistributedRanks:
    """The ranks of a process group.

    Sums are made in an order that depends on nothing but their number, so that training again gives the same bits.

    Args:
        place: this process.
        store: what all of them see.
        sums: group for tensors on the ranks' own devices.
        words: gloo group for tensors on the CPU.

    Every method raises `PeerLost` where another rank is not there any more.
    """

    def __init__(self, place: Place, store: Store, sums: ProcessGroup | None, words: ProcessGroup | None) -> None:
        self.index = place.index
        self.size = place.size
        self._store = store
        self._sums = sums
        self._words = words

    @torch.no_grad()
    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all ranks; returns it."""
        with _peers():
            if tensor.is_contiguous():
                dist.all_reduce(tensor, group=self._group(tensor))
            else:
                whole = tensor.contiguous()
                dist.all_reduce(whole, group=self._group(tensor))
                tensor.copy_(whole)
        return tensor

    @torch.no_grad()
    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors, of one shape, one after the other along the first axis."""
        rows = tensor.detach().contiguous()
        rows = rows.reshape(1) if rows.ndim == 0 else rows
        data = rows.view(torch.uint8) if rows.dtype is torch.bool else rows
        parts = [torch.empty_like(data) for _ in range(self.size)]
        with _peers():
            dist.all_gather(parts, data, group=self._group(tensor))
        return torch.cat(parts).view(rows.dtype)

    @torch.no_grad()
    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by that of the first rank; returns it."""
        whole = tensor.contiguous()
        with _peers():
            dist.broadcast(whole, src=0, group=self._group(tensor))
        return tensor if whole is tensor else tensor.copy_(whole)

    def agreed(self, word: int) -> int:
        """The largest of the words of all ranks."""
        said = torch.tensor([word])
        with _peers():
            dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._words)
        return int(said)

    def together(self, act: Callable[[], Value], *, asked_to_stop: bool = False) -> tuple[Value, bool]:
        """Act on every rank, and go on only when it went well on all of them.

        Args:
            act: what each rank does on its own.
            asked_to_stop: whether this rank was.

        Returns:
            The value of `act`, and whether any rank was asked to stop.

        Raises:
            InvalidInput, Stopped: as on the first rank on which `act` did.
            PeerLost: `act` failed otherwise on another rank.
        """
        failure: Exception | None = None
        value: Value | None = None
        try:
            value = act()
        # Whatever it is, the others must be told before it ends this one.
        except Exception as error:  # noqa: BLE001
            failure = error
        word = self.agreed(_FAILED if failure is not None else _STOP if asked_to_stop else _FINE)
        if word == _FAILED:
            self._raise_first(failure)
        return value, word == _STOP  # type: ignore[return-value]

    def _raise_first(self, failure: Exception | None) -> None:
        """Raise what went wrong on the first rank on which anything did."""
        told: list[dict[str, Any] | None] = [None] * self.size
        mine = None if failure is None else _told(failure, self.index)
        with _peers():
            dist.all_gather_object(told, mine, group=self._words)
        first = next(index for index, failed in enumerate(told) if failed is not None)
        if failure is not None and first == self.index:
            raise failure
        found = told[first]
        assert found is not None
        raise _error(found) from failure

    def in_turn(self, act: Callable[[], Value], *, early: bool) -> Value:
        """Act on every rank, on some only when the early ones have done it well.

        Raises:
            as `together`.
        """
        value, _ = self.together(lambda: act() if early else None)
        value, _ = self.together(lambda: value if early else act())
        return value  # type: ignore[return-value]

    def conclude(self, failure: BaseException | None) -> None:
        """Tell the others, from the first rank, how the training ended, and let them hear it where they wait for it.

        It is told however it ended: an error here would hide the one that matters.
        """
        outcome = "" if failure is None else type(failure).__name__
        waited_for = failure is None or isinstance(failure, Stopped)
        heard = [f"{_HEARD}/{index}" for index in range(1, self.size)]
        deadline = time.monotonic() + HEARD_SECONDS
        try:
            self._store.set(_OUTCOME, outcome)
            while waited_for and not self._store.check(heard) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        except RuntimeError as error:
            logger.warning("the other processes could not be told how the training ended: %s", error)

    def await_conclusion(self, should_stop: Callable[[], bool]) -> str:
        """Wait until the first rank has concluded: an empty text, or the type of what it failed with.

        Where this rank is asked to stop meanwhile, the first one hears of it (see `stop_wanted`).
        """
        told = False
        while True:
            with _peers():
                if self._store.check([_OUTCOME]):
                    outcome = self._store.get(_OUTCOME).decode()
                    self._store.set(f"{_HEARD}/{self.index}", "1")
                    return outcome
                if not told and should_stop():
                    self._store.set(_STOP_WANTED, "1")
                    told = True
            time.sleep(POLL_SECONDS)

    def stop_wanted(self) -> bool:
        """Whether a rank that waits for the first one's end is asked to stop."""
        with _peers():
            return self._store.check([_STOP_WANTED])

    def leave(self) -> None:
        """Let go of the group, without waiting for the others: they may be gone."""
        # An error's traceback may outlive this and holds what is here; groups that end with Python itself abort it.
        self._sums = self._words = None
        try:
            dist.destroy_process_group()
        except RuntimeError as error:
            logger.info("the process group was left as it was: %s", error)

    def _group(self, tensor: Tensor) -> ProcessGroup | None:
        return self._words if tensor.device.type == "cpu" else self._sums


class OnlyProcess(OneProcess):
    """A training in one process, as its own first rank."""

    def together(self, act: Callable[[], Value], *, asked_to_stop: bool = False) -> tuple[Value, bool]:
        return act(), asked_to_stop

    def in_turn(self, act: Callable[[], Value], *, early: bool) -> Value:
        return act()

    def conclude(self, failure: BaseException | None) -> None:
        """There is nobody to tell."""

    def stop_wanted(self) -> bool:
        return False


class SharedStream:
    """This rank's rows of every batch, which all ranks have before any of them goes on.

    A rank that cannot read its rows ends all with its own message; one that is asked to stop is followed by all at the
    same step.

    Args:
        stream: this rank's rows.
        ranks: all ranks.
        should_stop: whether this rank is asked to stop.
    """

    def __init__(self, stream: Any, ranks: DistributedRanks, should_stop: Callable[[], bool]) -> None:
        self._stream = stream
        self._ranks = ranks
        self._asked = should_stop
        self._stop = False

    @property
    def training_rows(self) -> int:
        return self._stream.training_rows

    def next_batch(self) -> dict[str, Tensor]:
        batch, stop = self._ranks.together(self._stream.next_batch, asked_to_stop=self._asked())
        self._stop |= stop
        return batch

    def next_places(self) -> list[tuple[int, int]]:
        places, _ = self._ranks.together(self._stream.next_places)
        return places

    def should_stop(self) -> bool:
        """Whether any rank had been asked to stop when the last batch was read: the same on all."""
        return self._stop

    def state(self) -> dict[str, Any]:
        return self._stream.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._stream.restore(state)


def whole_batch(rows: Tensor, ranks: Ranks) -> Tensor:
    """The rows of a batch of all ranks in the order in which one process reads them, [rows * ranks.size, ...]: each
    rank has every `ranks.size`-th of them."""
    if ranks.size == 1:
        return rows
    parts = ranks.gather(rows)
    return parts.unflatten(0, (ranks.size, len(rows))).transpose(0, 1).flatten(0, 1)


@contextmanager
def joined(
    place: Place, device: torch.device, connect: Callable[[], Store] | None = None
) -> Iterator[DistributedRanks]:
    """The ranks of this training while the block runs.

    Args:
        place: this process.
        device: where it trains; on a GPU sums go through NCCL.
        connect: gives the store that all ranks see; what torchrun's environment names when None.

    Raises:
        PeerLost: the others did not come.
    """
    on_gpu = device.type == "cuda"
    with _peers():
        store = environment_store() if connect is None else connect()
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=PrefixStore("sae-job/group", store),
            rank=place.index,
            world_size=place.size,
            timeout=SUM_TIMEOUT if on_gpu else WAIT,
            device_id=device if on_gpu else None,
        )
        words = dist.new_group(backend="gloo", timeout=WAIT) if on_gpu else dist.group.WORLD
    assert not isinstance(words, int)
    ranks = DistributedRanks(place, store, dist.group.WORLD, words)
    del words
    try:
        yield ranks
    finally:
        ranks.leave()


def environment_store() -> Store:
    """The store that torchrun's environment names."""
    store, _, _ = next(iter(rendezvous("env://", timeout=SUM_TIMEOUT)))
    return store


@contextmanager
def _peers() -> Iterator[None]:
    """Errors of torch.distributed as what they mean here."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise PeerLost(f"another process of this training has ended, or cannot be reached: {first_line}") from error


def _told(failure: Exception, index: int) -> dict[str, Any]:
    """A failure as plain values, for the other ranks."""
    match failure:
        case InvalidInput():
            return {"kind": "invalid", "reason": failure.reason, "message": failure.message, "field": failure.field}
        case Stopped():
            return {"kind": "stopped", "message": failure.message, "tokens": failure.tokens}
        case _:
            return {"kind": "failed", "message": f"process {index} failed: {type(failure).__name__}: {failure}"}


def _error(told: dict[str, Any]) -> Exception:
    match told["kind"]:
        case "invalid":
            return InvalidInput(told["reason"], told["message"], field=told["field"])
        case "stopped":
            return Stopped(told["message"], tokens=told["tokens"])
        case _:
            return PeerLost(told["message"])
