"""Every side's SAE on the same held-out rows and contexts, by the product's own metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from bench.quality_data import HOOK, MODEL_BATCH, QualityData
from sae_job.evaluation.cross_entropy import CrossEntropy, Splice, cross_entropies
from sae_job.evaluation.metrics import HeldOutRows, reconstruction_metrics
from sae_job.models.load import load_full_model
from sae_operator.api.activation_cache import ModelSource
from tests.testbed.data import ensure_small_model


class PlainSae:
    """An SAE as a worker left it, on raw activations: `f = a((x - b_dec) W_enc + b_enc)`, `y = f W_dec + b_dec`.

    Args:
        path: the worker's files, without their endings.
        k: active latents of `topk`.
    """

    def __init__(self, path: Path, k: int) -> None:
        facts = json.loads(path.with_name(f"{path.name}.json").read_text())
        self._tensors = load_file(path.with_name(f"{path.name}.safetensors"))
        self._activation, self._subtracts = facts["activation"], facts["subtracts_b_dec"]
        self._k = k
        self.fired: Tensor = torch.zeros(self._tensors["W_dec"].shape[0], dtype=torch.bool)

    def reconstruct(
        self, x: Float[Tensor, "rows d_in"], /
    ) -> tuple[Float[Tensor, "rows d_sae"], Float[Tensor, "rows d_in"]]:
        t = self._tensors
        features = torch.addmm(t["b_enc"], x - t["b_dec"] if self._subtracts else x, t["W_enc"])
        if self._activation == "topk":
            values, indices = features.relu_().topk(self._k, dim=1, sorted=False)
            features = torch.zeros_like(features).scatter_(1, indices, values)
        elif self._activation == "jumprelu":
            features = features.relu_().mul_(features > t["threshold"])
        else:
            features = features.relu_()
        self.fired |= (features > 0).any(dim=0)
        return features, torch.addmm(t["b_dec"], features, t["W_dec"])


def held_out_figures(sae: PlainSae, rows: HeldOutRows) -> dict[str, float]:
    """`explained_variance`, `l0`, and `dead_fraction`: the share of latents that fire on none of the rows."""
    sae.fired.zero_()
    metrics = reconstruction_metrics(sae, rows)
    assert metrics.explained_variance is not None
    assert metrics.l0 is not None
    return {
        "explained_variance": metrics.explained_variance,
        "l0": metrics.l0,
        "dead_fraction": 1 - float(sae.fired.double().mean()),
    }


def cross_entropy_figures(data: QualityData, saes: Mapping[str, PlainSae]) -> dict[str, CrossEntropy]:
    """Of each SAE, on contexts of the test rows; the model runs in bfloat16, as the activations come from it."""
    contexts = data.contexts()
    model = load_full_model(
        ModelSource(name=str(ensure_small_model()), dtype="bfloat16", batch_size=MODEL_BATCH), device="cpu"
    )
    return cross_entropies(
        model,
        contexts["tokens"],
        contexts["replaced"],
        {name: Splice(HOOK, sae) for name, sae in saes.items()},
        ignore_token_ids=contexts["ignored"].tolist(),
        batch_size=MODEL_BATCH,
    )
