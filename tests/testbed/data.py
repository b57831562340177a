"""Models and texts that pods see as `/opt/sae-operator-testbed`, made once per machine below the cache folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
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
    from tests.tiny_model import write_tiny_model

    return _ensure_tiny("tiny-model", write_tiny_model)


def ensure_tiny_text() -> Path:
    """Folder with the tiny text of `tests.tiny_model`."""
    from tests.tiny_model import write_tiny_text

    return _ensure_tiny("tiny-text", write_tiny_text)


def _ensure_tiny(name: str, write: Callable[[Path], object]) -> Path:
    source = (CHECKOUT / "tests" / "tiny_model.py").read_bytes()
    directory = data_directory() / name

    def fill(unfinished: Path) -> None:
        write(unfinished)

    make_folder(directory, hashlib.sha256(source).hexdigest(), fill)
    return directory
