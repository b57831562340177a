"""Environments of the libraries that the product is compared with: each one its own, made once per machine.

They lie below the test bed's cache folder and never touch the project's environment. PyTorch comes from the folder
that `PIP_FIND_LINKS` or `UV_FIND_LINKS` names, where one is set.

    python -m bench.peers            # make them all
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from uv import find_uv_bin

from tests.testbed.paths import CHECKOUT, cache_directory

CONSTRAINTS = CHECKOUT / "constraints.txt"
# With Triton among the constraints the installer takes PyTorch for CUDA, and peers then run Triton on a CPU.
NOT_FOR_PEERS = ("triton==",)


@dataclass(frozen=True)
class Peer:
    """A library in an environment of its own.

    Attributes:
        distribution: its name in the package index.
        version: the version that is installed, with PyTorch in the version that the project's own tests use.
        module: what must import afterwards.
        bounds: versions of its dependencies that it works with, where its own metadata are too wide.
    """

    distribution: str
    version: str
    module: str
    bounds: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.distribution}-{self.version}"

    def python(self) -> Path:
        """Path of the environment's Python; makes the environment first when this machine has none.

        Raises:
            RuntimeError: it could not be made; the message ends with the installer's last words.
        """
        finished = self._directory() / ".finished"
        if not finished.exists():
            with _locked(self._directory().with_name(f"{self.name}.lock")):
                if not finished.exists():  # another process may have made it while this one waited
                    self._make()
                    finished.touch()
        return self._interpreter()

    def _directory(self) -> Path:
        """Named after everything that decides what is in it."""
        parts = (*self.bounds, peer_constraints(), sys.version.split()[0])
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
        return cache_directory() / "peers" / f"{self.name}-{key}"

    def _interpreter(self) -> Path:
        return self._directory() / "bin" / "python"

    def _make(self) -> None:
        directory, python = self._directory(), os.fspath(self._interpreter())
        print(f"peers: making the environment of {self.name}, once per machine, in {directory}", file=sys.stderr)
        shutil.rmtree(directory, ignore_errors=True)
        _run([sys.executable, "-m", "venv", "--without-pip", os.fspath(directory)])
        constraints = directory / "constraints.txt"
        constraints.write_text(peer_constraints())
        wanted = ["torch", f"{self.distribution}=={self.version}", *self.bounds, "--constraint", os.fspath(constraints)]
        _run([find_uv_bin(), "pip", "install", "--quiet", "--python", python, *wanted])
        _run([python, "-c", f"import {self.module}"])


# It asks for NumPy 1, with which newer releases of pyarrow do not import.
SAE_LENS_REFERENCE = Peer("sae-lens", "5.6.0", "sae_lens", bounds=("pyarrow<20",))
SAE_LENS_NEWEST = Peer("sae-lens", "6.54.12", "sae_lens")
SPARSIFY = Peer("eai-sparsify", "1.3.0", "sparsify")
# With a newer nnsight it does not import.
DICTIONARY_LEARNING = Peer("dictionary-learning", "0.1.0", "dictionary_learning", bounds=("nnsight<0.4",))
ALL_PEERS = (SAE_LENS_REFERENCE, SAE_LENS_NEWEST, SPARSIFY, DICTIONARY_LEARNING)


def peer_constraints() -> str:
    """The project's constraints, but for what is not for peers."""
    lines = CONSTRAINTS.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(NOT_FOR_PEERS))


def peer_environment() -> dict[str, str]:
    """Environment variables for a peer's programs: nothing of the project's, and nothing is fetched from a hub."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # pip separates folders by spaces, uv by commas.
    links = environment.get("PIP_FIND_LINKS", "").split()
    if links:
        environment.setdefault("UV_FIND_LINKS", ",".join(links))
    return environment | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, env=peer_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    for each in ALL_PEERS:
        print(each.python())
