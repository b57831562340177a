"""Where the pods of one training meet before any of them begins."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from sae_job.errors import PeerLost, Stopped
from sae_operator.api.steps import StepResult

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

logger = logging.getLogger(__name__)

# Pods wait this long for each other: what comes first must not fail because a cluster makes room slowly.
PEERS_SECONDS = 1800.0
POLL_SECONDS = 0.2
CONNECT_SECONDS = 2.0
# How often a pod that waits looks whether the others have finished without it.
FINISHED_SECONDS = 15.0
STORE_TIMEOUT = timedelta(seconds=60)
_HERE = "sae-job/here"


class AlreadyFinished(Exception):
    """The others have finished the training.

    Attributes:
        result: what they left.
    """

    def __init__(self, result: StepResult) -> None:
        super().__init__("finished")
        self.result = result


@dataclass
class Meeting:
    """The pods of one training, on their way.

    Attributes:
        pods: how many there are.
        pod: which of them this is; the first one serves the store that they meet at.
        host, port: of the first pod.
        should_stop: whether this pod was asked to stop.
        finished: what the training has left when it is finished, else None: where a pod is started again although
            the others had ended well, nobody comes any more.
        wait_seconds: how long pods wait for each other.
    """

    pods: int
    pod: int
    host: str
    port: int
    should_stop: Callable[[], bool]
    finished: Callable[[], StepResult | None]
    wait_seconds: float = PEERS_SECONDS

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.wait_seconds
        self._looked = float("-inf")

    def store(self) -> TCPStore:
        """Wait until all pods are there; returns the store that they met at, which lives as long as the first pod
        holds it.

        A pod that is started again while the others still end their last attempt waits for them to do so.

        Raises:
            AlreadyFinished: the training is finished.
            Stopped: asked to stop.
            PeerLost: not all came in time.
        """
        while True:
            store = self._connected()
            if store is None:
                continue
            try:
                while store.add(f"{_HERE}/{self.pod}", 1) > 1:
                    self._pause("the other pods to end their last attempt")
                while not store.check([f"{_HERE}/{pod}" for pod in range(self.pods)]):
                    self._pause(f"all of {self.pods} pods")
            except RuntimeError as error:
                logger.info("the first pod has gone: %s", str(error).partition("\n")[0])
                self._pause("the first pod")
                continue
            return store

    def _connected(self) -> TCPStore | None:
        """A connection to the first pod's store; None when it went away just now."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        first = self.pod == 0
        while not first and not _reachable(self.host, self.port):
            self._pause(f"the first pod at {self.host}:{self.port}")
        self._pause("the first pod")
        try:
            return TCPStore(self.host, self.port, None, first, STORE_TIMEOUT, wait_for_workers=False, multi_tenant=True)
        except RuntimeError as error:
            if first:
                raise
            logger.info("no store at %s:%d yet: %s", self.host, self.port, str(error).partition("\n")[0])
            return None

    def _pause(self, what: str) -> None:
        if self.should_stop():
            raise Stopped(f"stopped while waiting for {what}")
        now = time.monotonic()
        if now - self._looked >= FINISHED_SECONDS:
            self._looked = now
            result = self.finished()
            if result is not None:
                raise AlreadyFinished(result)
        if now > self._deadline:
            raise PeerLost(
                f"waited {self.wait_seconds:.0f} s for {what} in vain: does the cluster have room for all pods, and "
                "may they reach each other?"
            )
        time.sleep(POLL_SECONDS)


def _reachable(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), CONNECT_SECONDS):
            return True
    except OSError:
        return False
