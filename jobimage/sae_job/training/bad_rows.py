"""Which rows of a batch are not finite, and where they are stored: looked for only once a loss has told that some are.

Reading is a pure function of its place, so that the batch of a step can be read again long after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.saes.trainable import Ranks

# So many rows are named: enough to find them all.
MOST_NAMED = 5


class LocatedStream(Protocol):
    """Batches that can be read again, of rows whose places are known."""

    def next_batch(self) -> dict[str, Tensor]: ...

    def next_places(self) -> list[tuple[int, int]]:
        """Shard and row in it of every row of the next batch; reading does not move on."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


def check_rows(
    stream: LocatedStream, place: dict[str, Any], hooks: Sequence[str], *, step: int, steps: int, ranks: Ranks
) -> None:
    """Read the batch of a step again, and blame its rows where they are not finite.

    All ranks look at their own rows, and all raise what the first one with such rows found; the stream goes on from
    where it stood.

    Args:
        place: state of the stream before the step.
        hooks: hooks that are trained on.
        step: number of the step, from 0, for the message.
        steps: of the training.

    Raises:
        InvalidInput: rows are not finite; the message names hook, shard and rows.
    """
    now = stream.state()
    stream.restore(place)
    places = stream.next_places()
    batch = stream.next_batch()
    stream.restore(now)
    found = torch.full((1, 2 + 2 * MOST_NAMED), -1, dtype=torch.int64)
    for number, hook in enumerate(hooks):
        bad = (~torch.isfinite(batch[hook].to(torch.float32)).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            named = [value for row in bad[:MOST_NAMED] for value in places[row]]
            found[0, : 2 + len(named)] = torch.tensor([number, len(bad), *named])
            break
    told = [row for row in ranks.gather(found).tolist() if row[0] >= 0]
    if not told:
        return
    number, count, *pairs = told[0]
    named = [(shard, row) for shard, row in zip(pairs[::2], pairs[1::2], strict=True) if shard >= 0]
    rows = ", ".join(f"row {row} of shard {shard}" for shard, row in named)
    more = f" and {count - len(named)} more" if count > len(named) else ""
    raise _not_finite(f"activations of {hooks[number]} hold NaN or infinity in step {step} of {steps}: {rows}{more}")


def check_held_out(rows: Tensor, hook: str) -> None:
    """Blame held-out rows where they are not finite.

    Args:
        rows: of the hook, [rows, d_in].

    Raises:
        InvalidInput: some are not; the message tells how many, and the first.
    """
    bad = (~torch.isfinite(rows.to(torch.float32)).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise _not_finite(
            f"of the held-out activations of {hook} {len(bad)} rows hold NaN or infinity, first row {bad[0]}"
        )


def _not_finite(what: str) -> InvalidInput:
    return InvalidInput(
        "ActivationsNotFinite",
        f"{what}. The SAEs are as in the last checkpoint. Build the cache again in a format that holds the model's "
        "values (float16 ends at 65504), or leave out the text that breaks the model",
        field="spec.activations",
    )
