"""Fixtures of the fault tests."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# Room for the contexts and about half of the shards of the tests' cache.
SMALL_DISK_KIBIBYTES = 192


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that is nearly full from the start (a tmpfs of limited size; mounting it needs root)."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_KIBIBYTES}k", "tmpfs", str(folder)],
        check=True,
        capture_output=True,
    )
    yield folder
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)
