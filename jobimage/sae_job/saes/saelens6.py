"""cfg.json as SAELens 6 writes it: what the architecture needs, and `metadata` of where the SAE came from.

A key or an architecture that is not known is refused: it may change what the SAE computes. `metadata` may hold
anything; it is kept.

SAELens 6 knows no gated or topk transcoder, and dropped the activation function tanh-relu. Those are written under the
names of `OUR_NAMES`, which SAELens refuses and this project loads.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from sae_job.errors import InvalidInput
from sae_job.saes.saelens5 import positions

if TYPE_CHECKING:
    from sae_job.saes.config import SAEConfig

# The version whose layout this is. SAELens takes a file without it, or with one below 6, for one of its older layouts.
VERSION = "6.54.12"

_Kind = tuple[str, str, str]  # architecture, activation function, and one of the next line
_AUTOENCODER, _TRANSCODER, _SKIP_TRANSCODER = "autoencoder", "transcoder", "skip_transcoder"

SAELENS_NAMES: dict[str, _Kind] = {
    "standard": ("standard", "relu", _AUTOENCODER),
    "gated": ("gated", "relu", _AUTOENCODER),
    "jumprelu": ("jumprelu", "relu", _AUTOENCODER),
    "topk": ("topk", "topk", _AUTOENCODER),
    "transcoder": ("standard", "relu", _TRANSCODER),
    "skip_transcoder": ("standard", "relu", _SKIP_TRANSCODER),
    "jumprelu_transcoder": ("jumprelu", "relu", _TRANSCODER),
    "jumprelu_skip_transcoder": ("jumprelu", "relu", _SKIP_TRANSCODER),
}
OUR_NAMES: dict[str, _Kind] = {
    "topk_transcoder": ("topk", "topk", _TRANSCODER),
    "topk_skip_transcoder": ("topk", "topk", _SKIP_TRANSCODER),
    "gated_transcoder": ("gated", "relu", _TRANSCODER),
    "gated_skip_transcoder": ("gated", "relu", _SKIP_TRANSCODER),
    "tanh_relu": ("standard", "tanh-relu", _AUTOENCODER),
    "tanh_relu_transcoder": ("standard", "tanh-relu", _TRANSCODER),
    "tanh_relu_skip_transcoder": ("standard", "tanh-relu", _SKIP_TRANSCODER),
    "tanh_relu_gated": ("gated", "tanh-relu", _AUTOENCODER),
    "tanh_relu_gated_transcoder": ("gated", "tanh-relu", _TRANSCODER),
    "tanh_relu_gated_skip_transcoder": ("gated", "tanh-relu", _SKIP_TRANSCODER),
}
NAMES = SAELENS_NAMES | OUR_NAMES

_KEYS = (
    "d_in",
    "d_sae",
    "dtype",
    "device",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
)
_TOP_K_KEYS = ("k", "rescale_acts_by_decoder_norm")
# What SAELens takes for a key that is not there.
_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "rescale_acts_by_decoder_norm": False,
}
# Entries of `metadata` that are fields of `SAEConfig`, and what stands for one that is not there.
_METADATA: dict[str, Any] = {
    "model_name": "",
    "hook_name": "",
    "hook_head_index": None,
    "hook_name_out": None,
    "hook_head_index_out": None,
    "context_size": 128,
    "prepend_bos": True,
    "dataset_path": "",
    "seqpos_slice": (None,),
    "model_from_pretrained_kwargs": {},
    "neuronpedia_id": None,
    "sae_lens_training_version": None,
    "training_architecture": None,
}
_OF_A_TARGET = ("hook_name_out", "hook_head_index_out")


def is_layout_of(stored: dict[str, Any]) -> bool:
    """Whether a cfg.json is in this layout: older ones have no `metadata`."""
    return isinstance(stored.get("metadata"), dict)


def read(stored: dict[str, Any]) -> dict[str, Any]:
    """Fields of an `SAEConfig`.

    Raises:
        InvalidInput: the architecture or a key is not known, or a key is missing.
    """
    name = stored.get("architecture")
    if name not in NAMES:
        raise InvalidInput(
            "SaeUnsupported",
            f"architecture {name!r} cannot be loaded; these can: {', '.join(NAMES)}{_advice(name)}",
        )
    architecture, activation, kind = NAMES[name]
    top_k, transcoder = activation == "topk", kind != _AUTOENCODER
    known = {*_KEYS, "architecture", "metadata", *(_TOP_K_KEYS if top_k else ()), *(("d_out",) if transcoder else ())}
    unknown = sorted(stored.keys() - known)
    if unknown:
        raise InvalidInput(
            "SaeUnsupported",
            f"cfg.json of architecture {name} has the unknown keys {', '.join(unknown)}, which may change what the SAE "
            "computes; a file of a training must be saved for inference first (save_inference_model)",
        )
    values = _DEFAULTS | ({"apply_b_dec_to_input": False} if transcoder else {}) | stored
    missing = sorted(known - values.keys())
    if missing:
        raise InvalidInput("SaeInvalid", f"cfg.json has no {' and no '.join(missing)}")
    if values["reshape_activations"] not in ("none", "hook_z"):
        raise InvalidInput(
            "SaeUnsupported",
            f"reshape_activations {values['reshape_activations']!r} cannot be loaded; these can: none, hook_z",
        )
    told = dict(stored["metadata"])
    told.pop("sae_lens_version", None)
    fields = {key: _or(told.pop(key, None), default) for key, default in _METADATA.items()}
    return {
        **{key: values[key] for key in _KEYS},
        **fields,
        "dtype": str(values["dtype"]).removeprefix("torch."),
        "seqpos_slice": positions(fields["seqpos_slice"]),
        "architecture": architecture,
        "activation_fn_str": activation,
        "activation_fn_kwargs": {"k": values["k"]} if top_k else {},
        "rescale_acts_by_decoder_norm": bool(values.get("rescale_acts_by_decoder_norm", False)) and top_k,
        "d_out": values["d_out"] if transcoder else None,
        "skip_connection": kind == _SKIP_TRANSCODER,
        "hook_layer": layer_of(fields["hook_name"]),
        "metadata": told,
    }


def write(config: SAEConfig) -> dict[str, Any]:
    """The keys of the SAE's architecture, and `metadata`."""
    kind = _AUTOENCODER
    if config.is_transcoder:
        kind = _SKIP_TRANSCODER if config.skip_connection else _TRANSCODER
    # An activation function of topk makes a standard SAE a topk one.
    architecture = "topk" if config.uses_top_k else config.architecture
    name = next(name for name, of in NAMES.items() if of == (architecture, config.activation_fn_str, kind))
    written = {key: getattr(config, key) for key in _KEYS}
    # Of one head alone, inputs have no axis of heads.
    heads = config.reshapes_heads and config.hook_head_index is None and not config.is_transcoder
    written["reshape_activations"] = "hook_z" if heads else "none"
    if config.uses_top_k:
        written |= {"k": config.k, "rescale_acts_by_decoder_norm": config.rescale_acts_by_decoder_norm}
    if config.d_out is not None:
        written["d_out"] = config.d_out
    told = {key: getattr(config, key) for key in _METADATA if config.is_transcoder or key not in _OF_A_TARGET}
    metadata = {"sae_lens_version": VERSION} | config.metadata | told | {"seqpos_slice": list(config.seqpos_slice)}
    return written | {"architecture": name, "metadata": metadata}


def _or(found: Any, default: Any) -> Any:
    """What was found; a copy of the default where there is nothing."""
    return copy(default) if found is None else found


def _advice(name: object) -> str:
    if name in ("batchtopk", "matryoshka_batchtopk"):
        return "; this one is of a training: save it for inference (save_inference_model), as jumprelu"
    return ""


def layer_of(hook_name: str) -> int:
    """The first number in a hook's path, e.g. 7 of `transformer.h.7`; 0 when there is none."""
    return next((int(part) for part in hook_name.split(".") if part.isdecimal()), 0)
