"""Models of the Transformers library as it has them: hook names are dotted module paths, such as `model.layers.8`.

`<path>.input` is the input of a module: `model.layers.8.self_attn.o_proj.input` is what the attention heads give.
Outputs of an attention module's query, key and value maps, and the input of its output map, can be split into heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from sae_job.models.anatomy import View, layer_lists_of
from sae_job.models.sites import ModuleInput, ModuleOutput, Site

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from sae_operator.api.activation_cache import ModelSource

KEEPS_HEAD: bool = False
# Names that attention modules have for the width of a head, and for their maps from and to heads.
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size")
_MAPS_TO_HEADS = ("q_proj", "k_proj", "v_proj", "query", "key", "value")
_MAPS_FROM_HEADS = ("o_proj", "out_proj", "dense", "c_proj")
_INPUT = ".input"


def check(source: ModelSource) -> str | None:
    """The attention kernel that the spec names."""
    return source.attention_implementation


def view(model: PreTrainedModel, config: PreTrainedConfig, source: ModelSource, *, loaded: bool) -> View:
    """Every module's output and input."""
    layers = layer_lists_of(model, config)
    return View(run=model, sites=_Modules(model), layer_names=tuple(f"{path}.{{}}" for path in layers))


class _Modules(Mapping[str, Site]):
    """Outputs of a model's modules by their paths; inputs are there, too, but not listed."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: module for name, module in model.named_modules() if name}

    def __getitem__(self, name: str) -> Site:
        if name in self._modules:
            return ModuleOutput(name, self._modules[name], self._heads(name, _MAPS_TO_HEADS, ("out_features", "nf")))
        path = name.removesuffix(_INPUT) if name.endswith(_INPUT) else name
        return ModuleInput(name, self._modules[path], self._heads(path, _MAPS_FROM_HEADS, ("in_features", "nx")))

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def _heads(self, path: str, maps: Sequence[str], widths: Sequence[str]) -> int | None:
        """Number of heads that a map of an attention module goes to or comes from; None for any other module."""
        parent, _, last = path.rpartition(".")
        width = _number(self._modules[path], widths)
        head_width = _number(self._modules.get(parent), _HEAD_WIDTHS)
        if last not in maps or not width or not head_width or width % head_width:
            return None
        return width // head_width


def _number(module: nn.Module | None, names: Sequence[str]) -> int | None:
    """The first of these attributes that is a number."""
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
