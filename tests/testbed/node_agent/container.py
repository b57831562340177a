"""One container: its process, and its state as the API shows it."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SHIM = Path(__file__).with_name("shim.py")
# What the kubelet keeps of a termination message, and of a log that takes its place.
_MESSAGE_BYTES = 4096
_FALLBACK_BYTES = 2048


def now() -> str:
    """The time as the API writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Container:
    """State of one container of a pod over its restarts, and the shim that runs it now."""

    def __init__(self, spec: dict[str, Any], directory: Path, logs: Path, on_end: Callable[[], None]) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        self.state: dict[str, Any] = {"waiting": {"reason": "ContainerCreating"}}
        self.restarts = 0
        self._last_state: dict[str, Any] = {}
        self._directory = directory
        self._logs = logs
        self._on_end = on_end
        self._shim: subprocess.Popen[bytes] | None = None
        self._identity = ""
        self._started_at = ""

    # What the API shows

    def status(self) -> dict[str, Any]:
        running = "running" in self.state
        status = {
            "name": self.name,
            "image": self.spec["image"],
            "imageID": self.spec["image"] if self._identity else "",
            "restartCount": self.restarts,
            "ready": running,
            "started": running,
            "state": self.state,
            "lastState": self._last_state,
        }
        return {**status, "containerID": self._identity} if self._identity else status

    def wait_for(self, reason: str, message: str = "") -> None:
        """The container cannot start yet."""
        self.state = {"waiting": {"reason": reason, **({"message": message} if message else {})}}

    @property
    def is_running(self) -> bool:
        return self._shim is not None and self._shim.poll() is None

    @property
    def has_run(self) -> bool:
        return bool(self._identity)

    # Its life

    @property
    def termination_file(self) -> Path:
        return self._directory / f"termination-{self.restarts}"

    @property
    def log_file(self) -> Path:
        return self._logs / f"{self.name}-{self.restarts}.log"

    def start(self, description: dict[str, Any], pod_uid: str) -> None:
        """Start the shim with a description of the container (see `shim`, which reads it)."""
        scratch = self._directory / f"root-{self.restarts}"
        scratch.mkdir(parents=True)
        file = self._directory / f"container-{self.restarts}.json"
        files = {"result": f"{file}.result", "started": f"{file}.started", "scratch": str(scratch)}
        file.touch(mode=0o600)
        file.write_text(json.dumps({**description, **files}))
        self._result = Path(files["result"])
        with open(self.log_file, "ab") as log:
            self._shim = subprocess.Popen(
                [sys.executable, "-I", "-S", os.fspath(_SHIM), os.fspath(file)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._identity = f"testbed://{pod_uid}-{self.name}-{self.restarts}"
        self._started_at = now()
        self.state = {"running": {"startedAt": self._started_at}}
        threading.Thread(target=self._tell_end, args=(self._shim,), daemon=True).start()

    def _tell_end(self, shim: subprocess.Popen[bytes]) -> None:
        shim.wait()
        self._on_end()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the container's process 1; nothing when it has ended."""
        if self.is_running:
            assert self._shim is not None
            assert self._shim.stdin is not None
            try:
                self._shim.stdin.write(bytes([number]))
                self._shim.stdin.flush()
            except BrokenPipeError:  # it ended at this moment
                return

    def finish(self) -> int:
        """Take over how the ended container ended; returns its exit code."""
        assert self._shim is not None
        assert self._shim.stdin is not None
        self._shim.wait()
        self._shim.stdin.close()
        if not self._result.exists():
            told = self.log_file.read_text(errors="replace")[-1000:]
            raise RuntimeError(f"the shim of container {self.name} ended with {self._shim.returncode}: {told}")
        result = json.loads(self._result.read_text())
        code: int = result["exitCode"]
        reason = "Completed" if code == 0 else "Error"
        message = self._termination_message(code)
        if result["outOfMemory"]:
            reason = "OOMKilled"
        elif result["startError"]:
            reason, message = "StartError", f"failed to start container: {result['startError']}"
        terminated: dict[str, Any] = {
            "exitCode": code,
            "reason": reason,
            "startedAt": self._started_at,
            "finishedAt": now(),
            "containerID": self._identity,
        }
        self.state = {"terminated": {**terminated, "message": message} if message else terminated}
        return code

    def _termination_message(self, code: int) -> str:
        message = _last_bytes(self.termination_file, _MESSAGE_BYTES)
        if not message and code != 0 and self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            message = _last_bytes(self.log_file, _FALLBACK_BYTES)
        return message

    def restart_later(self) -> None:
        """Keep the state of the run that ended, and wait for the next one."""
        self._last_state = self.state
        self.restarts += 1
        self.wait_for("CrashLoopBackOff", f"back-off restarting failed container={self.name}")


def _last_bytes(file: Path, count: int) -> str:
    return file.read_bytes()[-count:].decode(errors="replace")
