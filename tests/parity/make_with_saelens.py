"""Imported by a peer's Python: SAEs of each architecture that the installed SAELens has, with random weights.

Nothing of this project is imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

D_IN, D_SAE, D_OUT, K = 32, 256, 20, 4
# Of SAELens 5: keys of cfg.json that matter, by name.
_REFERENCE: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard"},
    "tanh": {"architecture": "standard", "activation_fn_str": "tanh-relu"},
    "not-centred": {"architecture": "standard", "apply_b_dec_to_input": False},
    "layer-norm": {"architecture": "standard", "normalize_activations": "layer_norm"},
    "constant-norm": {"architecture": "gated", "normalize_activations": "constant_norm_rescale"},
    "topk": {"architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    "topk-activation": {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    "gated": {"architecture": "gated"},
    "jumprelu": {"architecture": "jumprelu"},
    "heads": {"architecture": "jumprelu", "hook_name": "blocks.3.attn.hook_z"},
    "finetuned": {"architecture": "standard", "finetuning_scaling_factor": True},
    "finetuned-legacy": {"architecture": "jumprelu", "finetuning_scaling_factor": True},
}
_TRAINING = {
    "l1_coefficient": 1.0,
    "lp_norm": 1.0,
    "use_ghost_grads": False,
    "normalize_sae_decoder": False,
    "noise_scale": 0.0,
    "decoder_orthogonal_init": False,
    "mse_loss_normalization": None,
    "jumprelu_init_threshold": 0.1,
    "jumprelu_bandwidth": 0.05,
    "decoder_heuristic_init": False,
    "init_encoder_as_decoder_transpose": False,
    "scale_sparsity_penalty_by_decoder_norm": False,
}


def make_all(folder: Path, *, newest: bool) -> dict[str, Any]:
    """Save one SAE of each kind in a folder of its name; returns them by name, None where SAELens's loader gives what
    is used."""
    return _make_newest(folder) if newest else _make_reference(folder)


def randomize(sae: Any, seed: int) -> None:
    """Random weights, decoder rows of different norms, thresholds above zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(sae.named_parameters()):
            values = torch.randn(tensor.shape, generator=generator) / (
                tensor.shape[0] ** 0.5 if tensor.dim() > 1 else 5
            )
            if name == "threshold":
                values = values.abs()
            elif name == "log_threshold":
                values = values.abs().log()
            elif name == "finetuning_scaling_factor":
                values += 1
            elif name == "W_dec":
                values *= 0.5 + torch.rand(tensor.shape[0], 1, generator=generator)
            tensor.copy_(values)


def _make_reference(folder: Path) -> dict[str, Any]:
    from sae_lens import SAE, SAEConfig  # pyright: ignore[reportMissingImports]
    from sae_lens.training.training_sae import TrainingSAE, TrainingSAEConfig  # pyright: ignore[reportMissingImports]

    base: dict[str, Any] = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "activation_fn_str": "relu",
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "context_size": 64,
        "model_name": "gpt2",
        "hook_name": "blocks.3.hook_resid_post",
        "hook_layer": 3,
        "hook_head_index": None,
        "prepend_bos": True,
        "dataset_path": "text",
        "dataset_trust_remote_code": False,
        "normalize_activations": "none",
        "dtype": "float32",
        "device": "cpu",
        "sae_lens_training_version": None,
    }
    made: dict[str, Any] = {}
    for seed, (name, changes) in enumerate(_REFERENCE.items()):
        sae = made[name] = SAE(SAEConfig(**{**base, **changes}))
        randomize(sae, seed)
        sae.save_model(folder / name, sparsity=torch.full((D_SAE,), -2.0))
    # Older files have another name for the factor, the only one that SAELens 5 itself loads.
    weights = folder / "finetuned-legacy/sae_weights.safetensors"
    tensors = load_file(weights)
    tensors["scaling_factor"] = tensors.pop("finetuning_scaling_factor")
    save_file(tensors, weights)
    # A training's own files: thresholds come from their logarithms, and cfg.json has settings of training.
    trained = TrainingSAE(TrainingSAEConfig(**{**base, **_TRAINING, "architecture": "jumprelu"}))
    randomize(trained, 99)
    trained.save_model(folder / "jumprelu-of-a-training")
    return made | {"jumprelu-of-a-training": None}


def _make_newest(folder: Path) -> dict[str, Any]:
    import sae_lens  # pyright: ignore[reportMissingImports]
    from sae_lens.saes.sae import SAEMetadata  # pyright: ignore[reportMissingImports]

    size: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}
    top_k = {**size, "k": K}
    transcoder = {**size, "d_out": D_OUT, "apply_b_dec_to_input": False}
    for_use: dict[str, Any] = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig(**size)),
        "not-centred": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig(**size, apply_b_dec_to_input=False)),
        "layer-norm": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig(**size, normalize_activations="layer_norm")),
        "heads": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig(**size, reshape_activations="hook_z")),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig(**size)),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig(**size)),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig(**top_k)),
        "topk-rescaled": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig(**top_k, rescale_acts_by_decoder_norm=True)),
        "transcoder": (sae_lens.Transcoder, sae_lens.TranscoderConfig(**transcoder)),
        "transcoder-layer-norm": (
            sae_lens.Transcoder,
            sae_lens.TranscoderConfig(**transcoder, normalize_activations="layer_norm"),
        ),
        "skip-transcoder": (sae_lens.SkipTranscoder, sae_lens.SkipTranscoderConfig(**transcoder)),
        "jumprelu-transcoder": (sae_lens.JumpReLUTranscoder, sae_lens.JumpReLUTranscoderConfig(**transcoder)),
        "jumprelu-skip-transcoder": (
            sae_lens.JumpReLUSkipTranscoder,
            sae_lens.JumpReLUSkipTranscoderConfig(**transcoder),
        ),
        "refused-abstopk": (sae_lens.AbsTopKSAE, sae_lens.AbsTopKSAEConfig(**top_k)),
    }
    trained: dict[str, Any] = {
        "trained-standard": (sae_lens.StandardTrainingSAE, sae_lens.StandardTrainingSAEConfig(**size)),
        "trained-gated": (sae_lens.GatedTrainingSAE, sae_lens.GatedTrainingSAEConfig(**size)),
        "trained-jumprelu": (sae_lens.JumpReLUTrainingSAE, sae_lens.JumpReLUTrainingSAEConfig(**size)),
        "trained-topk": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig(**top_k)),
        "trained-batchtopk": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig(**top_k)),
        "trained-matryoshka": (
            sae_lens.MatryoshkaBatchTopKTrainingSAE,
            sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(**top_k, matryoshka_widths=[64, 128, D_SAE]),
        ),
    }
    made: dict[str, Any] = {}
    for seed, (name, (kind, config)) in enumerate((for_use | trained).items()):
        hook = "blocks.3.attn.hook_z" if name == "heads" else "blocks.3.hook_resid_post"
        config.metadata = SAEMetadata(model_name="gpt2", hook_name=hook, context_size=64, prepend_bos=True)
        sae = kind(config)
        randomize(sae, seed)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.4)
        if name in trained:
            sae.save_inference_model(folder / name)
        else:
            sae.save_model(folder / name)
        made[name] = None if name in trained else sae
    # What a training saves for itself is not for use.
    kind, config = trained["trained-batchtopk"]
    kind(config).save_model(folder / "refused-of-a-training")
    return made
