"""Folders and memory that a pod has."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from sae_job.doctor.findings import Finding, gigabytes

LEAST_FREE_BYTES = 2**30
# Processes on several GPUs exchange data through shared memory; containers have 64 MiB of it by themselves.
LEAST_SHARED_BYTES = 2**30
SHARED_MEMORY = Path("/dev/shm")


def check_folders(environment: Mapping[str, str], *, least_free: int = LEAST_FREE_BYTES) -> Iterator[Finding]:
    """HOME and TMPDIR: downloads, caches of compilers and parts of shards go there."""
    for name, default in (("HOME", ""), ("TMPDIR", "/tmp")):
        folder = environment.get(name) or default
        if not folder:
            yield Finding(name, "is not set", f"set {name} to a folder that the pod may write to")
            continue
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".sae-job-doctor-") as file:
                file.write(b"can write")
                file.flush()
            free = shutil.disk_usage(folder).free
        except OSError as error:
            why = error.strerror or str(error)
            yield Finding(name, f"{folder} cannot be written ({why})", "mount an emptyDir or another volume there")
            continue
        if free < least_free:
            told = f"{folder} has {gigabytes(free)} left"
            yield Finding(name, told, f"make room: at least {gigabytes(least_free)}, better as much as the model has")
        else:
            yield Finding(name, f"{folder} can be written, {gigabytes(free)} left")


def check_shared_memory(gpus: int, *, folder: Path = SHARED_MEMORY, least: int = LEAST_SHARED_BYTES) -> Finding:
    """/dev/shm, which matters where one pod has several GPUs."""
    try:
        facts = os.statvfs(folder)
    except OSError as error:
        return Finding(
            "shared memory", f"no {folder} ({error.strerror})", "mount an emptyDir with medium: Memory there"
        )
    size = facts.f_frsize * facts.f_blocks
    if gpus > 1 and size < least:
        told = f"{size / 2**20:.0f} MiB for {gpus} GPUs"
        return Finding(
            "shared memory", told, f"mount an emptyDir with medium: Memory of {gigabytes(least)} at {folder}"
        )
    return Finding("shared memory", f"{size / 2**20:.0f} MiB" if size < 2**30 else gigabytes(size))
