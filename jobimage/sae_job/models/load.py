"""Which loader a spec names: the one place where loaders are listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from sae_job.models import huggingface, transformer_lens
from sae_job.models.facts import ModelFacts
from sae_job.models.full import FullModel
from sae_job.models.hooked import HookedModel
from sae_job.models.loader import CheckpointLoader

if TYPE_CHECKING:
    from sae_operator.api.activation_cache import ModelSource


class Loader(Protocol):
    """What loads models."""

    def inspect(self, source: ModelSource, hooks: Sequence[str], *, revision: str | None) -> ModelFacts: ...

    def load_hooked(
        self, source: ModelSource, hooks: Sequence[str], *, device: torch.device, revision: str | None
    ) -> HookedModel: ...

    def load_full(self, source: ModelSource, *, device: torch.device, revision: str | None) -> FullModel: ...


# Adding a loader is one row here and its name in the API.
LOADERS: dict[str, Loader] = {
    "HuggingFace": CheckpointLoader(huggingface),
    "TransformerLens": CheckpointLoader(transformer_lens),
}


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inspect_model(source: ModelSource, hooks: Sequence[str], *, revision: str | None = None) -> ModelFacts:
    """Facts of a model without its weights.

    Args:
        hooks: hook keys: `name`, or `name:head` for one attention head.
        revision: commit on the Hub; what the source's own revision stands for when None.

    Raises:
        InvalidInput: no such model, or a hook that it does not have (the nearest names are told).
    """
    return LOADERS[source.loader].inspect(source, hooks, revision=revision)


def load_hooked_model(
    source: ModelSource, hooks: Sequence[str], *, device: torch.device | str | None = None, revision: str | None = None
) -> HookedModel:
    """Load a model's layers up to the last hook, and nothing more.

    Args:
        hooks: hook keys, as in `inspect_model`.
        device: a GPU where there is one, when None.
        revision: as in `inspect_model`.

    Raises:
        InvalidInput: as `inspect_model`, and weights that cannot be read or are not complete.
    """
    target = default_device() if device is None else torch.device(device)
    return LOADERS[source.loader].load_hooked(source, hooks, device=target, revision=revision)


def load_full_model(
    source: ModelSource, *, device: torch.device | str | None = None, revision: str | None = None
) -> FullModel:
    """Load a whole model, for its loss with activations replaced.

    Raises:
        InvalidInput: as `load_hooked_model`, and a model that predicts no tokens.
    """
    target = default_device() if device is None else torch.device(device)
    return LOADERS[source.loader].load_full(source, device=target, revision=revision)
