"""Activations of language models to object storage, and sparse autoencoders from them.

    from sae_job import SAE, run

    run("sae-job.yaml")                       # what `sae-job run -f sae-job.yaml` does
    sae = SAE.load("s3://bucket/job/k32")     # one of its SAEs

Importing this package is light; what a name needs is imported when the name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_job.saes.base import SAE as SAE
    from sae_job.steps.api import run as run

__all__ = ["SAE", "run"]

_HOMES = {"SAE": "sae_job.saes.base", "run": "sae_job.steps.api"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
