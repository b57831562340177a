"""What a row of a Weights & Biases run holds: the names that its charts have, stable and those of SAELens.

Figures of steps and of windows stand alone (`losses/overall_loss`); those of evaluations on held-out rows are nested in
groups, which the charts show as `reconstruction_quality.explained_variance`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from jaxtyping import Float32
from torch import Tensor

Row = dict[str, Any]

# Figures of a step whose names are not just a group and their own.
_STEP_NAMES = {
    "loss": "losses/overall_loss",
    "l0": "metrics/l0",
    "explained_variance": "metrics/explained_variance",
    "explained_variance_std": "metrics/explained_variance_std",
    "dead_features": "sparsity/dead_features",
    "mean_tokens_since_fired": "sparsity/mean_tokens_since_fired",
    "learning_rate": "details/current_learning_rate",
    "coefficient": "details/current_l1_coefficient",
}
_EVALUATION_GROUPS = {
    "reconstruction_quality": {
        name: name
        for name in ("explained_variance", "explained_variance_legacy", "explained_variance_std", "mse", "cossim")
    },
    "shrinkage": {name: name for name in ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias")},
    "sparsity": {name: name for name in ("l0", "l1", "dead_fraction")},
    "model_performance_preservation": {
        "ce_loss_score": "ce_loss_score",
        "ce_loss_clean": "ce_loss_without_sae",
        "ce_loss_with_sae": "ce_loss_with_sae",
        "ce_loss_with_ablation": "ce_loss_with_ablation",
    },
    "model_behavior_preservation": {
        "kl_divergence_score": "kl_div_score",
        "kl_divergence_with_sae": "kl_div_with_sae",
        "kl_divergence_with_ablation": "kl_div_with_ablation",
    },
}
# Tensors of an SAE whose values are drawn, and the histograms' names.
_HISTOGRAMS = {
    "b_enc": "weights/b_e",
    "b_gate": "weights/b_gate",
    "b_mag": "weights/b_mag",
    "threshold": "weights/thresholds",
}


class Moment(Protocol):
    """Steps done, and tokens trained on."""

    @property
    def step(self) -> int: ...

    @property
    def tokens(self) -> int: ...


class Window(Protocol):
    """How often each latent fired over a window of rows."""

    @property
    def log10_frequencies(self) -> Float32[Tensor, " d_sae"]: ...

    def figures(self) -> dict[str, float]: ...


class HoldsTensors(Protocol):
    """An SAE for use."""

    def state_dict(self) -> Mapping[str, Tensor]: ...


def step_row(moment: Moment, figures: Mapping[str, Any]) -> Row:
    """Of the last step's figures, with the values that it used.

    `losses/l1_loss` is the penalty without its weight, `losses/raw_l1_loss` with it; where the weight is 0, nothing is
    divided. `sparsity/mean_passes_since_fired` counts batches.
    """
    row: Row = {"details/n_training_tokens": moment.tokens}
    for name, value in figures.items():
        if name in _STEP_NAMES:
            row[_STEP_NAMES[name]] = value
        elif name == "l1_loss":
            row["losses/raw_l1_loss"] = value
            row["losses/l1_loss"] = value / (figures.get("coefficient") or 1.0)
        elif name.endswith("_loss"):
            row[f"losses/{name}"] = value
        else:
            row[f"details/{name}"] = value
    if "mean_tokens_since_fired" in figures and moment.tokens > 0:
        row["sparsity/mean_passes_since_fired"] = figures["mean_tokens_since_fired"] * moment.step / moment.tokens
    return row


def evaluation_row(moment: Moment, figures: Mapping[str, float | None]) -> Row:
    """Of figures on held-out rows; what is not defined is left out."""
    row: Row = {"details/n_training_tokens": moment.tokens}
    known = {name: value for name, value in figures.items() if value is not None}
    for group, names in _EVALUATION_GROUPS.items():
        if found := {told: known.pop(name) for name, told in names.items() if name in known}:
            row[group] = found
    if (spread := figures.get("explained_variance_std")) is not None:
        row["metrics/explained_variance_std"] = spread
    return row | {f"evaluation/{name}": value for name, value in known.items()}


def window_row(moment: Moment, figures: Mapping[str, float]) -> Row:
    """Of a window's firing frequencies: the figures, but for the histogram `plots/feature_density_line_chart`."""
    return {
        "details/n_training_tokens": moment.tokens,
        "metrics/mean_log10_feature_sparsity": figures["mean_log10_feature_sparsity"],
        "sparsity/below_1e-5": figures["below_1e-5"],
        "sparsity/below_1e-6": figures["below_1e-6"],
    }


def weight_distributions(sae: HoldsTensors) -> dict[str, Tensor]:
    """Values whose histograms are drawn, float32 on the CPU: norms of decoder rows, biases of the encoder, thresholds
    (also the one that all latents of an SAE share)."""
    tensors = sae.state_dict()
    values = {"weights/W_dec_norms": torch.linalg.vector_norm(tensors["W_dec"].float(), dim=1)}
    values |= {name: tensors[tensor].float().flatten() for tensor, name in _HISTOGRAMS.items() if tensor in tensors}
    return {name: value.detach().cpu() for name, value in values.items()}
