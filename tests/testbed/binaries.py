"""The programs of the test bed, built from source with Go once per machine.

Each folder below `go/` is a module whose go.mod and go.sum pin every source. A build is kept in the cache folder under
a key made of these files, so that a change of a version builds anew and nothing else does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.testbed.paths import GO_SOURCES, cache_directory

KUBERNETES_VERSION = "1.35.4"
_VERSION_PACKAGE = "k8s.io/component-base/version"
# Without a version some versions of kubectl cannot parse the server's.
_VERSION_FLAGS = (
    f"-s -w -X {_VERSION_PACKAGE}.gitVersion=v{KUBERNETES_VERSION}"
    f" -X {_VERSION_PACKAGE}.gitMajor={KUBERNETES_VERSION.split('.')[0]}"
    f" -X {_VERSION_PACKAGE}.gitMinor={KUBERNETES_VERSION.split('.')[1]}"
)
_PROGRESS_SECONDS = 15.0


@dataclass(frozen=True)
class Tool:
    """A Go module below `go/`, the package in it to build, and the names that the one binary answers to."""

    name: str
    package: str
    linker_flags: str = "-s -w"
    also_named: tuple[str, ...] = ()

    @property
    def sources(self) -> Path:
        return GO_SOURCES / self.name

    def key(self) -> str:
        """Hash of everything that decides what the build gives."""
        digest = hashlib.sha256(f"{self.package} {self.linker_flags}".encode())
        for source in sorted(self.sources.iterdir()):
            digest.update(f"{source.name} {source.stat().st_size}\n".encode())
            digest.update(source.read_bytes())
        return digest.hexdigest()[:16]

    def directory(self) -> Path:
        """Where the built binary lies, or will lie."""
        return cache_directory() / "bin" / f"{self.name}-{self.key()}"

    def path(self) -> Path:
        return self.directory() / self.name


KUBE = Tool(
    name="kube",
    package=".",
    linker_flags=_VERSION_FLAGS,
    also_named=("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl"),
)
VERSITYGW = Tool(name="versitygw", package="github.com/versity/versitygw/cmd/versitygw")
HELM = Tool(name="helm", package="helm.sh/helm/v3/cmd/helm")
KUEUE = Tool(name="kueue", package="sigs.k8s.io/kueue/cmd/kueue")
# A real node's programs, for the tests that must see real containers; they build these when they run.
KUBELET = Tool(name="kubelet", package="k8s.io/kubernetes/cmd/kubelet", linker_flags=_VERSION_FLAGS)
PAUSE = Tool(name="pause", package=".")
ALL_TOOLS = (VERSITYGW, HELM, KUBE, KUEUE)


def kube_program(name: str) -> Path:
    """Path of etcd, kube-apiserver, kube-controller-manager, kube-scheduler or kubectl; built when needed."""
    return ensure_built(KUBE).parent / name


def ensure_built(tool: Tool) -> Path:
    """Path of the tool's binary; builds it first when this machine has none of that key.

    Raises `RuntimeError` with the end of the build's log when it cannot be built.
    """
    if not tool.path().exists():
        with _locked(cache_directory() / f"build-{tool.name}.lock"):
            if not tool.path().exists():  # another process may have built it while this one waited
                _build(tool)
    return tool.path()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(tool: Tool) -> None:
    if shutil.which("go") is None:
        raise RuntimeError(f"the test bed builds {tool.name} from source: install Go 1.26 or newer and put it on PATH")
    directory = tool.directory()
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "build.log"
    unfinished = directory / f"{tool.name}.unfinished"
    _say(f"building {tool.name}, once per machine, into {directory} (log: {log})")
    command = [
        "go",
        "build",
        "-v",
        "-trimpath",
        "-ldflags",
        tool.linker_flags,
        "-o",
        os.fspath(unfinished),
        tool.package,
    ]
    started = time.monotonic()
    status = _run_build(tool.name, command, tool.sources, log, started)
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {status}; its log ends:\n{log.read_text()[-3000:]}")
    for name in tool.also_named:
        link = directory / name
        link.unlink(missing_ok=True)
        link.symlink_to(tool.name)
    unfinished.rename(tool.path())
    _say(f"built {tool.name} in {time.monotonic() - started:.0f} s")


def _run_build(name: str, command: list[str], directory: Path, log: Path, started: float) -> int:
    """Run the build, copy its output to the log, and tell every so often how far it is."""
    environment = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}
    lines = 0
    told = started
    with (
        open(log, "w") as output,
        subprocess.Popen(
            command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as build,
    ):
        assert build.stdout is not None
        for line in build.stdout:  # one line per downloaded module and per compiled package
            output.write(line)
            output.flush()
            lines += 1
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                _say(f"building {name}: {lines} packages, {told - started:.0f} s ({line.strip()})")
    return build.returncode


def _say(text: str) -> None:
    print(f"test bed: {text}", file=sys.stderr, flush=True)
