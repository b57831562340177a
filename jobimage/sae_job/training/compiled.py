"""What `training.compile` compiles: the passes over the decoder that keep its rows at unit norm.

Of a step these are what torch.compile can make faster. The rest is dense products, which are libraries' already,
selections, which it cannot fuse, and passes over blocks of rows in memory that is used again, which are written by hand
so that nothing of size batch x d_sae is ever there; traced, they would be. The passes here have one shape for the whole
training and depend on nothing but tensors, so that a training that goes on from a checkpoint runs the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

from sae_job.errors import InvalidInput

_FAILURES = (TorchDynamoException, InductorError, CppCompileError, InvalidCxxCompiler)
# More than a job's SAEs, in either phase.
_SHAPES = 64


class DecoderUpkeep(Protocol):
    """The constraint on the decoder's rows, as `TrainableSAE` has it."""

    def project_gradients(self) -> None: ...
    def after_optimizer_step(self) -> None: ...


class CompiledUpkeep:
    """The same, compiled when it is first called.

    Raises:
        InvalidInput: from its methods, where nothing can be compiled here.
    """

    def __init__(self, plain: DecoderUpkeep) -> None:
        # Each SAE of a job may have a shape of its own; beyond the limit torch goes on uncompiled, to other bits.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
        self._project = torch.compile(plain.project_gradients, dynamic=False)
        self._normalize = torch.compile(plain.after_optimizer_step, dynamic=False)

    def project_gradients(self) -> None:
        _compiling(self._project)

    def after_optimizer_step(self) -> None:
        _compiling(self._normalize)


def _compiling(function: Callable[[], None]) -> None:
    try:
        function()
    except RuntimeError as error:
        # What torch raises while it compiles; Triton looks for a C compiler when its first kernel runs.
        if not isinstance(error, _FAILURES) and "compiler" not in str(error):
            raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise InvalidInput(
            "CompilationFailed",
            f"torch.compile does not work in this pod ({lines[0] if lines else type(error).__name__}): use an image "
            "with a C compiler, or set compile: false",
            field="spec.training.compile",
        ) from error
