"""Models as TransformerLens shows them: hook names are its own, such as `blocks.8.hook_resid_post`.

Its bridge puts its hook points around the modules of a Transformers model, which is loaded as any other: no more
layers than needed, weights as they are in the checkpoint unless the spec asks for processing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.models.anatomy import View
from sae_job.models.checkpoint import ATTENTION_FIELD
from sae_job.models.sites import Look, Removable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from sae_operator.api.activation_cache import ModelSource, Processing

KEEPS_HEAD: bool = True
LAYER_OUTPUT = "blocks.{}.hook_resid_post"
# Hook points that stay empty unless the bridge is told to compute them, by the ends of their names.
_ON_DEMAND = {
    "hook_result": "set_use_attn_result",
    "hook_attn_in": "set_use_attn_in",
    "hook_q_input": "set_use_split_qkv_input",
    "hook_k_input": "set_use_split_qkv_input",
    "hook_v_input": "set_use_split_qkv_input",
    "hook_mlp_in": "set_use_hook_mlp_in",
}


@dataclass(frozen=True)
class LensHook:
    """A hook point of TransformerLens.

    Attributes:
        switch: makes the bridge compute what is seen here; None where it does anyhow.
    """

    point: Any
    switch: Callable[[bool], None] | None

    def watch(self, look: Look) -> Removable:
        if self.switch is not None:
            self.switch(True)

        def see(activation: Tensor, *, hook: Any) -> Tensor | None:
            return look(activation)

        return self.point.add_hook(see).hook


def check(source: ModelSource) -> str:
    """The attention kernel: the plain one, which the bridge computes itself so that its scores can be hooked.

    Raises:
        InvalidInput: TransformerLens is not installed; the model is to be compiled, or to use another kernel.
    """
    if importlib.util.find_spec("transformer_lens") is None:
        raise InvalidInput(
            "PackageMissing",
            "loader TransformerLens needs its package: pip install 'sae-operator[transformerlens]', or use HuggingFace",
            field="spec.model.loader",
        )
    if source.compile:
        raise InvalidInput(
            "CompileUnsupported",
            "the hook points of TransformerLens cannot be compiled; set compile false, or use loader HuggingFace",
            field="spec.model.compile",
        )
    if source.attention_implementation not in (None, "eager"):
        raise InvalidInput(
            "AttentionUnsupported",
            "TransformerLens computes attention itself, in the plain way; leave it empty, or use loader HuggingFace",
            field=ATTENTION_FIELD,
        )
    return "eager"


def view(model: PreTrainedModel, config: PreTrainedConfig, source: ModelSource, *, loaded: bool) -> View:
    """Every hook point, by its new name and its old one.

    Raises:
        InvalidInput: TransformerLens does not know the architecture.
    """
    bridge = _bridge(model, config)
    if loaded and source.processing is not None:
        _process(bridge, source.processing)
    sites = {name: LensHook(point, _switch(bridge, name)) for name, point in bridge.hook_dict.items()}
    return View(run=bridge, sites=sites, layer_names=(LAYER_OUTPUT, "blocks.{}.hook_out"))


def _switch(bridge: Any, name: str) -> Callable[[bool], None] | None:
    switch = _ON_DEMAND.get(name.rpartition(".")[2])
    return None if switch is None else getattr(bridge, switch)


def _bridge(model: PreTrainedModel, config: PreTrainedConfig) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    # Classes of shortened models are named after the whole model's, as the bridge's adapters are.
    architecture = type(model).__name__
    try:
        return build_bridge_from_module(model, architecture, hf_config=config, model_name=str(config.name_or_path))
    except (ValueError, NotImplementedError) as error:
        raise InvalidInput(
            "ModelUnsupported",
            f"TransformerLens has no bridge to {architecture}: {error}; use loader HuggingFace",
            field="spec.model.loader",
        ) from error


def _process(bridge: Any, processing: Processing) -> None:
    """Change the weights as the spec says, and nothing else of them."""
    bridge.enable_compatibility_mode(
        disable_warnings=True,
        fold_ln=processing.fold_layer_norm,
        center_writing_weights=processing.center_writing_weights,
        center_unembed=processing.center_unembed,
        fold_value_biases=processing.fold_value_biases,
    )
