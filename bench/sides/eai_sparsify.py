"""eai-sparsify: the step of its `Trainer`, from the methods of its `SparseCoder` that it calls."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from torch import Tensor

from bench.sides.setting import Setting, TrainedSae


class Sparsify:
    """See `Side`. Speed is measured with its Adam, as all sides have; quality with its default, signum."""

    coefficient = 0.0

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        torch.manual_seed(setting.seed)
        config = SparseCoderConfig(num_latents=setting.d_sae, k=setting.k)
        self._sae = SparseCoder(setting.d_in, config, dtype=torch.float32)
        self._optimizer: Any
        if setting.quality:
            self._optimizer = ScheduleFreeWrapper(
                SignSGD(self._sae.parameters(), lr=setting.learning_rate), momentum=0.95
            )
            self._optimizer.train()
        else:
            self._optimizer = torch.optim.Adam(self._sae.parameters(), lr=setting.learning_rate)
        self._tokens_since_fired = torch.zeros(setting.d_sae, dtype=torch.long)

    def set_coefficient(self, value: float) -> None:
        pass

    def load(self, start: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self._sae.encoder.weight.copy_(start["W_enc"].T)
            self._sae.encoder.bias.copy_(start["b_enc"])
            self._sae.W_dec.copy_(start["W_dec"])
            self._sae.b_dec.copy_(start["b_dec"])

    def begin(self, first: Callable[[int], Tensor]) -> None:
        if self._setting.quality:
            self._sae.b_dec.data = first(self._setting.batch).mean(0)

    def step(self, x: Tensor) -> None:
        self._sae.set_decoder_norm_to_unit_norm()
        out = self._sae(x=x, y=x, dead_mask=None)
        fired = torch.zeros_like(self._tokens_since_fired, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        self._sae.remove_gradient_parallel_to_decoder_directions()
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            self._tokens_since_fired += x.shape[0]
            self._tokens_since_fired[fired] = 0

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        out = self._sae(x=x, y=x, dead_mask=None)
        # Its loss is relative to the batch's variance.
        loss = out.fvu * (x - x.mean(0)).pow(2).sum() / x.shape[0]
        loss.backward()
        gradients = {
            "loss": loss.detach(),
            "W_enc": self._sae.encoder.weight.grad.T,
            "b_enc": self._sae.encoder.bias.grad,
            "W_dec": self._sae.W_dec.grad,
            "b_dec": self._sae.b_dec.grad,
        }
        self._optimizer.zero_grad()
        return gradients

    def trained(self) -> TrainedSae:
        if self._setting.quality:
            self._optimizer.eval()
        tensors = {
            "W_enc": self._sae.encoder.weight.detach().T,
            "b_enc": self._sae.encoder.bias.detach(),
            "W_dec": self._sae.W_dec.detach(),
            "b_dec": self._sae.b_dec.detach(),
        }
        return TrainedSae(tensors, "topk", subtracts_b_dec=True)
