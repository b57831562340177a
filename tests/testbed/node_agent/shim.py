"""The process between the node agent and one container.

    python -I -S shim.py CONTAINER.json < CONTROL > LOG

Gives the container a root of its own, starts it as process 1 of its own namespaces, enforces its memory limit, and
writes how it ended to the file `result` of CONTAINER.json. Each byte on standard input is the number of a signal for
the container; the end of standard input, which also comes when the agent dies, kills it. Runs with the standard
library alone, without site-packages, so that it starts in a few hundredths of a second.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

# From <linux/mount.h>, <linux/sched.h>, <linux/prctl.h>
MS_RDONLY, MS_NOSUID, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 32, 4096, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID = 0x00020000, 0x04000000, 0x08000000, 0x20000000
PR_SET_NO_NEW_PRIVS = 38

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# What a container runtime gives.
SHARED_MEMORY_OPTIONS = "size=64m,mode=1777"
MEMORY_POLL_SECONDS = 0.05

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(status: int, what: str) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str | None = None) -> None:
    encoded = (source.encode(), target.encode(), None if kind is None else kind.encode())
    data = None if options is None else options.encode()
    _checked(_libc.mount(*encoded, ctypes.c_ulong(flags), data), f"mount {source} on {target}")


def _bind(source: str, target: str, *, read_only: bool) -> None:
    _mount(source, target, flags=MS_BIND | MS_REC)
    if read_only:
        _mount("none", target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY)


# The container's root


def _build_root(container: dict[str, Any]) -> str:
    """Mount the container's root in this mount namespace; returns its path."""
    scratch = Path(container["scratch"])
    _mount("tmpfs", str(scratch), "tmpfs", MS_NOSUID, "mode=755")
    upper, work, root = scratch / "upper", scratch / "work", scratch / "root"
    for folder in (upper, work, root):
        folder.mkdir()
    _mount("overlay", str(root), "overlay", 0, f"lowerdir=/,upperdir={upper},workdir={work}")
    read_only = bool(container["readOnlyRoot"])
    # An image's own /tmp and /run are empty; this machine's are not.
    for name, mode in (("tmp", "1777"), ("run", "755")):
        (root / name).mkdir(exist_ok=True)
        _mount("tmpfs", str(root / name), "tmpfs", MS_NOSUID, f"mode={mode}")
    _mount("proc", str(root / "proc"), "proc")
    _bind("/sys", str(root / "sys"), read_only=True)
    _build_devices(root / "dev", container["devices"])
    # Parents come before what is mounted below them.
    for mount in sorted(container["mounts"], key=lambda mount: mount["target"]):
        target = _make_target(root, mount["target"], is_folder=os.path.isdir(mount["source"]))
        _bind(mount["source"], str(target), read_only=mount["readOnly"])
    if read_only:
        mounted = {mount["target"].rstrip("/") for mount in container["mounts"]}
        for folder in {"/", "/run", "/tmp"} - mounted:
            _mount("none", f"{root}{folder}", flags=MS_REMOUNT | MS_BIND | MS_RDONLY)
    return str(root)


def _build_devices(folder: Path, devices: list[str]) -> None:
    _mount("tmpfs", str(folder), "tmpfs", MS_NOSUID, "mode=755")
    for name in (*DEVICES, *devices):
        if os.path.exists(f"/dev/{name}"):
            (folder / name).touch()
            _mount(f"/dev/{name}", str(folder / name), flags=MS_BIND)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        (folder / name).symlink_to(f"/proc/self/{target}")
    (folder / "shm").mkdir()
    _mount("tmpfs", str(folder / "shm"), "tmpfs", MS_NOSUID, SHARED_MEMORY_OPTIONS)


