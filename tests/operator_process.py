"""The operator as a process of its own, against a test's control plane.

An interpreter that has imported everything is started once and forked for each operator, so that a start takes
milliseconds and hundreds of kills take minutes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sae_operator.controller.faults import Call
from tests.testbed.paths import CHECKOUT
from tests.testbed.waiting import wait_for

JOB_IMAGE = "sae-operator/job:test"


@dataclass
class OperatorProcess:
    """An operator that was started; what it logs is in `log`."""

    pid: int
    log: Path

    @property
    def exit_code(self) -> int | None:
        """None while it runs; the negative signal when one ended it."""
        path = _exit_file(self.log)
        return int(path.read_text()) if path.exists() else None

    def wait(self, timeout: float = 90.0) -> int:
        """The exit code, once it has ended."""
        wait_for(lambda: self.exit_code is not None, timeout, what=lambda: f"the operator ended:\n{self.tail()}")
        assert self.exit_code is not None
        return self.exit_code

    def stop(self, timeout: float = 60.0) -> int:
        """Ends it with SIGTERM and returns the exit code."""
        return self._signal(signal.SIGTERM, timeout)

    def kill(self, timeout: float = 60.0) -> int:
        """Ends it with SIGKILL."""
        return self._signal(signal.SIGKILL, timeout)

    def tail(self, lines: int = 60) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text().splitlines()[-lines:]) if self.log.exists() else ""

    @property
    def calls(self) -> list[Call]:
        """The API calls that it has made, in order; for an operator that tells them (see `ENV_EXIT_AT_CALL`)."""
        return [Call.parse(text) for text in re.findall(r"API call (.+?#\d+):", self.log.read_text())]

    def _signal(self, number: int, timeout: float) -> int:
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
        return self.wait(timeout)


def start_operator(
    kubeconfig: Path,
    *,
    namespace: str | None = None,
    log: Path | None = None,
    poll_seconds: float = 1.0,
    progress_seconds: float = 1.0,
    arguments: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> OperatorProcess:
    """Starts `sae-operator` for one namespace (or all) and returns at once."""
    if log is None:
        handle, name = tempfile.mkstemp(prefix="operator-", suffix=".log")
        os.close(handle)
        log = Path(name)
    command = [f"--kubeconfig={kubeconfig}", f"--job-image={JOB_IMAGE}"]
    command += [f"--poll-seconds={poll_seconds}", f"--progress-seconds={progress_seconds}", *arguments]
    if namespace is not None:
        command.append(f"--namespace={namespace}")
    order = {"arguments": command, "log": os.fspath(log), "environment": dict(environment or {})}
    return OperatorProcess(_ForkServer.shared().fork(order), log)


@contextlib.contextmanager
def run_operator(kubeconfig: Path, *, namespace: str | None = None, **options: object) -> Iterator[OperatorProcess]:
    """An operator that serves one namespace (or all) inside the block; its log is printed when the block fails."""
    process = start_operator(kubeconfig, namespace=namespace, **options)  # type: ignore[arg-type]
    try:
        yield process
        assert process.exit_code is None, f"the operator ended with {process.exit_code}:\n{process.tail()}"
    except BaseException:
        print(f"--- log of the operator ---\n{process.tail()}", file=sys.stderr)
        raise
    finally:
        process.stop()


def _exit_file(log: Path) -> Path:
    return log.with_name(f"{log.name}.exit")


class _ForkServer:
    """The test's end of the interpreter that forks operators."""

    _shared: _ForkServer | None = None

    def __init__(self) -> None:
        path = os.pathsep.join(os.fspath(CHECKOUT / part) for part in ("operator", "."))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.operator_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            cwd=CHECKOUT,
        )
        self._lock = threading.Lock()
        atexit.register(self._close)

    @classmethod
    def shared(cls) -> _ForkServer:
        if cls._shared is None or cls._shared._process.poll() is not None:
            cls._shared = cls()
        return cls._shared

    def fork(self, order: Mapping[str, object]) -> int:
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, "the fork server has ended"
        return int(answer)

    def _close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait(10)


def _serve() -> None:
    """The fork server: one order a line on stdin, one pid a line on stdout; ends its children when stdin ends."""
    # All that an operator needs, imported once.
    import asyncio  # noqa: F401

    import ruamel.yaml  # noqa: F401

    from sae_operator import cli
    from sae_operator.controller import app, logs  # noqa: F401

    # An end wakes the same wait as an order does: a signal's handler would run late if the signal came just before the
    # wait began.
    with selectors.DefaultSelector() as waiting:
        waiting.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.data is not None:
                    waiting.unregister(key.fileobj)
                    os.close(key.fd)
                    key.data.tell()
                    continue
                line = sys.stdin.readline()
                if not line:
                    for child in [key.data for key in waiting.get_map().values() if key.data is not None]:
                        os.kill(child.pid, signal.SIGKILL)
                    return
                child = _fork(cli.main, json.loads(line))
                waiting.register(os.pidfd_open(child.pid), selectors.EVENT_READ, child)
                print(child.pid, flush=True)


@dataclass(frozen=True)
class _Child:
    """An operator that was forked and not yet waited for."""

    pid: int
    exit_file: Path

    def tell(self) -> None:
        """Write how it ended; it has."""
        _, status = os.waitpid(self.pid, 0)
        told = self.exit_file.with_name(f"{self.exit_file.name}.new")
        told.write_text(str(os.waitstatus_to_exitcode(status)))
        told.rename(self.exit_file)


def _fork(main: object, order: dict[str, object]) -> _Child:
    exit_file = _exit_file(Path(str(order["log"])))
    exit_file.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        os._exit(_operator(main, order))
    return _Child(pid, exit_file)


def _operator(main: object, order: dict[str, object]) -> int:
    assert callable(main)
    log = os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    environment = order["environment"]
    assert isinstance(environment, dict)
    os.environ.update(environment)
    try:
        code = main(order["arguments"])
        assert isinstance(code, int)
        return code
    except BaseException:  # noqa: BLE001 - a child must never return into the server's loop
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()


if __name__ == "__main__":
    _serve()
