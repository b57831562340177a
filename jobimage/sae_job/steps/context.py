"""What every step is given besides its spec: the edges of the world, passed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sae_job.reporting.progress import ProgressReporter
from sae_job.storage.base import ObjectStore
from sae_job.training.place import ALONE, Place
from sae_operator.api.store import StoreLocation


@dataclass(frozen=True)
class StepContext:
    """Edges of a step.

    Attributes:
        reporter: where the step tells its progress.
        should_stop: true once the process was asked to stop (SIGTERM, Ctrl-C); steps look between batches.
        open_store: opens the object store at a location.
        completion_index: which pod of an Indexed Job this is.
        now: seconds since the epoch.
        place: which of the processes that train together this is.
    """

    reporter: ProgressReporter
    should_stop: Callable[[], bool]
    open_store: Callable[[StoreLocation], ObjectStore]
    now: Callable[[], float]
    completion_index: int = 0
    place: Place = ALONE
