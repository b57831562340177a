"""Container images, built on this machine: a base with Debian's Python, and on it the targets of the Dockerfile.

There is no image registry: the base is made from Debian's packages with mmdebstrap, and buildah builds the rest as any
builder would. Layers and archives are kept in the cache folder, so that a second build takes seconds.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.testbed.paths import CHECKOUT, cache_directory

BASE_IMAGE = "localhost/sae-operator/python:3.11-bookworm"
OPERATOR_IMAGE = "localhost/sae-operator/operator:test"
JOB_IMAGE = "localhost/sae-operator/job:test"
# Debian package of each program that builds images.
PROGRAMS = {"buildah": "buildah", "mmdebstrap": "mmdebstrap"}
BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates")
# What Debian's slim images leave out.
UNWANTED_PATHS = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
)
# Folders that are empty in every Debian: where something was mounted in a build, an image keeps the folder.
CERTIFICATES, WHEELS = "/mnt", "/srv"
# Settings of this machine's pip that a build takes as they are.
_PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host", "timeout")


@dataclass(frozen=True)
class Image:
    """An image of the local store.

    Attributes:
        name: what pods call it.
        id: digest of its configuration.
        seconds: how long the build took, from the cache or not.
    """

    name: str
    id: str
    seconds: float


def missing_programs(programs: Mapping[str, str]) -> list[str]:
    """Debian packages of the programs that are not on PATH.

    Args:
        programs: Debian package of each program.
    """
    path = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
    return sorted({package for program, package in programs.items() if shutil.which(program, path=path) is None})


def require(programs: Mapping[str, str], purpose: str) -> None:
    """Raise `RuntimeError` that names what this machine lacks for a purpose: root, or Debian packages."""
    if os.geteuid() != 0:
        raise RuntimeError(f"{purpose} needs root: it mounts file systems and makes control groups and networks")
    missing = missing_programs(programs)
    if missing:
        raise RuntimeError(f"{purpose} needs more of Debian's packages: apt-get install {' '.join(missing)}")


def ensure_base_image() -> Image:
    """Debian with Python 3.11, in place of `python:3.11-slim-bookworm`."""
    require(PROGRAMS, "building images")
    with _locked():
        started = time.monotonic()
        if not _is_there(BASE_IMAGE):
            with tempfile.TemporaryDirectory(dir=_directory()) as folder:
                excludes = [f"--dpkgopt=path-exclude={path}" for path in UNWANTED_PATHS]
                command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(BASE_PACKAGES)}", *excludes]
                _run("mmdebstrap", [*command, "bookworm", f"{folder}/root.tar"])
                Path(folder, "Dockerfile").write_text("FROM scratch\nADD root.tar /\n")
                _build(BASE_IMAGE, [folder])
        return _image(BASE_IMAGE, started)


def ensure_image(target: str, name: str) -> Image:
    """A target of the Dockerfile, built from this checkout with the index, the certificates and the folders of wheels
    (`PIP_FIND_LINKS`) of this machine's pip. None of these is in the image afterwards.

    Args:
        target: `operator` or `job`.
        name: what to call it.
    """
    ensure_base_image()
    with _locked(), tempfile.TemporaryDirectory(dir=_directory()) as folder:
        started = time.monotonic()
        configuration = Path(folder, "pip.conf")
        options = [f"--build-arg=PYTHON={BASE_IMAGE}", f"--secret=id=pip.conf,src={configuration}"]
        found = pip_settings()
        lines = [f"{key} = {value}" for key, value in found.items() if key in _PIP_SETTINGS]
        if "cert" in found:
            certificates = Path(folder, "certificates")
            certificates.mkdir()
            shutil.copy(found["cert"], certificates / "ca.crt")
            lines.append(f"cert = {CERTIFICATES}/ca.crt")
            options.append(f"--volume={certificates}:{CERTIFICATES}:ro")
        folders = [folder for folder in map(Path, found.get("find-links", "").split()) if folder.is_dir()]
        if folders:
            staged = _staged(folders, Path(folder, "wheels"))
            lines.append(f"find-links = {WHEELS}")
            options.append(f"--volume={staged}:{WHEELS}:ro")
        configuration.write_text("\n".join(["[global]", *lines, ""]))
        # Under a name of its own the large layer outlives the pruning of what no name leads to any more.
        for stage, tag in ((f"{target}-dependencies", f"{name}-dependencies"), (target, name)):
            _build(tag, [f"--target={stage}", *options, os.fspath(CHECKOUT)])
        _buildah("rmi", "--prune")
        return _image(name, started)


def ensure_image_with(base: str, name: str, folders: Mapping[str, Path]) -> Image:
    """An image and folders of this machine in it, as people put a model and a text into an image of their own.

    Args:
        base: the image.
        name: what to call the new one.
        folders: a folder of this machine for each path in the image.
    """
    with _locked(), tempfile.TemporaryDirectory(dir=_directory()) as context:
        started = time.monotonic()
        lines = [f"FROM {base}"]
        for number, (path, folder) in enumerate(folders.items()):
            _staged([folder], Path(context, str(number)))
            lines.append(f"COPY {number} {path}")
        Path(context, "Dockerfile").write_text("\n".join([*lines, ""]))
        _build(name, [context])
        return _image(name, started)


def ensure_program_image(repository: str, program: Path) -> Image:
    """An image of one static program, which it runs; its tag is made from the program's bytes."""
    require(PROGRAMS, "building images")
    name = f"{repository}:{hashlib.sha256(program.read_bytes()).hexdigest()[:16]}"
    with _locked():
        started = time.monotonic()
        if not _is_there(name):
            with tempfile.TemporaryDirectory(dir=_directory()) as context:
                shutil.copy(program, Path(context, program.name))
                lines = ("FROM scratch", f"COPY {program.name} /{program.name}", f'ENTRYPOINT ["/{program.name}"]', "")
                Path(context, "Dockerfile").write_text("\n".join(lines))
                _build(name, [context])
        return _image(name, started)


