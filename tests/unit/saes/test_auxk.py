"""The loss that revives dead latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_job.saes.auxk import AuxK, auxiliary_gradients, total_variances
from sae_job.saes.trainable import ONE_PROCESS, StepInput
from sae_operator.api.sae import Architecture
from tests.unit.saes.conftest import BATCHTOPK, D_IN, D_SAE, MATRYOSHKA, TOPK, batch, trainable

DEAD = torch.arange(D_SAE) % 4 == 0
NAME = "auxiliary_reconstruction_loss"


def asked(**settings: Any) -> AuxK | None:
    return AuxK.of(Architecture.model_validate({"type": "topk", "k": 1, **settings}), d_in=10, d_sae=30)


def test_the_papers_form_is_the_default() -> None:
    assert asked() == AuxK("paper", 5, 1 / 32)
    assert asked(auxKForm="saelens") == AuxK("saelens", 15, 1.0)
    assert asked(auxK=7, auxKCoefficient=0.5) == AuxK("paper", 7, 0.5)
    assert asked(auxKCoefficient=0) is None


def test_the_form_of_saelens_on_numbers_worked_by_hand() -> None:
    # Latents 1 and 3 of 4 are dead, all decoder entries are 2. The rows' predictions, at each of the three outputs:
    # 2 (-2 - 4) = -12 and 2 (0 - 4) = -8; off the residuals (1, -1, 0) by squares of 13 + 11 + 12 and 9 + 7 + 8.
    dead = torch.tensor([1, 3])
    pre = torch.tensor([[1.0, -2.0, 3.0, -4.0], [1.0, 0.0, -3.0, -4.0]])
    found = auxiliary_gradients(
        AuxK("saelens", 2, 1.0),
        dead=dead,
        pre=pre[:, dead],
        target=torch.zeros(2, 3),
        error=torch.tensor([[-1.0, 1.0, 0.0]]).expand(2, 3),
        centred=torch.ones(2, 5),
        W_dec=torch.full((4, 3), 2.0),
        ranks=ONE_PROCESS,
    )
    assert float(found.loss) == pytest.approx((13**2 + 11**2 + 12**2 + 9**2 + 7**2 + 8**2) / 2) == 314.0


def test_the_papers_form_on_numbers_worked_by_hand() -> None:
    # One dead latent predicts (2, 0) and nothing of residuals (1, 1) and (-1, -1), whose variance is 2; that of the
    # target is 8.
    found = auxiliary_gradients(
        AuxK("paper", 1, 0.5),
        dead=torch.tensor([0]),
        pre=torch.tensor([[2.0], [-5.0]]),
        target=torch.tensor([[2.0, 2.0], [-2.0, -2.0]]),
        error=-torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
        centred=torch.ones(2, 3),
        W_dec=torch.tensor([[1.0, 0.0], [9.0, 9.0]]),
        ranks=ONE_PROCESS,
    )
    # 0.5 x (8 / 2) x the mean of (2 - 1)^2 + (0 - 1)^2 and 1^2 + 1^2.
    assert float(found.loss) == pytest.approx(0.5 * 4 * 2)


@pytest.mark.parametrize(("k", "chosen"), [(1, [[5], [1]]), (2, [[3, 5], [1, 5]]), (3, [[1, 3, 5], [1, 3, 5]])])
def test_the_largest_dead_pre_activations_predict(k: int, chosen: list[list[int]]) -> None:
    dead = torch.tensor([1, 3, 5])
    pre = torch.tensor([[9.0, -3.0, 9.0, 1.0, 9.0, 4.0], [9.0, -2.0, 9.0, -7.0, 9.0, -4.0]])
    found = auxiliary_gradients(
        AuxK("saelens", k, 1.0),
        dead=dead,
        pre=pre[:, dead],
        target=torch.zeros(2, 6),
        error=torch.zeros(2, 6),
        centred=torch.eye(2),
        W_dec=torch.eye(6),
        ranks=ONE_PROCESS,
    )
    expected = torch.zeros(2, 6)
    for row, latents in enumerate(chosen):
        expected[row, latents] = pre[row, latents]
    # With unit vectors for inputs and no error, the encoder's gradient of a row is 2 x activation / rows.
    used = torch.zeros(2, 6).index_copy(1, dead, found.W_enc_T.T)
    assert torch.equal(used, expected)
    assert float(found.loss) == pytest.approx(float(expected.square().sum()) / 2)


@pytest.mark.parametrize("n_dead", [1, 4, 8, 20])
def test_few_dead_latents_weigh_less_in_the_form_of_saelens(n_dead: int) -> None:
    found = auxiliary_gradients(
        AuxK("saelens", 8, 0.5),
        dead=torch.arange(n_dead),
        pre=torch.zeros(3, n_dead),
        target=torch.zeros(3, 4),
        error=torch.ones(3, 4),
        centred=torch.ones(3, 2),
        W_dec=torch.ones(20, 4),
        ranks=ONE_PROCESS,
    )
    assert float(found.loss) == pytest.approx(0.5 * min(n_dead / 8, 1) * 4)


def test_total_variances_are_means_of_squared_distances_from_the_mean() -> None:
    rows = torch.tensor([[0.0, 0.0], [4.0, 2.0]])
    first, second = total_variances(rows + 1000, rows / 2, ONE_PROCESS)
    assert float(first) == pytest.approx(5.0)
    assert float(second) == pytest.approx(1.25)


@pytest.mark.parametrize("architecture", [TOPK, BATCHTOPK, MATRYOSHKA])
def test_no_dead_latents_make_no_loss(architecture: dict[str, Any]) -> None:
    for dead in (None, torch.zeros(D_SAE, dtype=torch.bool)):
        sae, off = trainable(architecture), trainable({**architecture, "auxKCoefficient": 0})
        statistics = sae.step_gradients(StepInput(batch(), batch(), 0, dead))
        assert float(statistics.losses[NAME]) == 0.0
        without = off.step_gradients(StepInput(batch(), batch(), 0, dead))
        assert torch.equal(statistics.loss, without.loss)
        assert NAME not in without.losses


@pytest.mark.parametrize("form", ["paper", "saelens"])
def test_the_loss_touches_neither_live_latents_nor_what_they_reconstruct(form: str) -> None:
    options: dict[str, Any] = {"applyBDecToInput": False}
    plain = trainable({**TOPK, "auxKCoefficient": 0}, **options)
    revived = trainable({**TOPK, "auxKCoefficient": 10.0, "auxK": 3, "auxKForm": form}, **options)
    for sae in (plain, revived):
        sae.step_gradients(StepInput(batch(), batch(), 0, DEAD))
    for name, before in plain.parameters_by_name.items():
        after = revived.parameters_by_name[name]
        assert before.grad is not None
        assert after.grad is not None
        if name == "b_dec":
            assert torch.equal(before.grad, after.grad)
        else:
            assert torch.equal(before.grad[~DEAD], after.grad[~DEAD])
            assert not torch.equal(before.grad[DEAD], after.grad[DEAD])


def test_dead_latents_come_back() -> None:
    # Biases so low that these latents never fire by themselves, and AuxK, whose ReLU they must pass, that lifts them.
    sae = trainable({**TOPK, "auxK": D_IN, "auxKCoefficient": 1.0, "auxKForm": "saelens"})
    sae.parameters_by_name["b_enc"].data[DEAD] = -3.0
    optimizer = torch.optim.Adam(sae.parameters_by_name.values(), lr=0.03)
    fired = torch.zeros(D_SAE, dtype=torch.int64)
    for step in range(60):
        x = batch(seed=step, rows=64)
        counts = sae.step_gradients(StepInput(x, x, step, DEAD & (fired == 0))).fire_counts
        fired += counts
        sae.project_gradients()
        optimizer.step()
        sae.after_optimizer_step()
    assert float((fired[DEAD] > 0).float().mean()) > 0.5
