"""The console script `sae-job`: names the extra to install when what a command needs is missing."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

# Module that is missing -> extra that brings it.
_EXTRA_OF = {
    "typer": "cli",
    "rich": "cli",
    "kubernetes": "cli",
    "torch": "job",
    "transformers": "job",
    "datasets": "job",
    "huggingface_hub": "job",
    "tokenizers": "job",
    "safetensors": "job",
    "numpy": "job",
    "boto3": "cli",
    "botocore": "cli",
    "prometheus_client": "job",
    "matplotlib": "job",
}


# What a process that ends by SIGTERM answers: 128 + 15.
_STOPPED = 143


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """Nothing has begun yet, so nothing can be lost. Python's own finalization would wait for imports."""
    os._exit(_STOPPED)


def main() -> int:
    """Run the command line; returns the exit code."""
    # The first process of a container is not ended by a signal that it has no handler for, and imports take a second.
    signal.signal(signal.SIGTERM, _stop_at_once)
    try:
        from sae_job.cli import run_command_line

        return run_command_line(sys.argv[1:])
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"sae-job: {error.name} is not installed; run: pip install 'sae-operator[{extra}]'", file=sys.stderr)
        return 2
