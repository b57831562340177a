"""Files that are generated from the models and checked in: write them, or tell which differ."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def differing_files(files: Mapping[str, str], folder: Path) -> list[str]:
    """Names of files that are missing, differ, or should not be there, sorted."""
    present = {path.name: path.read_text() for path in folder.glob("*") if path.is_file()} if folder.is_dir() else {}
    return sorted(name for name in {*files, *present} if files.get(name) != present.get(name))


def write_or_check(files: Mapping[str, str], arguments: Sequence[str], *, program: str) -> int:
    """The command line of a generator: `--out FOLDER [--check]`.

    Returns:
        The exit code: 1 when `--check` finds a difference.
    """
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("--out", type=Path, required=True, help="folder of the generated files")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file differs")
    options = parser.parse_args(arguments)
    differing = differing_files(files, options.out)
    if options.check:
        for name in differing:
            print(f"{options.out / name} is not what the models say; run `make generate`", file=sys.stderr)
        return 1 if differing else 0
    options.out.mkdir(parents=True, exist_ok=True)
    for name in differing:
        if name in files:
            (options.out / name).write_text(files[name])
        else:
            (options.out / name).unlink()
    return 0
