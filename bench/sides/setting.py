"""What a side is asked to train, and what it gives. PyTorch and NumPy alone: every environment imports this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# Architectures whose sparsity follows from a penalty.
PENALIZED = ("standard", "gated", "jumprelu")
# Of a training that has an end, shares of its steps: what the libraries' own instructions recommend for long runs.
WARM_UP_SHARE, DECAY_SHARE = 0.05, 0.2


@dataclass(frozen=True)
class Setting:
    """One training.

    Attributes:
        architecture: as the product calls it.
        k: active latents per row, on average where the architecture has no other; the target of penalised ones.
        batch: rows per step.
        steps: steps of the whole training; a constant rate without warm-up when None.
        learning_rate: peak.
        coefficient: weight of the sparsity penalty.
        seed: of the initial weights.
        quality: whether activations are normalised, and everything else is set, as the library recommends; off for
            measurements of speed, where all sides see the same numbers.
    """

    architecture: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int | None
    learning_rate: float
    coefficient: float
    seed: int
    quality: bool

    @property
    def total_steps(self) -> int:
        return self.steps or 10**6

    @property
    def warm_up_steps(self) -> int:
        return 0 if self.steps is None else int(self.steps * WARM_UP_SHARE)

    @property
    def decay_steps(self) -> int:
        return 0 if self.steps is None else int(self.steps * DECAY_SHARE)


@dataclass(frozen=True)
class TrainedSae:
    """What a side has trained, on raw activations.

    Attributes:
        tensors: `W_enc` [d_in, d_sae], `b_enc` [d_sae], `W_dec` [d_sae, d_in], `b_dec` [d_in], and for jumprelu
            `threshold` [d_sae].
        activation: `topk`, `relu` or `jumprelu`.
        subtracts_b_dec: whether `b_dec` is subtracted before encoding.
    """

    tensors: dict[str, Tensor]
    activation: str
    subtracts_b_dec: bool


class Side(Protocol):
    """A library's training."""

    @property
    def coefficient(self) -> float:
        """Weight of the sparsity penalty in the steps to come."""
        ...

    def set_coefficient(self, value: float) -> None:
        """Move it; does nothing where the library cannot."""
        ...

    def load(self, start: dict[str, Tensor]) -> None:
        """Take over weights, before or after `begin`: those of `TrainedSae.tensors`, or for gated `b_gate`, `r_mag`
        and `b_mag`, not `b_enc`."""
        ...

    def begin(self, first: Callable[[int], Tensor]) -> None:
        """Initialise what depends on activations; `first(n)` gives the first n raw rows of the training."""
        ...

    def step(self, x: Tensor) -> float | None:
        """One step on raw rows [batch, d_in]: gradients, constraint, optimiser, and the counters that the library
        keeps. Returns the mean number of active latents for a penalised architecture in a quality run."""
        ...

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        """`loss` of the first step on these rows, and the gradients by the names of `TrainedSae.tensors`, before
        anything is done to them."""
        ...

    def trained(self) -> TrainedSae: ...


class SideClass(Protocol):
    def __call__(self, setting: Setting, /) -> Side: ...


def matryoshka_widths(d_sae: int) -> list[int]:
    """Sizes of the nested prefixes: a 16th, an 8th, a quarter, a half, and all."""
    return [d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]
