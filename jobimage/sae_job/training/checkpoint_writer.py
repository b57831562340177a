"""Writes checkpoints beside the training, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from sae_job.training.checkpoints import Checkpoints, Snapshot


class CheckpointWriter:
    """Writes snapshots in a thread; an error there is raised by the next call here.

    Args:
        checkpoints: where they go; None where none are submitted.
        on_stored: called, in the writing thread, with each snapshot that is safely stored.
    """

    def __init__(self, checkpoints: Checkpoints | None, on_stored: Callable[[Snapshot], None]) -> None:
        self._checkpoints = checkpoints
        self._on_stored = on_stored
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written.

        Raises:
            StoreError: the last one could not be written.
        """
        if self._thread is not None and self._thread.is_alive():
            return True
        self.wait()
        return False

    def submit(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint, once the one before it is stored.

        Raises:
            StoreError: the one before it could not be written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            StoreError: the checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        assert self._checkpoints is not None, "a rank that writes no checkpoints submits none"
        try:
            self._checkpoints.write(snapshot)
        except BaseException as error:  # noqa: BLE001 - raised again in the training's thread
            self._error = error
            return
        self._on_stored(snapshot)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the thread; its error does not hide one that is on its way."""
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()
