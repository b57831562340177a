"""What a Transformers model is made of, found without its weights.

The model is built of pretended tensors, which have shapes and no memory, and run on a few pretended tokens. That tells
each hook's width, and in which layer the last hook lies, for any module and any architecture.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae_job.errors import InvalidInput
from sae_job.models.hook_names import HookName, nearest_names, parse_hooks
from sae_job.models.sites import LastHookReached, NoTensor, Site, first_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Contexts and tokens of the pretended pass. No model has 13 heads, so a dimension of this size is that of positions.
_SHAPE = (2, 13)


@dataclass(frozen=True)
class View:
    """A model as a library shows it.

    Attributes:
        run: its forward pass on token ids.
        sites: the place of each name.
        layer_names: names of the outputs of layers, with `{}` for the number.
    """

    run: Callable[[Tensor], Any]
    sites: Mapping[str, Site]
    layer_names: tuple[str, ...]


ViewOf = Callable[["PreTrainedModel", "PreTrainedConfig"], View]


@dataclass(frozen=True)
class Anatomy:
    """What hooks need of a model.

    Attributes:
        d_in: width of each hook's activations, by its key.
        layers: layers that must be loaded; None when the model has no list of layers.
        layer_lists: paths of the lists of layers.
        unused_head: path of an untied output head that no hook needs; None when there is none to leave out.
        forward_width: numbers per token that the modules of the widest layer give.
    """

    d_in: dict[str, int]
    layers: int | None
    layer_lists: tuple[str, ...]
    unused_head: str | None
    forward_width: int


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


def layer_lists_of(model: nn.Module, config: PreTrainedConfig) -> tuple[str, ...]:
    """Paths of the lists of layers."""
    count = total_layers(config)
    return tuple(
        path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    )


def examine(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    hooks: Sequence[str],
    view_of: ViewOf,
) -> Anatomy:
    """Find the hooks in a model.

    Args:
        hooks: hook keys.
        view_of: from a model and its config to what a library shows of it.

    Raises:
        InvalidInput: a hook is not in the model, is never reached, or gives no activations of tokens.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    parsed = parse_hooks(hooks)
    # Tensors that know they are pretended: Transformers looks into the values of all others. Number formats do not
    # change shapes, and some operators have no other pretended form.
    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(torch.bfloat16):
        model = cls(copy.deepcopy(config)).eval()
        pass_ = _PretendedPass(model, layer_lists_of(model, config))
        view = view_of(model, config)
        _check_names(parsed, view)
        try:
            pass_.run(view, parsed)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise InvalidInput(
                "ModelUnsupported",
                f"{cls.__name__} decides by the values of its tensors what it runs, so its hooks cannot be checked; "
                "take another model, or another loader",
                field="spec.model.name",
            ) from error
    return Anatomy(
        d_in={hook.key: _width(hook, pass_.shapes) for hook in parsed},
        layers=max(1, pass_.entered) if pass_.layer_lists else None,
        layer_lists=pass_.layer_lists,
        unused_head=None if pass_.head_entered else pass_.head,
        forward_width=max(pass_.widths, default=0),
    )


def count_parameters(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    view_of: ViewOf,
) -> int:
    """Numbers in a model's weights once a library shows it; weights that are tied count once."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(torch.bfloat16):
        model = cls(copy.deepcopy(config)).eval()
        view_of(model, config)
        return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class _PretendedPass:
    """A run of a model until its last hook, and what was seen on the way. Made before a library changes the model.

    Attributes:
        entered: layers that were entered.
        shapes: of each name's activation.
        head: path of an output head that has weights of its own.
        head_entered: whether it ran.
        widths: numbers per token that the modules of each layer gave.
    """

    model: PreTrainedModel
    layer_lists: tuple[str, ...]
    entered: int = 0
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    head: str | None = None
    head_entered: bool = False
    widths: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        head = self.model.get_output_embeddings()
        if head is not None and not self.model.config.get_text_config().tie_word_embeddings:
            self.head = next((name for name, module in self.model.named_modules() if module is head), None)
        for module in self.model.modules():
            if not any(True for _ in module.children()):
                module.register_forward_hook(lambda _module, _inputs, output: self._add_width(output))

    def run(self, view: View, hooks: Sequence[HookName]) -> None:
        """Run the model, with hooks at these places."""
        for path in self.layer_lists:
            for layer, module in enumerate(self.model.get_submodule(path).children()):
                module.register_forward_pre_hook(partial(lambda layer, _module, _inputs: self._enter(layer), layer))
        if self.head is not None:
            self.model.get_submodule(self.head).register_forward_pre_hook(lambda _module, _inputs: self._enter_head())
        names = {hook.name for hook in hooks}
        for name in names:
            view.sites[name].watch(partial(self._leave, name, len(names)))
        tokens = torch.zeros(_SHAPE, dtype=torch.int64)
        try:
            with torch.no_grad(), suppress(LastHookReached):
                view.run(tokens)
        except NoTensor as error:
            hook = next(hook for hook in hooks if hook.name == error.name)
            raise InvalidInput("HookShape", f"{error}; take a layer", field=hook.name_field) from error

    def _enter(self, layer: int) -> None:
        if layer + 1 > self.entered:
            self.widths.append(0)
        self.entered = max(self.entered, layer + 1)

    def _enter_head(self) -> None:
        self.head_entered = True

    def _leave(self, name: str, names: int, activation: Tensor) -> None:
        self.shapes.setdefault(name, tuple(activation.shape))
        if len(self.shapes) == names:
            raise LastHookReached

    def _add_width(self, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            self.widths[-1] += tensor.numel() // math.prod(_SHAPE)


def _check_names(hooks: Sequence[HookName], view: View) -> None:
    names = [name for name in view.sites if name]
    for hook in hooks:
        if hook.name not in view.sites:
            nearest = ", ".join(nearest_names(hook.name, names, layers=view.layer_names))
            raise InvalidInput(
                "HookNotFound", f"the model has no {hook.name!r}; nearest: {nearest}", field=hook.name_field
            )


def _width(hook: HookName, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Width of what a hook makes of an activation of this shape."""
    if hook.name not in shapes:
        raise InvalidInput(
            "HookNotCalled", f"{hook.name!r} does not run in a forward pass on text", field=hook.name_field
        )
    shape = shapes[hook.name]
    if len(shape) not in (3, 4) or shape[:2] != _SHAPE:
        raise InvalidInput(
            "HookShape",
            f"{hook.name!r} gives a tensor of shape {list(shape)} for {_SHAPE[0]} contexts of {_SHAPE[1]} tokens, not "
            "[batch, context, width] or [batch, context, heads, width]; take a layer",
            field=hook.name_field,
        )
    if hook.head is None:
        return math.prod(shape[2:])
    if len(shape) == 3:
        raise InvalidInput(
            "HookHasNoHeads",
            f"{hook.name!r} gives [batch, context, {shape[2]}], which is not split into attention heads: leave "
            "headIndex out, or take a hook that is",
            field=hook.head_field,
        )
    if hook.head >= shape[2]:
        raise InvalidInput(
            "HeadOutOfRange",
            f"{hook.name!r} has {shape[2]} heads, 0 to {shape[2] - 1}: there is no head {hook.head}",
            field=hook.head_field,
        )
    return shape[3]
