"""A process of its own that a benchmark asks to work: one request a line, answered with one line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Worker:
    """A script of this folder in a process of its own, in an environment of its own.

    Args:
        name: what messages call it.
        python: interpreter that runs the script.
        script: file name in this folder.
        arguments: of the script.
        environment: environment variables of the process.
    """

    def __init__(
        self, name: str, python: Path | str, script: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name(script), *arguments],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: str) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            RuntimeError: the process has ended.
        """
        self.send(request)
        return self.answer()

    def send(self, request: str) -> None:
        assert self._process.stdin is not None
        print(request, file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """The next answer; as `ask`."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Let the process end, and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._process.kill()
        self.close()
