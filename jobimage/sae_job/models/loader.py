"""Loading as every library does it that shows checkpoints of Transformers in its own way."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sae_job.errors import InvalidInput
from sae_job.models.anatomy import (
    Anatomy,
    View,
    build_without_weights,
    count_parameters,
    examine,
    layer_lists_of,
    total_layers,
)
from sae_job.models.checkpoint import DTYPES, Checkpoint, describe
from sae_job.models.facts import ModelFacts
from sae_job.models.forward import Forward, compile_layers, entrance_of
from sae_job.models.full import FullModel
from sae_job.models.hooked import HookedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from sae_operator.api.activation_cache import ModelSource

logger = logging.getLogger(__name__)


class Library(Protocol):
    """How a library shows a model.

    Attributes:
        KEEPS_HEAD: whether it cannot do without the output head.
    """

    KEEPS_HEAD: bool

    def check(self, source: ModelSource) -> str | None:
        """Raises InvalidInput when the library is not there or cannot do what the spec asks; returns the attention
        kernel to use, None for the model's default."""
        ...

    def view(self, model: PreTrainedModel, config: PreTrainedConfig, source: ModelSource, *, loaded: bool) -> View:
        """What the library shows of a model, which it may change.

        Args:
            loaded: whether the model has weights.
        """
        ...


@dataclass(frozen=True)
class CheckpointLoader:
    """Loads models for one library."""

    library: Library

    def inspect(self, source: ModelSource, hooks: Sequence[str], *, revision: str | None) -> ModelFacts:
        """Facts of a model from its config alone; see `models.load.inspect_model`."""
        checkpoint = self._describe(source, revision)
        anatomy = self._examine(checkpoint, hooks)
        config = checkpoint.config
        whole = build_without_weights(checkpoint.cls, config)
        shortened = checkpoint.shortened(anatomy, keep_head=self.library.KEEPS_HEAD)
        view = partial(self.library.view, source=source, loaded=False)
        needed = count_parameters(shortened.cls, shortened.config, view)
        text = config.get_text_config()
        if source.processing is not None and text.tie_word_embeddings:
            # Processing gives the output head weights of its own.
            needed += text.vocab_size * text.hidden_size
        item = torch.empty((), dtype=DTYPES[source.dtype]).element_size()
        return ModelFacts(
            source=source,
            name=source.name,
            revision=checkpoint.commit,
            d_in=anatomy.d_in,
            context_limit=checkpoint.context_limit,
            vocabulary=text.vocab_size,
            parameter_bytes=needed * item,
            total_parameter_bytes=sum(parameter.numel() for parameter in whole.parameters()) * item,
            predicts_tokens=whole.get_output_embeddings() is not None,
            layers=anatomy.layers,
            total_layers=total_layers(config),
            forward_width=anatomy.forward_width,
            attention_heads=getattr(text, "num_attention_heads", None) or 0,
        )

    def load_hooked(
        self, source: ModelSource, hooks: Sequence[str], *, device: torch.device, revision: str | None
    ) -> HookedModel:
        """A model of only the layers up to the last hook, without its head; see `models.load.load_hooked_model`."""
        checkpoint = self._describe(source, revision)
        anatomy = self._examine(checkpoint, hooks)
        shortened = checkpoint.shortened(anatomy, keep_head=self.library.KEEPS_HEAD)
        model, forward, view = self._load(shortened, device)
        logger.info("loaded %s of %s layers of %s", anatomy.layers, total_layers(checkpoint.config), source.name)
        return HookedModel(model, forward, view.sites, hooks)

    def load_full(self, source: ModelSource, *, device: torch.device, revision: str | None) -> FullModel:
        """The whole model with its head; see `models.load.load_full_model`."""
        checkpoint = self._describe(source, revision)
        if build_without_weights(checkpoint.cls, checkpoint.config).get_output_embeddings() is None:
            raise InvalidInput(
                "NoLanguageModelHead",
                f"{source.name!r} predicts no tokens ({checkpoint.cls.__name__}); leave ce_loss_score out",
                field="spec.evaluation.metrics",
            )
        model, forward, view = self._load(checkpoint, device)
        return FullModel(forward, view.sites, module=model)

    def _describe(self, source: ModelSource, revision: str | None) -> Checkpoint:
        return describe(source, revision, attention=self.library.check(source))

    def _examine(self, checkpoint: Checkpoint, hooks: Sequence[str]) -> Anatomy:
        view = partial(self.library.view, source=checkpoint.source, loaded=False)
        return examine(checkpoint.cls, checkpoint.config, hooks, view)

    def _load(self, checkpoint: Checkpoint, device: torch.device) -> tuple[Any, Forward, View]:
        source = checkpoint.source
        model: Any = checkpoint.load(device)
        layers = layer_lists_of(model, checkpoint.config)
        view = self.library.view(model, checkpoint.config, source, loaded=True)
        if source.compile:
            compile_layers(model, layers)
        forward = Forward(
            view.run,
            device=device,
            entrance=entrance_of(model, device),
            autocast=source.autocast,
            compiled=source.compile,
        )
        return model, forward, view
