"""Checkpoints of the Transformers library: configs and weights, of the whole model or of its first layers."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sae_job.errors import InvalidInput
from sae_job.models.anatomy import Anatomy, model_class, total_layers, with_layers
from sae_job.text.code import code_refused, needs_code
from sae_job.text.hub import first_line, is_connection_trouble, is_local, resolve_commit
from sae_job.text.hub_waits import bound_hub_waits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from sae_operator.api.activation_cache import ModelSource

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Names that configs have for the longest context.
_CONTEXT_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
# Entries of a config's `auto_map` that name the class of a whole model; the first that is there.
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModel")
ATTENTION_FIELD = "spec.model.attentionImplementation"


@dataclass(frozen=True)
class Checkpoint:
    """A model that is described but not loaded.

    Attributes:
        source: as the spec gives it.
        commit: on the Hub; None for a folder.
        config: with what the spec sets.
        cls: class of the whole model.
        attention: the attention kernel; the model's default when None.
    """

    source: ModelSource
    commit: str | None
    config: PreTrainedConfig
    cls: type[PreTrainedModel]
    attention: str | None

    @property
    def context_limit(self) -> int | None:
        """Longest context that the model was made for; None when it has no limit."""
        text = self.config.get_text_config()
        limits = [getattr(text, name, None) for name in _CONTEXT_LIMITS]
        return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)

    def load(self, device: torch.device) -> nn.Module:
        """The model with its weights, in evaluation mode: on `device`, or spread over all where the spec says so.

        Raises:
            InvalidInput: weights that cannot be read or are not complete; an attention kernel that is not there.
        """
        from safetensors import SafetensorError
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        # Otherwise a repository without safetensors makes Transformers ask a public bot to convert it, in the
        # background.
        os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
        source, attention = self.source, self.attention
        spread = source.device_map == "auto"
        options: dict[str, Any] = {"device_map": "auto"} if spread else {}
        if attention is not None:
            options["attn_implementation"] = attention
        try:
            # With loading info the answer is a pair, which the annotations do not tell.
            answer: Any = self.cls.from_pretrained(
                source.name,
                config=self.config,
                revision=self.commit or "main",
                dtype=DTYPES[source.dtype],
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
                **options,
            )
        except ImportError as error:
            raise _attention_missing(attention, first_line(error)) from error
        except (OSError, ValueError, SafetensorError) as error:
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
        model = model.eval().requires_grad_(False)
        return model if spread else model.to(device)

    def shortened(self, anatomy: Anatomy, *, keep_head: bool = False) -> Checkpoint:
        """The model up to the last hook, which loads without remarks on the weights that it leaves."""
        cls, config = self.cls, self.config
        layers = anatomy.layers
        shorter = config if layers is None or layers == total_layers(config) else with_layers(config, layers)
        # Checkpoints may lack the outermost name (`transformer.h.0` is saved as `h.0`).
        left_out = [rf"(^|\.){re.escape(path.split('.', 1)[-1])}\.\d+\." for path in anatomy.layer_lists]
        head = None if keep_head else anatomy.unused_head
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
        return replace(self, config=shorter, cls=type(cls.__name__, (cls,), namespace))


def describe(source: ModelSource, revision: str | None, *, attention: str | None) -> Checkpoint:
    """Look a model up, without its weights.

    Args:
        revision: commit on the Hub; what the source's own revision stands for when None.
        attention: as in `Checkpoint`.

    Raises:
        InvalidInput: no such model, or a library that the spec asks for is not installed.
    """
    _check_libraries(source)
    commit = revision if revision is not None else _resolve(source)
    config = _read_config(source, commit)
    cls = _class_of(source, config, commit)
    _check_attention(source, cls)
    return Checkpoint(source, commit, config, cls, attention)


def _resolve(source: ModelSource) -> str | None:
    return resolve_commit(
        source.name,
        source.revision,
        kind="model",
        name_field="spec.model.name",
        revision_field="spec.model.revision",
    )


def _read_config(source: ModelSource, commit: str | None) -> PreTrainedConfig:
    from transformers import AutoConfig

    if not is_local(source.name):
        bound_hub_waits()
    try:
        config = AutoConfig.from_pretrained(
            source.name, revision=commit or "main", trust_remote_code=source.trust_remote_code
        )
    except (ImportError, SyntaxError, AttributeError) as error:
        raise _code_unusable(source, error) from error
    except (OSError, ValueError, KeyError) as error:
        if not is_local(source.name) and is_connection_trouble(error):
            raise
        if needs_code(error):
            raise code_refused(source.name, "spec.model.trustRemoteCode") from error
        raise InvalidInput(
            "ModelUnreadable",
            f"{source.name!r} has no config of a model that Transformers knows: {first_line(error)}",
            field="spec.model.name",
        ) from error
    # Keys and values of earlier positions are of no use to a single pass.
    config.use_cache = False
    return config


def _class_of(source: ModelSource, config: PreTrainedConfig, commit: str | None) -> type[PreTrainedModel]:
    """The class of the whole model: one that its repository brings, where it does and that is trusted.

    Raises:
        InvalidInput: it brings one that is needed and is not trusted, or cannot be used.
    """
    brought: Any = getattr(config, "auto_map", None)
    if not isinstance(brought, dict):
        return model_class(config)
    reference = next((brought[name] for name in _AUTO_CLASSES if brought.get(name)), None)
    if reference is None:
        return model_class(config)
    if not source.trust_remote_code:
        try:
            return model_class(config)
        except KeyError:
            raise code_refused(source.name, "spec.model.trustRemoteCode") from None
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        found: Any = get_class_from_dynamic_module(reference, source.name, revision=commit or "main")
    except Exception as error:
        # It runs when it is imported: it may raise anything.
        if not is_local(source.name) and is_connection_trouble(error):
            raise
        raise _code_unusable(source, error) from error
    return found


def _code_unusable(source: ModelSource, error: Exception) -> InvalidInput:
    return InvalidInput(
        "ModelCodeUnusable",
        f"the code that {source.name!r} brings cannot be used here: {first_line(error)}",
        field="spec.model.name",
    )


def _check_libraries(source: ModelSource) -> None:
    if source.device_map == "auto" and importlib.util.find_spec("accelerate") is None:
        raise InvalidInput(
            "PackageMissing",
            "deviceMap auto needs the package accelerate: pip install accelerate, or set it to single",
            field="spec.model.deviceMap",
        )


def _check_attention(source: ModelSource, cls: type[PreTrainedModel]) -> None:
    """Raises InvalidInput when the kernel that a spec names is not for this model, number format or machine."""
    chosen = source.attention_implementation
    if chosen is None:
        return
    support = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
    support["flex_attention"] = "_supports_flex_attn"
    if chosen in support and not getattr(cls, support[chosen], True):
        raise InvalidInput(
            "AttentionUnsupported", f"{cls.__name__} has no {chosen}; leave it empty", field=ATTENTION_FIELD
        )
    if chosen != "flash_attention_2":
        return
    if importlib.util.find_spec("flash_attn") is None:
        raise _attention_missing(chosen, "the package flash_attn is not installed")
    if source.dtype == "float32" and not source.autocast:
        raise InvalidInput(
            "AttentionUnsupported",
            "flash_attention_2 computes in bfloat16 or float16 alone; change dtype, or set autocast",
            field=ATTENTION_FIELD,
        )


def _attention_missing(chosen: str | None, reason: str) -> InvalidInput:
    return InvalidInput(
        "AttentionMissing",
        f"{chosen} cannot be used here: {reason}; choose sdpa, or leave it empty",
        field=ATTENTION_FIELD,
    )
