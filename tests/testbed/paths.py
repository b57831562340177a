"""Where the test bed finds its sources and keeps what is made once per machine."""

from __future__ import annotations

import os
from pathlib import Path

ENV_CACHE = "SAE_OPERATOR_TESTBED_CACHE"

CHECKOUT = Path(__file__).resolve().parents[2]
GO_SOURCES = Path(__file__).resolve().parent / "go"


def cache_directory() -> Path:
    """`$SAE_OPERATOR_TESTBED_CACHE`, or `~/.cache/sae-operator/testbed`; created when it is not there."""
    chosen = os.environ.get(ENV_CACHE)
    directory = Path(chosen) if chosen else Path.home() / ".cache" / "sae-operator" / "testbed"
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    return directory
