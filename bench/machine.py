"""What benchmarks' results files share: the machine and the versions, and that several processes write them."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from bench.peers import DICTIONARY_LEARNING, SAE_LENS_NEWEST, SPARSIFY


def machine() -> dict[str, object]:
    with open("/proc/cpuinfo") as file:
        lines = [line.split(":", 1) for line in file if ":" in line]
    facts = {name.strip(): value.strip() for name, value in lines}
    wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in facts.get("flags", "").split()]
    return {
        "processor": f"{facts.get('model name', platform.machine())} ({', '.join(wide)})",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "peers": {
            "saelens": SAE_LENS_NEWEST.name,
            "sparsify": SPARSIFY.name,
            "dictionary_learning": DICTIONARY_LEARNING.name,
        },
    }


@contextmanager
def only_one_at(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block for the same folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
