"""The configuration of an SAE for use, whatever layout of files it is stored in.

`saelens5` and `saelens6` translate it from and to cfg.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sae_job.errors import InvalidInput
from sae_job.saes import saelens5, saelens6
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS

Layout = Literal["saelens5", "saelens6"]

# Architectures that an SAE for use may have, and the activation functions of each. What was trained as batchtopk or
# matryoshka_batchtopk is used as jumprelu.
ACTIVATION_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "standard": ("relu", "tanh-relu", "topk"),
    "gated": ("relu", "tanh-relu"),
    # Tanh would be applied in use to what was trained without it.
    "jumprelu": ("relu",),
    "topk": ("topk",),
}
ARCHITECTURES = tuple(ACTIVATION_FUNCTIONS)
# What is done outside the SAE or not at all, and what the SAE does with each activation.
NORMALIZATIONS = ("none", "expected_average_only_in", *RUN_TIME_NORMALIZATIONS)
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# Keys of cfg.json, of both layouts and with their older names, whose values are taken as they are.
_TEXT, _TRUTH = (str, "a text"), (bool, "true or false")
_OBJECT = (dict | None, "an object")
_TYPES: dict[str, tuple[Any, str]] = {
    "architecture": _TEXT,
    "activation_fn_str": _TEXT,
    "activation_fn": _TEXT,
    "hook_name": _TEXT,
    "hook_point": _TEXT,
    "apply_b_dec_to_input": _TRUTH,
    "finetuning_scaling_factor": (bool | None, "true or false"),
    "rescale_acts_by_decoder_norm": _TRUTH,
    "activation_fn_kwargs": _OBJECT,
    "model_from_pretrained_kwargs": _OBJECT,
}


@dataclass(frozen=True)
class Provenance:
    """Where an SAE's activations came from: what cfg.json records besides the SAE itself.

    Attributes:
        model_name: Hub id or folder.
        hook_name: the hook, by the name that the model's loader gives it, without a head.
        hook_head_index: the attention head that is taken alone.
        dataset_path: Hub id, file or folder.
        context_size: tokens per context.
        prepend_bos: whether contexts begin with BOS.
        seqpos_slice: start, stop and step of the positions that became rows; (None,) for all.
        model_from_pretrained_kwargs: what `HookedTransformer.from_pretrained_no_processing` takes to give the model.
        hook_name_out: a transcoder's target hook; None for an autoencoder.
        hook_head_index_out: the head of the target hook that is taken alone.
    """

    model_name: str = ""
    hook_name: str = ""
    hook_head_index: int | None = None
    dataset_path: str = ""
    context_size: int = 128
    prepend_bos: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    hook_name_out: str | None = None
    hook_head_index_out: int | None = None

    @property
    def hook_layer(self) -> int:
        """The layer: the first number in the hook's path, e.g. 7 of `transformer.h.7`; 0 when there is none."""
        return saelens6.layer_of(self.hook_name)


