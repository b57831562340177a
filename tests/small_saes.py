"""Small SAEs for use with random weights, of every architecture: nothing of them is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_job import SAE
from sae_job.saes.config import SAEConfig
from sae_job.saes.files import shapes_of

K = 5
# What SAEs compute, by a word for each kind.
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard", "activation_fn_str": "relu"},
    "tanh": {"architecture": "standard", "activation_fn_str": "tanh-relu"},
    "topk": {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    "topk_activation": {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    "gated": {"architecture": "gated", "activation_fn_str": "relu"},
    "jumprelu": {"architecture": "jumprelu", "activation_fn_str": "relu"},
}
_TRANSCODED = ("standard", "topk", "gated", "jumprelu", "tanh")
TRANSCODERS = {
    f"{kind}{suffix}": AUTOENCODERS[kind] | {"skip_connection": "skip" in suffix}
    for kind in _TRANSCODED
    for suffix in ("_transcoder", "_skip_transcoder")
}
KINDS = AUTOENCODERS | TRANSCODERS


def random_sae(
    kind: str,
    *,
    d_in: int = 12,
    d_sae: int = 40,
    d_out: int = 9,
    seed: int = 0,
    unit_decoder: bool = False,
    **fields: Any,
) -> SAE:
    """An SAE of a kind, with no weight at zero and decoder rows of different norms.

    Args:
        unit_decoder: rows of norm 1 instead.
        fields: further fields of its configuration.
    """
    transcoder = kind in TRANSCODERS
    told: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "d_out": d_out if transcoder else None,
        "apply_b_dec_to_input": not transcoder,
        "dtype": "float32",
        "model_name": "gpt2",
        "hook_name": "blocks.7.hook_resid_pre",
        "hook_layer": 7,
        "context_size": 64,
        "prepend_bos": True,
        "dataset_path": "text",
    }
    if transcoder:
        told |= {"hook_name_out": "blocks.7.hook_mlp_out"}
    config = SAEConfig(**{**told, **KINDS[kind], **fields})
    return SAE.from_tensors(config, random_tensors(config, seed=seed, unit_decoder=unit_decoder))


def random_tensors(config: SAEConfig, *, seed: int, unit_decoder: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator) / (shape[0] ** 0.5 if len(shape) > 1 else 5)
        for name, shape in shapes_of(config).items()
    }
    norms = torch.linalg.vector_norm(tensors["W_dec"], dim=1, keepdim=True)
    tensors["W_dec"] /= norms
    if not unit_decoder:
        tensors["W_dec"] *= 0.5 + 1.5 * torch.rand(norms.shape, generator=generator)
    if "threshold" in tensors:
        tensors["threshold"] = 0.5 * tensors["threshold"].abs() + 0.05
    if "finetuning_scaling_factor" in tensors:
        tensors["finetuning_scaling_factor"] = 1 + tensors["finetuning_scaling_factor"]
    return tensors


def rows(sae: SAE, *, seed: int = 1, count: int = 24) -> Tensor:
    """Inputs [count, d_in] that are not centred."""
    return torch.randn(count, sae.cfg.d_in, generator=torch.Generator().manual_seed(seed)) + 0.3
