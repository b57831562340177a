"""Exact statistics of stored activations: sums in float64, per shard, merged in the order of the shards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from sae_job.activations.codecs import CODECS, Codec
from sae_job.activations.manifest import HookStatistics, HookSums
from sae_job.errors import InvalidInput

# Rows converted to float64 at a time: what stays in the cache of a core.
CHUNK_ROWS = 512


def sums_of(
    rows: torch.Tensor,
    hook: str,
    *,
    keep: torch.Tensor | None = None,
    calibration_median_norm: float | None = None,
) -> HookSums:
    """Sums over the rows of one shard, of the values as stored in a plain format.

    Args:
        rows: [rows, d_in] in storage dtype, on the CPU.
        hook: its key, for messages.
        keep: rows that count, [rows]; all when None.
        calibration_median_norm: recorded with the sums.

    Raises:
        InvalidInput: a value is infinite or not a number.
    """
    codec = CODECS[str(rows.dtype).removeprefix("torch.")]
    return sums_of_stored({"": rows}, {}, codec, hook, keep=keep, calibration_median_norm=calibration_median_norm)


def sums_of_stored(
    rows: Mapping[str, torch.Tensor],
    constants: Mapping[str, torch.Tensor],
    codec: Codec,
    hook: str,
    *,
    keep: torch.Tensor | None = None,
    calibration_median_norm: float | None = None,
) -> HookSums:
    """As `sums_of`, of rows in any format.

    Args:
        rows: row tensors of the codec by suffix, on the CPU.
        constants: its constants by suffix.
        codec: number format.
        hook: key of the hook, for messages.
        keep: rows that count, [rows]; all when None.
        calibration_median_norm: recorded with the sums.
    """
    count, width = rows[""].shape
    total = torch.zeros(width, dtype=torch.float64)
    chunk = torch.empty((CHUNK_ROWS, width), dtype=torch.float64)
    norms = torch.zeros((), dtype=torch.float64)
    squared = torch.zeros((), dtype=torch.float64)
    kept = 0
    for start in range(0, count, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, count)
        decoded = codec.decode({suffix: values[start:stop] for suffix, values in rows.items()}, constants)
        exact = chunk[: stop - start].copy_(decoded)
        if keep is not None and not bool(keep[start:stop].all()):
            exact = exact[keep[start:stop].bool()]
        total += exact.sum(dim=0)
        norm = torch.linalg.vector_norm(exact, dim=1)
        norms += norm.sum()
        squared += torch.dot(norm, norm)
        kept += len(exact)
    if not bool(torch.isfinite(squared)):
        raise not_finite(hook, codec.name)
    return HookSums(
        d_in=width,
        rows=kept,
        sum=total.tolist(),
        sum_norm=float(norms),
        sum_squared_norm=float(squared),
        calibration_median_norm=calibration_median_norm,
    )


def not_finite(hook: str, dtype: str) -> InvalidInput:
    """Activations that nothing can be trained on."""
    if dtype == "float16":
        return InvalidInput(
            "NotFinite",
            f"activations of {hook} are not finite in float16: use bfloat16 for storage.dtype and model.dtype, or "
            "another layer",
            field="spec.storage.dtype",
        )
    return InvalidInput(
        "NotFinite",
        f"activations of {hook} are infinite or not numbers: use another model.dtype (bfloat16 or float32), or another "
        "layer",
        field="spec.model.dtype",
    )


def merge_sums(name: str, sums: Sequence[HookSums], *, group: int = 0) -> HookStatistics:
    """Statistics of one hook over all rows that are kept.

    Args:
        name: key of the hook.
        sums: of each shard.
        group: number of the hook's group.

    Raises:
        InvalidInput: the shards were filtered by different norms, so they are not of one cache, or no row is kept.
    """
    medians = {shard.calibration_median_norm for shard in sums}
    if len(medians) > 1:
        raise InvalidInput(
            "CalibrationDiffers",
            f"shards disagree on the median norm of {name} ({sorted(medians, key=str)}), so different workers dropped "
            "different rows: run all of them on one kind of device, and write the cache again in another place",
        )
    rows = sum(shard.rows for shard in sums)
    if rows == 0:
        raise InvalidInput(
            "TooFewRows",
            f"the norm filter leaves no row of {name}: raise maxNormRatio, or set it to 0",
            field="spec.sampling.maxNormRatio",
        )
    return HookStatistics(
        name=name,
        d_in=sums[0].d_in,
        rows=rows,
        # fsum gives the nearest float64 whatever the order and number of shards.
        mean=[math.fsum(column) / rows for column in zip(*(shard.sum for shard in sums), strict=True)],
        mean_norm=math.fsum(shard.sum_norm for shard in sums) / rows,
        mean_squared_norm=math.fsum(shard.sum_squared_norm for shard in sums) / rows,
        calibration_median_norm=medians.pop(),
        group=group,
    )