@dataclass(frozen=True)
class SAEConfig:
    """What an SAE for use computes, and where it came from, under the names that the field's tools read.

    Attributes:
        architecture: one of `ARCHITECTURES`.
        activation_fn_str: one of the architecture's `ACTIVATION_FUNCTIONS`.
        activation_fn_kwargs: `{"k": k}` for topk.
        apply_b_dec_to_input: whether `b_dec` is subtracted before encoding; False for a transcoder.
        dtype: number format of the weights, a key of `DTYPES`.
        finetuning_scaling_factor: whether there is a factor of that name for each latent in decoding.
        normalize_activations: what the SAE does with each activation, "constant_norm_rescale" or "layer_norm"; else
            "none": what was applied in training is folded into the weights.
        seqpos_slice: positions that were trained on; all when (None,).
        d_out: width of what a transcoder gives; None for an autoencoder.
        skip_connection: whether a transcoder adds an affine map of its input, `W_skip` [d_out, d_in].
        hook_name_out: a transcoder's target hook.
        hook_head_index_out: its head.
        reshape_activations: "hook_z" where inputs are [..., n_heads, d_head] with n_heads * d_head = d_in.
        rescale_acts_by_decoder_norm: whether the decoder counts as if its rows had unit norm, so that those norms
            count in the choice of the k largest; folded into the weights when an SAE is built.
        training_architecture: what it was trained as, e.g. "batchtopk"; None where that is not known.
        metadata: what else a file in the newest layout told.
    """

    architecture: str
    d_in: int
    d_sae: int
    activation_fn_str: str
    apply_b_dec_to_input: bool
    dtype: str
    model_name: str
    hook_name: str
    hook_layer: int
    context_size: int
    prepend_bos: bool
    dataset_path: str
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    finetuning_scaling_factor: bool = False
    hook_head_index: int | None = None
    dataset_trust_remote_code: bool = False
    normalize_activations: str = "none"
    device: str = "cpu"
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    seqpos_slice: tuple[int | None, ...] = (None,)
    d_out: int | None = None
    skip_connection: bool = False
    hook_name_out: str | None = None
    hook_head_index_out: int | None = None
    reshape_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    training_architecture: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self, layout: Layout = "saelens5") -> dict[str, Any]:
        """As it stands in cfg.json.

        Args:
            layout: SAELens 5's or SAELens 6's; transcoders, which SAELens 5 does not know, always have the latter.
        """
        return (saelens5 if self.layout(layout) == "saelens5" else saelens6).write(self)

    def layout(self, wanted: Layout) -> Layout:
        """The layout that it is stored in where `wanted` is asked for."""
        return "saelens6" if self.is_transcoder else wanted

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> SAEConfig:
        """Read a cfg.json of either layout, older ones included.

        Raises:
            InvalidInput: a key is missing, or the SAE is not one that can be loaded.
        """
        _check_types(stored)
        read = saelens6.read if saelens6.is_layout_of(stored) else saelens5.read
        config = cls(**read(stored))
        config.check()
        return config

    def check(self) -> None:
        """Raises `InvalidInput` for what cannot be used rightly, rather than to compute something else."""
        if self.architecture not in ARCHITECTURES:
            raise unsupported("architecture", self.architecture, ARCHITECTURES)
        if self.activation_fn_str not in ACTIVATION_FUNCTIONS[self.architecture]:
            raise unsupported(
                f"activation function of architecture {self.architecture}",
                self.activation_fn_str,
                ACTIVATION_FUNCTIONS[self.architecture],
            )
        if self.normalize_activations not in NORMALIZATIONS:
            raise unsupported("normalize_activations", self.normalize_activations, NORMALIZATIONS)
        if self.dtype not in DTYPES:
            raise unsupported("dtype", self.dtype, tuple(DTYPES))
        sizes = {"d_in": self.d_in, "d_sae": self.d_sae}
        if self.d_out is not None:
            sizes["d_out"] = self.d_out
        if self.uses_top_k:
            sizes["k"] = self._k
            others = sorted(self.activation_fn_kwargs.keys() - {"k"})
            if others:
                raise InvalidInput("SaeUnsupported", f"activation_fn_kwargs.{others[0]} cannot be loaded; k alone can")
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InvalidInput("SaeInvalid", f"cfg.json has {name} {size!r}; it must be a number of at least 1")
        if self.uses_top_k and self.k > self.d_sae:
            raise InvalidInput("SaeInvalid", f"cfg.json has k {self.k}, but only {self.d_sae} latents")
        if self.is_transcoder and self.apply_b_dec_to_input:
            raise InvalidInput(
                "SaeInvalid", "cfg.json has apply_b_dec_to_input on, but a transcoder's b_dec is of its outputs"
            )
        if self.skip_connection and not self.is_transcoder:
            raise InvalidInput("SaeInvalid", "only a transcoder has a skip connection, and d_out is not there")

    @property
    def uses_top_k(self) -> bool:
        return self.activation_fn_str == "topk"

    @property
    def _k(self) -> Any:
        if "k" not in self.activation_fn_kwargs:
            raise InvalidInput("SaeInvalid", "cfg.json has no activation_fn_kwargs.k, which topk needs")
        return self.activation_fn_kwargs["k"]

    @property
    def k(self) -> int:
        """Latents that are active at most, of an SAE that uses top-k."""
        return int(self._k)

    @property
    def is_transcoder(self) -> bool:
        return self.d_out is not None

    @property
    def width_out(self) -> int:
        """Width of what it gives."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def reshapes_heads(self) -> bool:
        """Whether inputs may come as [..., n_heads, d_head]."""
        return self.reshape_activations == "hook_z" or self.hook_name.endswith("_z")

    @property
    def name(self) -> str:
        """`sae_{model}_{hook}_{latents}`."""
        return f"sae_{self.model_name}_{self.hook_name}_{self.d_sae}"


def _check_types(stored: dict[str, Any]) -> None:
    """Raises `InvalidInput` for a value that would be taken for another one, such as "false" for a truth, or that
    nothing can be made of; sizes and names are checked when they are read."""
    metadata = stored.get("metadata") if saelens6.is_layout_of(stored) else None
    for values in (stored, {key: value for key, value in (metadata or {}).items() if value is not None}):
        for key, (kind, name) in _TYPES.items():
            if key in values and not isinstance(values[key], kind):
                raise InvalidInput("SaeInvalid", f"cfg.json has {key} {values[key]!r}; it must be {name}")


def unsupported(what: str, found: object, possible: tuple[str, ...]) -> InvalidInput:
    """The error for a value that no SAE here can have."""
    return InvalidInput("SaeUnsupported", f"{what} {found!r} cannot be loaded; these can: {', '.join(possible)}")
