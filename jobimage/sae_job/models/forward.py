"""A model's forward pass as a spec wants it: number formats, compilation, devices."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sae_job.errors import InvalidInput
from sae_job.models.sites import Look

COMPILE_FIELD = "spec.model.compile"


class Forward:
    """From token ids to whatever the model gives.

    Attributes:
        device: where tokens and results of hooks lie.
        compiled: whether parts of the model are compiled.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Any],
        *,
        device: torch.device,
        entrance: torch.device | None = None,
        autocast: bool = False,
        compiled: bool = False,
    ) -> None:
        """
        Args:
            run: the model.
            device: where results are wanted.
            entrance: where the model takes its tokens; `device` when None.
            autocast: run in bfloat16 where PyTorch's autocast does so.
        """
        self._run = run
        self._entrance = device if entrance is None else entrance
        self._autocast = autocast
        self.device = device
        self.compiled = compiled

    def __call__(self, tokens: Tensor) -> Any:
        """Run the model on integer tokens [batch, context].

        Raises:
            InvalidInput: the model cannot be compiled here.
        """
        tokens = tokens.to(self._entrance, torch.int64)
        with torch.autocast(self._entrance.type, dtype=torch.bfloat16, enabled=self._autocast):
            return self._run_compiled(tokens) if self.compiled else self._run(tokens)

    def outside(self, look: Look) -> Look:
        """What looks at an activation, not compiled with the model: it may raise an exception that ends the pass."""
        disabled: Any = torch.compiler.disable(look) if self.compiled else look
        return disabled

    def _run_compiled(self, tokens: Tensor) -> Any:
        import torch._dynamo
        from torch._dynamo.exc import TorchDynamoException

        try:
            # Hooks that come after a module was compiled must be seen.
            with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
                return self._run(tokens)
        except TorchDynamoException as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise InvalidInput(
                "CompileFailed", f"the model cannot be compiled here: {first}; set compile false", field=COMPILE_FIELD
            ) from error


def compile_layers(model: nn.Module, layer_lists: Sequence[str]) -> None:
    """Compile each layer of a model, or all of it where it has no list of layers.

    Layers are alike and compiled once. Hooks on a layer's output stay outside of what is compiled.

    Raises:
        InvalidInput: what torch needs for it is not installed.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    variable, usual = ("CXX", ("g++",)) if on_cpu else ("CC", ("gcc", "clang", "cc"))
    names = (chosen,) if (chosen := os.environ.get(variable)) else usual
    if not any(shutil.which(name) for name in names):
        raise InvalidInput(
            "NoCompiler",
            f"torch.compile needs a compiler ({' or '.join(names)}), and there is none here; set compile false",
            field=COMPILE_FIELD,
        )
    layers = [layer for path in layer_lists for layer in model.get_submodule(path).children()]
    for module in layers or [model]:
        module.forward = torch.compile(module.forward)


def entrance_of(model: nn.Module, device: torch.device) -> torch.device:
    """Where a model takes its tokens: the device of its first part, where it was spread over several."""
    placed: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    first = next(iter(placed.values()), "cpu")
    # What lies in the host's memory for lack of room is brought to the device when it runs.
    if str(first) in ("cpu", "disk"):
        return device
    return torch.device("cuda", first) if isinstance(first, int) else torch.device(first)
