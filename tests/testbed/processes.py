"""Child processes of the test bed: each has a log file, is stopped by its pid, and dies with its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nobody listens on, all different, for servers that set SO_REUSEADDR."""
    return [_kept_port() for _ in range(count)]


def _kept_port() -> int:
    """A port that nobody else is given while this process lives, also before a server listens on it: it stays bound.
    Beside a socket that is bound and does not listen, one with SO_REUSEADDR may listen."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        one.detach()
    return port


# Asks for the signal, then looks whether the parent (pid in $0) had ended before it was asked for.
_DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", 'test "$PPID" = "$0" && exec "$@"')


class ChildProcess:
    """A running command. The kernel sends it SIGKILL when the thread that started it ends, however that ends."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | os.PathLike[str]],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self.name = name
        self.log = log
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                [*_DIES_WITH_PARENT, str(os.getpid()), *[os.fspath(word) for word in command]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=None if environment is None else dict(environment),
                cwd=directory,
                # Ctrl-C in a terminal reaches the parent alone, which then stops its children in order.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_running(self) -> bool:
        return self.process.poll() is None

    def log_tail(self, characters: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def ensure_running(self) -> None:
        """Raise `RuntimeError` with the end of the log when the process has ended."""
        if not self.is_running():
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}; its log ends:\n{self.log_tail()}")

    def stop(self, grace_seconds: float = 5.0) -> int:
        """SIGTERM, then SIGKILL after the grace period; returns the exit status."""
        if self.is_running():
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(grace_seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()
