"""What a Transformers model is made of, found without its weights.

The model is built on torch's meta device and run on two pretended tokens. That tells each hook's width, and in which
layer the last hook lies, for any module and any architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae_job.errors import InvalidInput
from sae_job.models.facts import nearest_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_TOKENS = 2


class LastHookReached(Exception):
    """Ends a forward pass once every hooked module has given its output."""


@dataclass(frozen=True)
class Anatomy:
    """What hooks need of a model.

    Attributes:
        d_in: width of each hook's activations.
        layers: layers that must be loaded; None when the model has no list of layers.
        layer_lists: paths of the lists of layers.
        unused_head: path of an untied output head that no hook needs; None when there is none to leave out.
    """

    d_in: dict[str, int]
    layers: int | None
    layer_lists: tuple[str, ...]
    unused_head: str | None


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint was saved as, so that hook names are its own; else the one that its config means."""
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    causal: Any = transformers.AutoModelForCausalLM._model_mapping
    base: Any = transformers.AutoModel._model_mapping
    return causal[type(config)] if type(config) in causal else base[type(config)]


def build_without_weights(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: every module and shape, no memory."""
    with torch.device("meta"):
        return cls(copy.deepcopy(config)).eval()


def total_layers(config: PreTrainedConfig) -> int | None:
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same config for a model of the first `layers` layers."""
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    total = total_layers(config)
    # Lists with one entry per layer, such as `layer_types`, must stay as long as the model is deep.
    per_layer = {
        name: value
        for name, value in text.to_dict().items()
        if "layer" in name and isinstance(value, list) and len(value) == total
    }
    text.num_hidden_layers = layers
    for name, value in per_layer.items():
        setattr(text, name, value[:layers])
    return shorter


def first_tensor(output: Any) -> Tensor | None:
    """The activation in a module's output: the tensor, or the first element of a tuple where that is one."""
    if isinstance(output, tuple) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def examine(cls: type[PreTrainedModel], config: PreTrainedConfig, hooks: Sequence[str]) -> Anatomy:
    """Find the hooks in a model.

    Raises:
        InvalidInput: a hook is no module of the model, never runs, or gives no [batch, position, width] tensor.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    # Tensors that know they are pretended: Transformers looks into the values of all others. Number formats do not
    # change shapes, and some operators have no other pretended form.
    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(torch.bfloat16):
        model = build_without_weights(cls, config)
        modules: dict[str, nn.Module] = dict(model.named_modules())
        count = total_layers(config)
        lists = tuple(
            path for path, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) == count
        )
        _check_names(hooks, modules, lists)
        try:
            shapes, layers = _pretend(model, modules, hooks, lists)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise InvalidInput(
                "ModelUnsupported",
                f"{cls.__name__} decides by the values of its tensors what it runs, so its hooks cannot be checked",
                field="spec.model.name",
            ) from error
    d_in = {hook: _width(index, hook, shapes) for index, hook in enumerate(hooks)}
    return Anatomy(d_in=d_in, layers=layers if lists else None, layer_lists=lists, unused_head=_head(model, hooks))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _check_names(hooks: Sequence[str], modules: dict[str, nn.Module], lists: Sequence[str]) -> None:
    names = [name for name in modules if name]
    for index, hook in enumerate(hooks):
        if hook not in modules:
            nearest = ", ".join(nearest_names(hook, names, layers=lists))
            raise InvalidInput(
                "HookNotFound",
                f"the model has no module {hook!r}; nearest: {nearest}",
                field=f"spec.hooks[{index}].name",
            )


def _pretend(
    model: PreTrainedModel, modules: dict[str, nn.Module], hooks: Sequence[str], lists: Sequence[str]
) -> tuple[dict[str, tuple[int, ...] | None], int]:
    """Run the model until the last hook; returns the shapes that hooks saw, and how many layers were entered."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    entered = 1

    def enter(layer: int) -> None:
        nonlocal entered
        entered = max(entered, layer + 1)

    def leave(hook: str, output: Any) -> None:
        tensor = first_tensor(output)
        shapes[hook] = None if tensor is None else tuple(tensor.shape)
        if len(shapes) == len(set(hooks)):
            raise LastHookReached

    for path in lists:
        for layer, module in enumerate(modules[path].children()):
            module.register_forward_pre_hook(partial(lambda layer, _module, _inputs: enter(layer), layer))
    for hook in hooks:
        modules[hook].register_forward_hook(partial(lambda hook, _module, _inputs, output: leave(hook, output), hook))
    tokens = torch.zeros((1, _TOKENS), dtype=torch.int64, device="meta")
    with torch.no_grad(), suppress(LastHookReached):
        model(tokens)
    return shapes, entered


def _width(index: int, hook: str, shapes: dict[str, tuple[int, ...] | None]) -> int:
    field = f"spec.hooks[{index}].name"
    if hook not in shapes:
        raise InvalidInput("HookNotCalled", f"module {hook!r} does not run in a forward pass on text", field=field)
    shape = shapes[hook]
    if shape is None or len(shape) != 3 or shape[:2] != (1, _TOKENS):
        given = "no tensor" if shape is None else f"a tensor of shape {list(shape)}"
        raise InvalidInput(
            "HookShape",
            f"module {hook!r} gives {given} for a context of {_TOKENS} tokens, not [1, {_TOKENS}, width]; take a layer",
            field=field,
        )
    return shape[2]


def _head(model: PreTrainedModel, hooks: Sequence[str]) -> str | None:
    """Path of the output head, where it has weights of its own and no hook lies at or below it."""
    head = model.get_output_embeddings()
    if head is None or model.config.get_text_config().tie_word_embeddings:
        return None
    path = next((name for name, module in model.named_modules() if module is head), None)
    if path is None or any(hook == path or hook.startswith(f"{path}.") for hook in hooks):
        return None
    return path
