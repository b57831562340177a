"""Models of the Transformers library: hook names are dotted module paths, such as `model.layers.8`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sae_job.errors import InvalidInput
from sae_job.models.anatomy import Anatomy, build_without_weights, examine, model_class, total_layers, with_layers
from sae_job.models.facts import ModelFacts
from sae_job.models.full import FullModel
from sae_job.models.hooked import HookedModel
from sae_job.text.hub import first_line, is_connection_trouble, is_local, resolve_commit

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from sae_operator.api.activation_cache import ModelSource

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Names that configs have for the longest context.
_CONTEXT_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")


def inspect(source: ModelSource, hooks: Sequence[str], *, revision: str | None) -> ModelFacts:
    """Facts of a model from its config alone; see `models.load.inspect_model`."""
    commit = _commit(source, revision)
    config = _config(source, commit)
    cls = model_class(config)
    anatomy = examine(cls, config, hooks)
    item = torch.empty((), dtype=DTYPES[source.dtype]).element_size()
    truncated_class, truncated_config = _truncated(cls, config, anatomy)
    whole = build_without_weights(cls, config)
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in _CONTEXT_LIMITS]
    return ModelFacts(
        name=source.name,
        revision=commit,
        d_in=anatomy.d_in,
        context_limit=next((limit for limit in limits if isinstance(limit, int) and limit > 0), None),
        vocabulary=text.vocab_size,
        parameter_bytes=_parameters(build_without_weights(truncated_class, truncated_config)) * item,
        total_parameter_bytes=_parameters(whole) * item,
        predicts_tokens=whole.get_output_embeddings() is not None,
        layers=anatomy.layers,
        total_layers=total_layers(config),
    )


def load_hooked(
    source: ModelSource, hooks: Sequence[str], *, device: torch.device, revision: str | None
) -> HookedModel:
    """A model of only the layers up to the last hook, without its head; see `models.load.load_hooked_model`."""
    commit = _commit(source, revision)
    config = _config(source, commit)
    cls = model_class(config)
    anatomy = examine(cls, config, hooks)
    truncated_class, truncated_config = _truncated(cls, config, anatomy)
    model = _load(truncated_class, source, commit, truncated_config)
    logger.info("loaded %s of %s layers of %s", anatomy.layers, total_layers(config), source.name)
    return HookedModel(model.to(device), hooks, device=device)


def load_full(source: ModelSource, *, device: torch.device, revision: str | None) -> FullModel:
    """The whole model with its head; see `models.load.load_full_model`."""
    commit = _commit(source, revision)
    config = _config(source, commit)
    cls = model_class(config)
    if build_without_weights(cls, config).get_output_embeddings() is None:
        raise InvalidInput(
            "NoLanguageModelHead",
            f"{source.name!r} predicts no tokens ({cls.__name__}); leave ce_loss_score out",
            field="spec.evaluation.metrics",
        )
    return FullModel(_load(cls, source, commit, config).to(device), device=device)


def _commit(source: ModelSource, revision: str | None) -> str | None:
    if revision is not None:
        return revision
    return resolve_commit(
        source.name,
        source.revision,
        kind="model",
        name_field="spec.model.name",
        revision_field="spec.model.revision",
    )


def _config(source: ModelSource, commit: str | None) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.name, revision=commit or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if not is_local(source.name) and is_connection_trouble(error):
            raise
        raise InvalidInput(
            "ModelUnreadable",
            f"{source.name!r} has no config of a model that Transformers knows: {first_line(error)}",
            field="spec.model.name",
        ) from error
    # Keys and values of earlier positions are of no use to a single pass.
    config.use_cache = False
    return config


def _truncated(
    cls: type[PreTrainedModel], config: PreTrainedConfig, anatomy: Anatomy
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Class and config of the model up to the last hook, which loads without remarks on the weights that it leaves."""
    total = total_layers(config)
    layers = anatomy.layers
    shorter = config if layers is None or layers == total else with_layers(config, layers)
    # Checkpoints may lack the outermost name (`transformer.h.0` is saved as `h.0`).
    left_out = [rf"(^|\.){re.escape(path.split('.', 1)[-1])}\.\d+\." for path in anatomy.layer_lists]
    head = anatomy.unused_head
    if head is not None:
        left_out.append(rf"(^|\.){re.escape(head)}\.")

    def build(self: Any, config: PreTrainedConfig, *arguments: Any, **options: Any) -> None:
        cls.__init__(self, config, *arguments, **options)
        if head is not None:
            self.set_submodule(head, nn.Identity())

    namespace: dict[str, Any] = {
        "__init__": build,
        "__module__": cls.__module__,
        "_keys_to_ignore_on_load_unexpected": [*(cls._keys_to_ignore_on_load_unexpected or []), *left_out],
    }
    if head is not None:
        namespace["get_output_embeddings"] = lambda _self: None
        namespace["_tied_weights_keys"] = None
    return type(cls.__name__, (cls,), namespace), shorter


def _load(cls: type[PreTrainedModel], source: ModelSource, commit: str | None, config: PreTrainedConfig) -> nn.Module:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # Otherwise a repository without safetensors makes Transformers ask a public bot to convert it, in the background.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    try:
        # With loading info the answer is a pair, which the annotations do not tell.
        answer: Any = cls.from_pretrained(
            source.name,
            config=config,
            revision=commit or "main",
            dtype=DTYPES[source.dtype],
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        if not is_local(source.name) and is_connection_trouble(error):
            raise
        raise InvalidInput(
            "ModelUnreadable",
            f"the weights of {source.name!r} cannot be read: {first_line(error)}",
            field="spec.model.name",
        ) from error
    model, loaded = answer
    # Transformers fills what a checkpoint lacks with random numbers.
    if missing := sorted(loaded["missing_keys"]):
        raise InvalidInput(
            "WeightsMissing",
            f"{source.name!r} lacks {len(missing)} of its weights, e.g. {missing[0]}",
            field="spec.model.name",
        )
    return model.eval().requires_grad_(False)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