def ensure_archive(image: Image) -> Path:
    """The image as an archive that containerd imports: as large as its layers are, unpacked."""
    folder = _directory() / "archives"
    folder.mkdir(exist_ok=True)
    stem = image.name.rpartition("/")[2].replace(":", "-")
    archive = folder / f"{stem}-{image.id[:16]}.tar"
    with _locked():
        if not archive.exists():
            for old in folder.glob(f"{stem}-*.tar"):
                old.unlink()
            unfinished = archive.with_suffix(".unfinished")
            unfinished.unlink(missing_ok=True)
            # Of the kinds of archives the one that is not compressed: it is read once, on this machine.
            _buildah("push", "--quiet", image.id, f"docker-archive:{unfinished}:{image.name}")
            unfinished.rename(archive)
    return archive


def pip_settings() -> dict[str, str]:
    """Settings of this machine's pip, from its files and its environment: name without section, and value."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    settings: dict[str, str] = {}
    for line in text.splitlines():  # global.index-url='https://…', :env:.cert='/…'; later ones win
        key, separator, value = line.partition("=")
        if separator:
            settings[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    return settings


def _directory() -> Path:
    directory = cache_directory() / "images"
    directory.mkdir(exist_ok=True)
    return directory


@contextmanager
def _locked() -> Iterator[None]:
    with open(_directory() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _staged(folders: Sequence[Path], target: Path) -> Path:
    """The files of some folders in one folder, linked where that is possible."""

    def link(source: str, destination: str) -> None:
        try:
            os.link(source, destination)
        except OSError:  # another file system
            shutil.copy(source, destination)

    for folder in folders:
        shutil.copytree(folder, target, copy_function=link, dirs_exist_ok=True)
    return target


def _is_there(name: str) -> bool:
    return bool(_buildah("images", "--quiet", "--filter", f"reference={name}").strip())


def _image(name: str, started: float) -> Image:
    (identity,) = set(_buildah("images", "--quiet", "--no-trunc", name).split())
    return Image(name, identity.removeprefix("sha256:"), time.monotonic() - started)


def _build(name: str, arguments: Sequence[str]) -> None:
    options = ["--isolation=chroot", "--pull-never", "--network=host", "--layers", f"--tag={name}"]
    _buildah("bud", *options, *arguments)


def _buildah(*arguments: str) -> str:
    store = [f"--root={_directory() / 'store'}", f"--runroot={_directory() / 'run'}", "--storage-driver=overlay"]
    return _run("buildah", ["buildah", *store, *arguments])


def _run(name: str, command: Sequence[str]) -> str:
    """What a command prints; raises `RuntimeError` with the end of its errors."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout
