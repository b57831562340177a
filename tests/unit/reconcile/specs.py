"""Specs that the reconcile tests share."""

from __future__ import annotations

from typing import Any


def cache_spec(**changes: Any) -> dict[str, Any]:
    """An ActivationCache of 500 rows, written by two pods."""
    return {
        "model": {"name": "tiny"},
        "dataset": {"path": "text"},
        "hooks": [{"name": "model.layers.0"}],
        "contextSize": 16,
        "tokens": 500,
        "storage": {"uri": "s3://saes/caches", "secretRef": {"name": "s3"}},
        "parallelism": 2,
    } | changes


def job_spec(activations: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Two SAEs, trained on an inline cache."""
    return {
        "activations": activations if activations is not None else {"cache": cache_spec()},
        "saes": [
            {"name": "k16", "architecture": {"type": "topk", "k": 16}, "dSae": 64},
            {"name": "k32", "architecture": {"type": "topk", "k": 32}, "dSae": 64},
        ],
        "training": {"tokens": 1000},
        "output": {"uri": "s3://saes/out", "secretRef": {"name": "s3"}},
    } | changes
