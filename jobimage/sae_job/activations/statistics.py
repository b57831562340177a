"""Exact statistics of stored activations: sums in float64, per shard, merged in the order of the shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
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


class HookTotals:
    """Exact sums of one hook over shards that are added one by one. Memory does not grow with their number.

    Args:
        name: key of the hook.
        group: number of the hook's group.
    """

    def __init__(self, name: str, *, group: int = 0) -> None:
        self._name = name
        self._group = group
        self._medians: set[float | None] = set()
        # Each column adds up to the exact total of one value: those of `sum`, `sum_norm` and `sum_squared_norm`.
        self._parts: np.ndarray | None = None
        self.shards = 0
        self.rows = 0

    def add(self, sums: HookSums) -> None:
        """Count one more shard."""
        values = np.array([*sums.sum, sums.sum_norm, sums.sum_squared_norm], dtype=np.float64)
        self._parts = _sum_exactly(np.zeros((0, len(values))) if self._parts is None else self._parts, values)
        self._medians.add(sums.calibration_median_norm)
        self.shards += 1
        self.rows += sums.rows

    def statistics(self) -> HookStatistics:
        """Statistics over all rows that are kept; the same whatever the order of the shards.

        Raises:
            InvalidInput: the shards were filtered by different norms, so they are not of one cache, or no row is kept.
        """
        if len(self._medians) > 1:
            raise InvalidInput(
                "CalibrationDiffers",
                f"shards disagree on the median norm of {self._name} ({sorted(self._medians, key=str)}), so different "
                "workers dropped different rows: run all of them on one kind of device, and write the cache again in "
                "another place",
            )
        if self.rows == 0 or self._parts is None:
            raise InvalidInput(
                "TooFewRows",
                f"the norm filter leaves no row of {self._name}: raise maxNormRatio, or set it to 0",
                field="spec.sampling.maxNormRatio",
            )
        # fsum gives the nearest float64 to the exact total.
        *mean, mean_norm, mean_squared_norm = [math.fsum(column) / self.rows for column in self._parts.T.tolist()]
        return HookStatistics(
            name=self._name,
            d_in=len(mean),
            rows=self.rows,
            mean=mean,
            mean_norm=mean_norm,
            mean_squared_norm=mean_squared_norm,
            calibration_median_norm=next(iter(self._medians)),
            group=self._group,
        )


def merge_sums(name: str, sums: Iterable[HookSums], *, group: int = 0) -> HookStatistics:
    """Statistics of one hook over all rows that are kept.

    Args:
        name: key of the hook.
        sums: of each shard.
        group: number of the hook's group.

    Raises:
        InvalidInput: as `HookTotals.statistics`.
    """
    totals = HookTotals(name, group=group)
    for shard in sums:
        totals.add(shard)
    return totals.statistics()


def _sum_exactly(parts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Add a value to each column of [parts, columns], whose few floats add up to the exact sum of the values so far
    (expansions: Shewchuk 1997, as `math.fsum` has them)."""
    longer = np.concatenate([parts, values[None]])
    # What a float rounds off goes to the one before; then each takes what it can hold of that, so that they stay few.
    for place in range(len(longer) - 1):
        longer[place + 1], longer[place] = _two_sum(longer[place + 1], longer[place])
    for place in reversed(range(len(longer) - 1)):
        longer[place + 1], longer[place] = _two_sum(longer[place + 1], longer[place])
    # Zeros go last, where rows of nothing else are dropped.
    longer = np.take_along_axis(longer, np.argsort(longer == 0, axis=0, kind="stable"), axis=0)
    return longer[: int((longer != 0).sum(axis=0).max(initial=0))]


def _two_sum(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Their sum, rounded, and what that is short of (Knuth)."""
    total = left + right
    taken = total - left
    return total, (left - (total - taken)) + (right - taken)
