"""Which latents are dead, and how often each one fires."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from sae_job.training.observer import SparsityWindow

# Added to a frequency before its logarithm, so that a latent that never fired has a finite one (-10).
FREQUENCY_FLOOR = 1e-10


class DeadLatents:
    """Counts, per latent, the tokens since it last fired.

    Dead is a latent that has not fired for `dead_after_tokens` tokens; in a run that is shorter, one that has never
    fired yet. So nothing is dead before the first batch.

    Args:
        d_sae: number of latents.
        dead_after_tokens: tokens without firing after which a latent counts as dead.
        total_tokens: tokens of the whole run.
    """

    def __init__(self, d_sae: int, *, dead_after_tokens: int, total_tokens: int, device: torch.device | str) -> None:
        self.tokens_since_fired: Int64[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.fired_ever: Bool[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.bool, device=device)
        self._dead_after_tokens = dead_after_tokens
        self._short = total_tokens < dead_after_tokens
        self._tokens = 0

    @property
    def may_be_any(self) -> bool:
        """Whether a latent can be dead by now, told without asking the device: early in a run none can be."""
        return self._tokens > 0 if self._short else self._tokens >= self._dead_after_tokens

    def mask(self) -> Bool[Tensor, " d_sae"]:
        """The dead latents now: what a step uses is the state before its own batch."""
        if self._short:
            return ~self.fired_ever if self._tokens else torch.zeros_like(self.fired_ever)
        return self.tokens_since_fired >= self._dead_after_tokens

    def update(self, fired: Bool[Tensor, " d_sae"], rows: int) -> None:
        """Count a batch of `rows` tokens, in which the latents `fired` fired at least once."""
        self.tokens_since_fired.add_(rows).masked_fill_(fired, 0)
        self.fired_ever.logical_or_(fired)
        self._tokens += rows

    def state(self) -> dict[str, Tensor]:
        return {
            "tokens_since_fired": self.tokens_since_fired,
            "fired_ever": self.fired_ever,
            "tokens_counted": torch.tensor(self._tokens),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.fired_ever.copy_(state["fired_ever"])
        self._tokens = int(state["tokens_counted"])


class FiringFrequency:
    """Running estimate of how often each latent fires, over the last one to two windows.

    Counts are of rows that were really seen. The last complete window is kept beside the current one, so that an
    estimate never rests on the few rows after a reset.

    Args:
        d_sae: number of latents.
        window_tokens: rows of a window; it is closed after the batch that fills it.
    """

    def __init__(self, d_sae: int, *, window_tokens: int, device: torch.device | str) -> None:
        # float64 counts are exact far beyond any window, and add floating and integer counts alike.
        self._counts = torch.zeros(2, d_sae, dtype=torch.float64, device=device)
        self._rows = [0, 0]
        self._window_tokens = window_tokens
        self._closed = False

    def update(self, fire_counts: Tensor, rows: int) -> None:
        """Count a batch: `fire_counts` [d_sae] is in how many of its `rows` rows each latent fired."""
        self._counts[1] += fire_counts
        self._rows[1] += rows
        self._closed = self._rows[1] >= self._window_tokens
        if self._closed:
            self._counts[0] = self._counts[1]
            self._counts[1].zero_()
            self._rows = [self._rows[1], 0]

    def closed_window(self) -> SparsityWindow | None:
        """The window that the last batch filled; None where it filled none."""
        if not self._closed:
            return None
        return SparsityWindow(_logarithms(self._counts[0] / self._rows[0]), self._rows[0])

    def estimate(self) -> SparsityWindow | None:
        """The rows that are known, of the last complete window and the current one; None before the first."""
        rows = sum(self._rows)
        return None if rows == 0 else SparsityWindow(_logarithms(self._counts.sum(dim=0) / rows), rows)

    def log10(self) -> Float32[Tensor, " d_sae"] | None:
        """log10 of each latent's frequency (per row), on the CPU; None before the first row."""
        estimate = self.estimate()
        return None if estimate is None else estimate.log10_frequencies

    def state(self) -> dict[str, Tensor]:
        return {"window_counts": self._counts, "window_rows": torch.tensor(self._rows)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._counts.copy_(state["window_counts"])
        self._rows = [int(rows) for rows in state["window_rows"]]


def _logarithms(frequencies: Tensor) -> Float32[Tensor, " d_sae"]:
    return torch.log10(frequencies + FREQUENCY_FLOOR).to(torch.float32).cpu()