def _make_target(root: Path, target: str, *, is_folder: bool) -> Path:
    """The place where something is mounted, made when it is not there, in folders that everybody may pass through.

    This machine may keep the checkout or the interpreter below a folder that is closed to others, such as /root: it is
    opened in the container's overlay alone.
    """
    path = root
    for part in Path(target.lstrip("/")).parts[:-1]:
        path = path / part
        if path.is_symlink():
            # As seen from inside: `/var/run` leads to the container's `/run`, not to this machine's.
            link = os.readlink(path)
            path = root / link.lstrip("/") if link.startswith("/") else path.parent / link
        path.mkdir(exist_ok=True)
        mode = path.stat().st_mode
        if mode & 0o011 != 0o011:
            path.chmod(mode | 0o011)
    path = path / Path(target).name
    if is_folder:
        path.mkdir(exist_ok=True)
    else:
        path.touch()
    return path


def _become(container: dict[str, Any], root: str) -> NoReturn:
    """Enter the root, drop privileges, and turn into the container's command."""
    os.chroot(root)
    directory = container["workingDirectory"]
    os.chdir(directory if os.path.isdir(directory) else "/")
    os.umask(0o022)
    os.setgroups(container["groups"])
    os.setgid(container["group"])
    os.setuid(container["user"])
    if container["noNewPrivileges"]:
        _checked(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them, and what is ignored is inherited
    os.execvpe(container["command"][0], container["command"], container["environment"])


# The container's life


def _memory_bytes(process: int) -> int:
    """Memory of a process and its descendants that cannot be taken back: anonymous and shared, not mapped files."""
    total = 0
    pending = [process]
    while pending:
        one = pending.pop()
        try:
            for line in Path(f"/proc/{one}/status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:")):
                    total += int(line.split()[1]) * 1024
            for thread in os.listdir(f"/proc/{one}/task"):
                pending += [int(child) for child in Path(f"/proc/{one}/task/{thread}/children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
    return total


def _wait(process: int, limit: int | None) -> tuple[int, bool]:
    """Pass signals on until the container ends: its wait status, and whether it was killed for its memory."""
    out_of_memory = False
    ended = os.pidfd_open(process)
    watched = [ended, 0]
    while True:
        ready, _, _ = select.select(watched, [], [], None if limit is None else MEMORY_POLL_SECONDS)
        if ended in ready:
            return os.waitpid(process, 0)[1], out_of_memory
        if 0 in ready:
            numbers = os.read(0, 64)
            for number in numbers:
                os.kill(process, number)
            if not numbers:
                os.kill(process, signal.SIGKILL)
                watched = [ended]
        if limit is not None and not out_of_memory and _memory_bytes(process) > limit:
            out_of_memory = True
            os.kill(process, signal.SIGKILL)


def _start(container: dict[str, Any]) -> tuple[int, str]:
    """Fork the container: its process id, and why it could not be started, or an empty string."""
    _checked(_libc.unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS), "unshare")
    _mount("none", "/", flags=MS_REC | MS_PRIVATE)
    socket.sethostname(container["hostName"])
    failure_out, failure_in = os.pipe()  # closed by a successful exec
    process = os.fork()
    if process == 0:
        try:
            os.close(failure_out)
            null = os.open("/dev/null", os.O_RDONLY)
            os.dup2(null, 0)
            os.setsid()
            _become(container, _build_root(container))
        except BaseException as error:  # noqa: BLE001 - told to the parent; this copy of the process must end here
            os.write(failure_in, str(error).encode() or b"failed")
            os._exit(128)
    os.close(failure_in)
    with open(failure_out, "rb") as reader:
        return process, reader.read().decode(errors="replace")


def main() -> None:
    container = json.loads(Path(sys.argv[1]).read_text())
    process, failure = _start(container)
    if not failure:
        Path(container["started"]).touch()
    status, out_of_memory = _wait(process, container["memoryLimit"])
    code = os.waitstatus_to_exitcode(status)
    result = {"exitCode": code if code >= 0 else 128 - code, "outOfMemory": out_of_memory, "startError": failure}
    result["finishedAt"] = time.time()
    path = Path(container["result"])
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result))
    unfinished.rename(path)


if __name__ == "__main__":
    main()
