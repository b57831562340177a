"""cfg.json: the configuration of a saved SAE, in the layout of SAELens 5."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sae_job.errors import InvalidInput
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS

# Architectures that can be loaded; each has a row in `architectures`.
ARCHITECTURES = ("standard", "topk")
# What is done outside the SAE or not at all, and what the SAE does with each activation.
NORMALIZATIONS = ("none", "expected_average_only_in", *RUN_TIME_NORMALIZATIONS)
# Names that older files use, and today's.
RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn": "activation_fn_str",
}
# What a key that an older file lacks stood for when the file was written.
DEFAULTS: dict[str, Any] = {
    "prepend_bos": True,
    "dataset_trust_remote_code": True,
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": None,
    "activation_fn_str": "relu",
    "architecture": "standard",
    "neuronpedia_id": None,
    "normalize_activations": "none",
    "device": "cpu",
    "dataset_path": "",
    "hook_head_index": None,
    "context_size": 128,
    "model_name": "",
    "hook_name": "",
    "hook_layer": 0,
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
    """

    model_name: str = ""
    hook_name: str = ""
    hook_head_index: int | None = None
    dataset_path: str = ""
    context_size: int = 128
    prepend_bos: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def hook_layer(self) -> int:
        """The layer: the first number in the hook's path, e.g. 7 of `transformer.h.7`; 0 when there is none."""
        match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.hook_name)
        return int(match.group(1)) if match else 0


@dataclass(frozen=True)
class SAEConfig:
    """The 22 keys of cfg.json, under the names that the field's tools read.

    Attributes:
        activation_fn_str: "relu" or "topk".
        activation_fn_kwargs: `{"k": k}` for topk.
        normalize_activations: what the SAE does with each activation, "constant_norm_rescale" or "layer_norm"; else
            "none": what was applied in training is folded into the weights.
        seqpos_slice: positions that were trained on; all when (None,).
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

    def to_dict(self) -> dict[str, Any]:
        """As it stands in cfg.json."""
        return asdict(self) | {"seqpos_slice": list(self.seqpos_slice)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> SAEConfig:
        """Read a cfg.json, older ones included: keys are renamed, missing ones filled in, others left out.

        Raises:
            InvalidInput: a key is missing, or the architecture or its activation function is not one that can be
                loaded.
        """
        values = DEFAULTS | {RENAMED.get(key, key): value for key, value in stored.items()}
        if isinstance(values["normalize_activations"], bool):
            values["normalize_activations"] = "expected_average_only_in" if values["normalize_activations"] else "none"
        if values["normalize_activations"] is None:
            values["normalize_activations"] = "none"
        values["activation_fn_kwargs"] = values.get("activation_fn_kwargs") or {}
        values["dtype"] = str(values.get("dtype", "float32")).removeprefix("torch.")
        positions = values.get("seqpos_slice", (None,))
        values["seqpos_slice"] = tuple(positions) if isinstance(positions, list | tuple) else (positions,)
        known = {entry.name for entry in fields(cls)}
        missing = sorted({"d_in", "d_sae"} - values.keys())
        if missing:
            raise InvalidInput("SaeInvalid", f"cfg.json has no {' and no '.join(missing)}")
        config = cls(**{key: value for key, value in values.items() if key in known})
        config.check()
        return config

    def check(self) -> None:
        """Raises `InvalidInput` for what cannot be loaded rightly, rather than to load something else."""
        if self.architecture not in ARCHITECTURES:
            raise InvalidInput(
                "SaeUnsupported",
                f"architecture {self.architecture!r} cannot be loaded; these can: {', '.join(ARCHITECTURES)}",
            )
        if self.activation_fn_str not in ("relu", "topk"):
            raise InvalidInput("SaeUnsupported", f"activation function {self.activation_fn_str!r} cannot be loaded")
        if self.uses_top_k and not isinstance(self.activation_fn_kwargs.get("k"), int):
            raise InvalidInput("SaeInvalid", "cfg.json has no activation_fn_kwargs.k, which topk needs")
        if self.normalize_activations not in NORMALIZATIONS:
            raise InvalidInput(
                "SaeUnsupported",
                f"normalize_activations {self.normalize_activations!r} cannot be loaded; these can: "
                f"{', '.join(NORMALIZATIONS)}",
            )

    @property
    def uses_top_k(self) -> bool:
        return self.architecture == "topk" or self.activation_fn_str == "topk"
