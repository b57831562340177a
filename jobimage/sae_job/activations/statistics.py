"""Exact statistics of stored activations: sums in float64, per shard, merged in the order of the shards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sae_job.activations.manifest import HookStatistics, HookSums
from sae_job.errors import InvalidInput

# Rows converted to float64 at a time: what stays in the cache of a core.
CHUNK_ROWS = 512


def sums_of(rows: torch.Tensor, hook: str, *, calibration_median_norm: float | None = None) -> HookSums:
    """Sums over the rows of one shard, of the values as stored.

    Args:
        rows: [rows, d_in] in storage dtype, on the CPU.
        hook: its name, for messages.
        calibration_median_norm: recorded with the sums.

    Raises:
        InvalidInput: a value is infinite or not a number.
    """
    width = rows.shape[1]
    total = torch.zeros(width, dtype=torch.float64)
    chunk = torch.empty((CHUNK_ROWS, width), dtype=torch.float64)
    norms = torch.zeros((), dtype=torch.float64)
    squared = torch.zeros((), dtype=torch.float64)
    for start in range(0, rows.shape[0], CHUNK_ROWS):
        part = rows[start : start + CHUNK_ROWS]
        exact = chunk[: part.shape[0]].copy_(part)
        total += exact.sum(dim=0)
        norm = torch.linalg.vector_norm(exact, dim=1)
        norms += norm.sum()
        squared += torch.dot(norm, norm)
    if not bool(torch.isfinite(squared)):
        raise InvalidInput(
            "NotFinite",
            f"activations of {hook} are not finite in {str(rows.dtype).removeprefix('torch.')}: use bfloat16 for "
            "storage.dtype and model.dtype, or another layer",
            field="spec.storage.dtype",
        )
    return HookSums(
        d_in=width,
        sum=total.tolist(),
        sum_norm=float(norms),
        sum_squared_norm=float(squared),
        calibration_median_norm=calibration_median_norm,
    )


def merge_sums(name: str, shards: Sequence[tuple[int, HookSums]]) -> HookStatistics:
    """Statistics of one hook over all rows.

    Args:
        name: name of the hook.
        shards: rows and sums of each shard, in order; at least one row in all.

    Raises:
        InvalidInput: the shards were filtered by different norms, so they are not of one cache.
    """
    medians = {sums.calibration_median_norm for _, sums in shards}
    if len(medians) > 1:
        raise InvalidInput(
            "CalibrationDiffers",
            f"shards disagree on the median norm of {name} ({sorted(medians, key=str)}), so different workers dropped "
            "different rows: run all of them on one kind of device, and write the cache again in another place",
        )
    rows = sum(count for count, _ in shards)
    return HookStatistics(
        name=name,
        d_in=shards[0][1].d_in,
        # fsum gives the nearest float64 whatever the order and number of shards.
        mean=[math.fsum(column) / rows for column in zip(*(sums.sum for _, sums in shards), strict=True)],
        mean_norm=math.fsum(sums.sum_norm for _, sums in shards) / rows,
        mean_squared_norm=math.fsum(sums.sum_squared_norm for _, sums in shards) / rows,
        calibration_median_norm=medians.pop(),
    )
