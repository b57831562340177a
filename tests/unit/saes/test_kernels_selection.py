"""Selection by a bfloat16 product: the same latents as in float32, with float32 values."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from sae_job.saes.kernels.selection import candidates_of, pre_activations, select_top_k
from sae_job.saes.kernels.sparse import top_k
from sae_job.saes.step_memory import StepMemory

BATCH, D_IN, D_SAE, K = 2048, 128, 1024, 32


class Encoder(NamedTuple):
    x: torch.Tensor
    W_enc_T: torch.Tensor
    b_enc: torch.Tensor

    @property
    def exact(self) -> torch.Tensor:
        return (self.x.double() @ self.W_enc_T.double().T + self.b_enc).float()


def random_encoder() -> Encoder:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(D_SAE, D_IN, generator=generator) / D_IN**0.5
    return Encoder(torch.randn(BATCH, D_IN, generator=generator), weight, 0.1 * torch.randn(D_SAE, generator=generator))


def structured_encoder() -> Encoder:
    """Rows that are sums of few of the encoder's directions, a few dimensions with large values, and a large bias: as
    a trained SAE on a language model's activations has them."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator), dim=1)
    places = torch.randint(0, D_SAE, (BATCH, 20), generator=generator)
    strengths = torch.rand(BATCH, 20, generator=generator).log().neg() * 3
    x = torch.einsum("bk,bkd->bd", strengths, weight[places]) + 0.1 * torch.randn(BATCH, D_IN, generator=generator)
    x[:, :3] *= 20
    return Encoder(x, weight, torch.full((D_SAE,), -2.0) + 0.3 * torch.randn(D_SAE, generator=generator))


def selected(
    encoder: Encoder, *, rounded: bool = True, memory: StepMemory | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return select_top_k(pre_activations(*encoder, memory or StepMemory(), rounded=rounded), *encoder, K)


ENCODERS = {"random": random_encoder(), "structured": structured_encoder()}


@pytest.fixture(params=sorted(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return ENCODERS[request.param]


def test_the_support_is_that_of_float32_on_999_rows_in_1000(encoder: Encoder) -> None:
    _, found = selected(encoder)
    expected = encoder.exact.topk(K, dim=1).indices
    same = (found.sort(dim=1).values == expected.sort(dim=1).values).all(dim=1)
    assert float(same.float().mean()) >= 0.999


def test_without_the_margin_the_support_would_differ(encoder: Encoder) -> None:
    """So that the test above says something about the margin."""
    x, weight, bias = (tensor.bfloat16() for tensor in encoder)
    rounded = torch.addmm(bias, x, weight.T).topk(K, dim=1).indices
    expected = encoder.exact.topk(K, dim=1).indices
    same = (rounded.sort(dim=1).values == expected.sort(dim=1).values).all(dim=1)
    assert float(same.float().mean()) < 0.9


def test_the_values_are_float32_sums(encoder: Encoder) -> None:
    values, indices = selected(encoder)
    assert values.dtype == torch.float32
    expected = encoder.exact.gather(1, indices)
    # 128 products of one magnitude, rounded to 24 bits each.
    assert float((values - expected).abs().max() / encoder.exact.abs().max()) < 128 * 2**-24


def test_the_selection_among_float32_is_exact(encoder: Encoder) -> None:
    values, indices = selected(encoder, rounded=False)
    pre = torch.addmm(encoder.b_enc, encoder.x, encoder.W_enc_T.T)
    expected, places = top_k(pre, K)
    assert torch.equal(values, expected)
    assert torch.equal(indices, places)


def test_memory_serves_batches_of_another_size() -> None:
    encoder, memory = ENCODERS["random"], StepMemory()
    whole = selected(encoder, memory=memory)
    part = selected(encoder._replace(x=encoder.x[:100]), memory=memory)
    assert torch.equal(part[0].sort().values, whole[0][:100].sort().values)


@pytest.mark.parametrize(("k", "d_sae", "expected"), [(1, 4096, 9), (32, 4608, 48), (64, 65536, 96), (32, 40, 40)])
def test_number_of_candidates(k: int, d_sae: int, expected: int) -> None:
    assert candidates_of(k, d_sae) == expected
