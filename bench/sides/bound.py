"""What no step can do without: the encoder's product, and Adam on both weight matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.sides.setting import Setting, TrainedSae


class Bound:
    """See `Side`; it trains nothing."""

    coefficient = 0.0

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._optimizer: torch.optim.Adam

    def set_coefficient(self, value: float) -> None:
        pass

    def load(self, start: dict[str, Tensor]) -> None:
        self._weights = [tensor.clone().requires_grad_() for tensor in (start["W_enc"].T.contiguous(), start["W_dec"])]

    def begin(self, first: Callable[[int], Tensor]) -> None:
        for weight in self._weights:
            weight.grad = torch.full_like(weight, 1e-3)
        self._bias = torch.zeros(self._setting.d_sae)
        self._pre = torch.empty(self._setting.batch, self._setting.d_sae)
        self._optimizer = torch.optim.Adam(self._weights, lr=self._setting.learning_rate, fused=True)

    def step(self, x: Tensor) -> None:
        with torch.no_grad():
            torch.addmm(self._bias, x, self._weights[0].T, out=self._pre)
        self._optimizer.step()

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        return {}

    def trained(self) -> TrainedSae:
        raise TypeError("the bound is for timing alone: it holds no SAE")
