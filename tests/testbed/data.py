"""Models and texts that pods see as `/opt/sae-operator-testbed`, made once per machine below the cache folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from tests.testbed.paths import CHECKOUT, cache_directory
from tools.small_model import make_folder

POD_DATA = "/opt/sae-operator-testbed"
_TOOL = CHECKOUT / "tools" / "small_model.py"


def data_directory() -> Path:
    """Folder of this machine that pods see as `POD_DATA`, read-only: they see at once what is made in it."""
    directory = cache_directory() / "data"
    directory.mkdir(exist_ok=True)
    return directory


def ensure_small_model() -> Path:
    """Folder with SmolLM2-135M in bfloat16; made by a process of its own, since it takes more than a gigabyte."""
    directory = data_directory() / "smollm2-135m"
    subprocess.run([sys.executable, _TOOL, "--model", directory], check=True)
    return directory


def ensure_english_text() -> Path:
    """Folder with English text as JSON lines."""
    directory = data_directory() / "english-text"
    subprocess.run([sys.executable, _TOOL, "--text", directory], check=True)
    return directory


def ensure_tiny_model() -> Path:
    """Folder with the tiny random model of `tests.tiny_model`."""
    from tests import tiny_model

    def fill(directory: Path) -> None:
        tiny_model.write_tiny_model(directory)

    source = Path(tiny_model.__file__)
    directory = data_directory() / "tiny-model"
    make_folder(directory, hashlib.sha256(source.read_bytes()).hexdigest(), fill)
    return directory
