"""Matryoshka: the prefixes, and their losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_job.saes.matryoshka import matryoshka_widths
from sae_job.saes.trainable import StepInput
from sae_operator.api.sae import Architecture
from tests.unit.saes.conftest import BATCHTOPK, D_IN, D_SAE, MATRYOSHKA, batch, trainable


def widths(given: list[int] | None, d_sae: int) -> tuple[int, ...]:
    fields = {} if given is None else {"widths": given}
    return matryoshka_widths(Architecture.model_validate({"type": "matryoshka_batchtopk", "k": 1, **fields}), d_sae)


def test_the_default_prefixes_are_halves_of_halves() -> None:
    assert widths(None, 4608) == (288, 576, 1152, 2304, 4608)
    assert widths(None, 6) == (1, 3, 6)
    assert widths(None, 1) == (1,)


def test_all_latents_are_the_last_prefix_whether_or_not_it_is_given() -> None:
    assert widths([4, 8], 16) == (4, 8, 16)
    assert widths([4, 16], 16) == (4, 16)


@pytest.mark.parametrize(("given", "message"), [([8, 4], "ascend"), ([4, 4], "ascend"), ([4, 17], "above dSae, 16")])
def test_prefixes_that_do_not_nest_are_refused(given: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        widths(given, 16)


def test_the_loss_is_the_sum_of_the_prefixes_errors() -> None:
    # Two latents that reconstruct one half of (3, 4) each: the first prefix leaves 4^2, both leave nothing.
    sae = trainable(
        {"type": "matryoshka_batchtopk", "k": 2, "widths": [1], "auxKCoefficient": 0},
        dSae=2,
        normalizeDecoder=False,
    )
    with torch.no_grad():
        for parameter in sae.parameters_by_name.values():
            parameter.zero_()
        sae.W_enc_T[0, 0] = sae.W_enc_T[1, 1] = 1.0
        sae.W_dec[0, 0] = sae.W_dec[1, 1] = 1.0
    x = torch.zeros(2, D_IN)
    x[:, 0], x[:, 1] = 3.0, 4.0
    statistics = sae.step_gradients(StepInput(x, x, 0, None))
    assert {name: float(loss) for name, loss in statistics.losses.items()} == {
        "mse_loss": 0.0,
        "inner_mse_loss_1": 16.0,
    }
    assert float(statistics.loss) == 16.0
    # The bias stands in both prefixes, and only the first one's error, -4 at the second output, moves it; what
    # centring sends back is the second latent's, which has no error.
    assert sae.b_dec.grad is not None
    assert sae.b_dec.grad[:2].tolist() == [0.0, -8.0]


def test_with_one_prefix_it_is_batchtopk() -> None:
    nested, plain = trainable({**MATRYOSHKA, "widths": [D_SAE]}), trainable(BATCHTOPK)
    dead = torch.arange(D_SAE) % 4 == 0
    for sae in (nested, plain):
        sae.step_gradients(StepInput(batch(), batch(), 0, dead))
    for name, parameter in plain.parameters_by_name.items():
        other = nested.parameters_by_name[name].grad
        assert parameter.grad is not None
        assert other is not None
        assert torch.allclose(parameter.grad, other, atol=1e-6), name


def test_later_latents_get_no_gradient_from_earlier_prefixes() -> None:
    """Of the last group the gradient is that of the whole reconstruction's error alone."""
    options: dict[str, Any] = {"applyBDecToInput": False}
    nested = trainable({**MATRYOSHKA, "auxKCoefficient": 0}, **options)
    plain = trainable({**BATCHTOPK, "auxKCoefficient": 0}, **options)
    for sae in (nested, plain):
        sae.step_gradients(StepInput(batch(), batch(), 0, None))
    for name in ("W_enc_T", "b_enc", "W_dec"):
        before, after = plain.parameters_by_name[name].grad, nested.parameters_by_name[name].grad
        assert before is not None
        assert after is not None
        assert torch.allclose(before[24:], after[24:], atol=1e-6), name
        assert not torch.allclose(before[:24], after[:24], atol=1e-3), name
