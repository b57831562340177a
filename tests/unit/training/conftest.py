"""One thread: sums depend on how many there are, and small tensors are slower with more. And small trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from sae_job.saes.base import SAE
from sae_job.storage.file_store import FileStore
from sae_job.training.observer import TrainingObserver
from sae_job.training.trainer import Trainer
from tests.small_cache import write_small_cache
from tests.small_training import TWO_HOOKS, SmallJob, small_job, small_spec


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def two_hooks(tmp_path_factory: pytest.TempPathFactory) -> FileStore:
    """A small cache of two hooks of different width."""
    store = FileStore(tmp_path_factory.mktemp("two-hooks"))
    write_small_cache(store, hooks=tuple(TWO_HOOKS), d_in=TWO_HOOKS)
    return store


@pytest.fixture
def jobs() -> Iterator[list[SmallJob]]:
    """What a test opens; readers are closed behind it."""
    opened: list[SmallJob] = []
    yield opened
    for job in opened:
        job.reader.close()


@pytest.fixture
def new_trainer(two_hooks: FileStore, jobs: list[SmallJob]) -> Callable[..., Trainer]:
    """Makes initialised trainers of some SAEs on that cache."""

    def make(
        saes: list[dict[str, Any]],
        *,
        store: FileStore | None = None,
        starts: Mapping[str, SAE] | None = None,
        observers: Sequence[TrainingObserver] = (),
        **parts: Any,
    ) -> Trainer:
        spec = small_spec(saes, **parts)
        jobs.append(small_job(store or two_hooks, spec, starts=starts, observers=observers))
        jobs[-1].trainer.initialize()
        return jobs[-1].trainer

    return make
