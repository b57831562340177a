"""The k largest pre-activations per row on average over a whole batch, exactly, by a bar that is found first.

A flat top-k of batch x d_sae entries costs as much as the encoder's product. Here the entries above a guess are listed,
in one pass; if there are enough of them, the bar is among these few.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from sae_job.saes.kernels.sparse import ActiveLatents, places_of
from sae_job.saes.trainable import ONE_PROCESS, Ranks

# A bar moves by a hundredth from batch to batch; below the last one by this factor lie a fourth more entries.
_BELOW_LAST_BAR = 0.97
# Without a last bar it is estimated on about so many rows, for so many times as many entries as are wanted: rows differ
# in how many entries they have above a bar.
_SAMPLE_ROWS = 256
_SAMPLE_EXCESS = 1.5
# Positive float32 numbers are in the order of their bits, which are counted by their upper and lower halves.
_HALF = 16


@dataclass(frozen=True)
class BatchSelection:
    """What is active in a batch.

    Attributes:
        active: this rank's active latents; all values are above zero but on a GPU, where zeros fill the number up.
        smallest: the smallest active pre-activation of all ranks; inf where nothing is active.
    """

    active: ActiveLatents
    smallest: Float32[Tensor, ""]


@torch.no_grad()
def batch_top_k(
    pre: Float[Tensor, "batch d_sae"], k: int, *, last: float = 0.0, ranks: Ranks = ONE_PROCESS
) -> BatchSelection:
    """The k x batch largest entries of all ranks' rows together, as far as they are above zero.

    Of entries that are equal to the smallest the first rows' and first latents' are taken, so that there are never
    more than k x batch.

    Args:
        pre: pre-activations; each rank has as many rows.
        k: active latents per row on average.
        last: the smallest active pre-activation of a batch like this one, the same on all ranks; 0 when unknown. It is
            a guess that saves time, and changes nothing else.
        ranks: the processes whose rows make the batch.
    """
    batch, d_sae = pre.shape
    count = min(k, d_sae) * batch
    if _has_fixed_size(pre, ranks):
        flat = pre.reshape(-1).topk(count, sorted=False).indices.sort().values
    else:
        flat = _candidates(pre, count * ranks.size, last, ranks)
    rows = flat.div(d_sae, rounding_mode="floor")
    values = pre.reshape(-1)[flat]
    return among(ActiveLatents.ragged(rows, flat - rows * d_sae, values, batch, d_sae), k, ranks=ranks)


@torch.no_grad()
def among(candidates: ActiveLatents, k: int, *, ranks: Ranks = ONE_PROCESS) -> BatchSelection:
    """Like `batch_top_k`, of entries among which the largest are known to be."""
    rows, latents, values = candidates.rows, candidates.latents, candidates.values.reshape(-1)
    count = min(k, candidates.d_sae) * candidates.batch
    if _has_fixed_size(values, ranks):
        chosen = values.topk(count, sorted=False).indices.sort().values if values.numel() > count else None
    else:
        chosen = _chosen(values, count * ranks.size, ranks)
    if chosen is not None:
        candidates = ActiveLatents.ragged(
            rows[chosen], latents[chosen], values[chosen], candidates.batch, candidates.d_sae
        )
    values = candidates.values.relu_()
    if _has_fixed_size(values, ranks):
        smallest = torch.where(values > 0, values, torch.inf).min()
    else:
        smallest = values.min() if values.numel() else values.new_full((), torch.inf)
        smallest = ranks.gather(smallest.view(1)).min()
    return BatchSelection(candidates, smallest.to(torch.float32))


def _has_fixed_size(values: Tensor, ranks: Ranks) -> bool:
    """Whether to select a fixed number of entries, so that nothing waits for a GPU to say how many there are."""
    return values.is_cuda and ranks.size == 1


def _candidates(pre: Float[Tensor, "batch d_sae"], count: int, last: float, ranks: Ranks) -> Int64[Tensor, " n"]:
    """Flat places, ascending, of entries above a bar below which none is among the `count` largest of all ranks."""
    places = torch.empty(0, dtype=torch.int64)
    for bar in _guesses(pre, count, last, ranks):
        places = places_of((pre > bar).view(-1))
        found = ranks.sum_(torch.tensor([places.numel()], device=pre.device))
        if bar == 0.0 or int(found) >= count:
            break
    return places


def _guesses(pre: Float[Tensor, "batch d_sae"], count: int, last: float, ranks: Ranks) -> Iterator[float]:
    """Bars to try, the last of which always serves. They are the same on all ranks."""
    if last > 0:
        yield last * _BELOW_LAST_BAR
    if ranks.size == 1:
        sample = pre[:: max(1, pre.shape[0] // _SAMPLE_ROWS)].reshape(-1)
        wanted = int(count * _SAMPLE_EXCESS * sample.numel() / pre.numel())
        if wanted < sample.numel():
            estimate = float(sample.kthvalue(sample.numel() - wanted).values)
            if estimate > 0:
                yield estimate
    yield 0.0


def _chosen(values: Float[Tensor, " n"], count: int, ranks: Ranks) -> Bool[Tensor, " n"] | None:
    """Which entries are positive and among the `count` largest of all ranks; None where all are."""
    positive = values > 0
    if ranks.size == 1:
        if values.numel() <= count:
            return None if bool(positive.all()) else positive
        bar = values.kthvalue(values.numel() - count + 1).values
    else:
        bar = _common_bar(values.clamp_min(0), count, ranks)
    bar = bar.clamp_min(0)
    above, equal = values > bar, (values == bar) & positive
    ties = ranks.gather(equal.sum().view(1))
    room = count - ranks.sum_(above.sum()) - ties[: ranks.index].sum()
    return above | (equal & (equal.cumsum(0) <= room))


def _common_bar(values: Float[Tensor, " n"], count: int, ranks: Ranks) -> Float[Tensor, ""]:
    """The `count`-th largest of all ranks' positive values; 0 where there are fewer.

    Ranks add up how many values they have by the upper half of their bits, then, of the half that the bar lies in, by
    the lower one: what they tell each other does not grow with the batch.
    """
    bits = values.to(torch.float32).view(torch.int32)
    upper, rest = _bucket(bits >> _HALF, None, count, 1 << (31 - _HALF), ranks)
    lower, _ = _bucket(bits & ((1 << _HALF) - 1), bits >> _HALF == upper, rest, 1 << _HALF, ranks)
    bar = ((upper << _HALF) | lower).to(torch.int32).view(torch.float32)
    return bar.to(values.dtype)


def _bucket(
    keys: Int32[Tensor, " n"],
    among: Bool[Tensor, " n"] | None,
    count: int | Int64[Tensor, ""],
    size: int,
    ranks: Ranks,
) -> tuple[Int64[Tensor, ""], Int64[Tensor, ""]]:
    """The key of the `count`-th largest of all ranks' keys, and how many of that key are among those; 0 where there are
    fewer.

    Args:
        keys: from 0 to `size` - 1.
        among: which keys count; all when None.
    """
    counts = torch.zeros(size, dtype=torch.int64, device=keys.device)
    ones = torch.ones_like(keys, dtype=torch.int64) if among is None else among.to(torch.int64)
    counts = ranks.sum_(counts.scatter_add_(0, keys.to(torch.int64), ones))
    at_least = counts.flip(0).cumsum(0).flip(0)
    key = ((at_least >= count).sum() - 1).clamp_min(0)
    return key, count - (at_least[key] - counts[key])
