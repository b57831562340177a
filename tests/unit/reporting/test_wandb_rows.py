"""Names and values of what Weights & Biases shows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sae_job.reporting.wandb_rows import evaluation_row, step_row, weight_distributions, window_row


@dataclass(frozen=True)
class At:
    step: int = 5
    tokens: int = 160


def test_a_steps_row_has_the_names_of_saelens() -> None:
    figures = {
        "loss": 3.0,
        "mse_loss": 2.0,
        "l1_loss": 1.0,
        "ghost_grad_loss": 0.5,
        "coefficient": 0.25,
        "l0": 12.0,
        "explained_variance": 0.75,
        "explained_variance_std": 0.25,
        "learning_rate": 1e-3,
        "dead_features": 3,
        "mean_tokens_since_fired": 64.0,
        "kernel": "dense",
    }
    assert step_row(At(), figures) == {
        "losses/overall_loss": 3.0,
        "losses/mse_loss": 2.0,
        "losses/raw_l1_loss": 1.0,
        "losses/l1_loss": 4.0,
        "losses/ghost_grad_loss": 0.5,
        "metrics/l0": 12.0,
        "metrics/explained_variance": 0.75,
        "metrics/explained_variance_std": 0.25,
        "sparsity/dead_features": 3,
        "sparsity/mean_tokens_since_fired": 64.0,
        "sparsity/mean_passes_since_fired": 2.0,  # batches of 32
        "details/current_learning_rate": 1e-3,
        "details/current_l1_coefficient": 0.25,
        "details/n_training_tokens": 160,
        "details/kernel": "dense",
    }


@pytest.mark.parametrize("figures", [{"l1_loss": 0.0, "coefficient": 0.0}, {"l1_loss": 0.0}])
def test_a_penalty_without_weight_is_not_divided_by_it(figures: dict[str, float]) -> None:
    row = step_row(At(), figures)
    assert (row["losses/l1_loss"], row["losses/raw_l1_loss"]) == (0.0, 0.0)


def test_figures_on_held_out_rows_are_in_groups() -> None:
    row = evaluation_row(
        At(),
        {
            "explained_variance": 0.8,
            "explained_variance_std": 0.1,
            "mse": 2.0,
            "l2_ratio": 0.9,
            "relative_reconstruction_bias": None,
            "l0": 8.0,
            "dead_fraction": 0.5,
            "ce_loss_score": 0.97,
            "ce_loss_clean": 3.1,
            "kl_divergence_score": 0.96,
            "our_own": 1.0,
        },
    )
    assert row == {
        "details/n_training_tokens": 160,
        "reconstruction_quality": {"explained_variance": 0.8, "explained_variance_std": 0.1, "mse": 2.0},
        "metrics/explained_variance_std": 0.1,
        "shrinkage": {"l2_ratio": 0.9},
        "sparsity": {"l0": 8.0, "dead_fraction": 0.5},
        "model_performance_preservation": {"ce_loss_score": 0.97, "ce_loss_without_sae": 3.1},
        "model_behavior_preservation": {"kl_div_score": 0.96},
        "evaluation/our_own": 1.0,
    }


def test_a_window_tells_how_many_latents_fire_rarely() -> None:
    figures = {"mean_log10_feature_sparsity": -17.5 / 3, "below_1e-5": 2, "below_1e-6": 1, "rows": 100}
    assert window_row(At(), figures) == {
        "details/n_training_tokens": 160,
        "metrics/mean_log10_feature_sparsity": -17.5 / 3,
        "sparsity/below_1e-5": 2,
        "sparsity/below_1e-6": 1,
    }


class Holds:
    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def state_dict(self) -> dict[str, Tensor]:
        return self._tensors


def test_distributions_of_weights_are_those_that_an_architecture_has() -> None:
    decoder = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.bfloat16)
    bias = torch.tensor([1.0, 2.0])
    standard = weight_distributions(Holds(W_dec=decoder, b_enc=bias, b_dec=bias))
    assert {name: value.tolist() for name, value in standard.items()} == {
        "weights/W_dec_norms": [5.0, 1.0],
        "weights/b_e": [1.0, 2.0],
    }
    gated = weight_distributions(Holds(W_dec=decoder, b_gate=bias, b_mag=bias, r_mag=bias))
    assert gated.keys() == {"weights/W_dec_norms", "weights/b_gate", "weights/b_mag"}
    jumprelu = weight_distributions(Holds(W_dec=decoder, b_enc=bias, threshold=torch.tensor(0.5)))
    assert jumprelu["weights/thresholds"].tolist() == [0.5]
