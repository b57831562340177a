"""cfg.json as SAELens up to version 5 writes it: 22 keys, beside each other.

SAELens 5 leaves out, without a word, keys that it does not know: what such a file means does not depend on them, and
checkpoints hold a whole run's settings. So they are left out here too, but for those that only newer versions write and
that change what an SAE computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_job.errors import InvalidInput

if TYPE_CHECKING:
    from sae_job.saes.config import SAEConfig

KEYS = (
    "architecture",
    "d_in",
    "d_sae",
    "activation_fn_str",
    "activation_fn_kwargs",
    "apply_b_dec_to_input",
    "finetuning_scaling_factor",
    "context_size",
    "model_name",
    "hook_name",
    "hook_layer",
    "hook_head_index",
    "prepend_bos",
    "dataset_path",
    "dataset_trust_remote_code",
    "normalize_activations",
    "dtype",
    "device",
    "sae_lens_training_version",
    "neuronpedia_id",
    "model_from_pretrained_kwargs",
    "seqpos_slice",
)
# Names that older files use, and today's.
RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn": "activation_fn_str",
}
# What a key that an older file lacks stood for when the file was written.
DEFAULTS: dict[str, Any] = {
    "prepend_bos": True,
    "dataset_trust_remote_code": True,
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": None,
    "architecture": "standard",
    "neuronpedia_id": None,
    "normalize_activations": "none",
    "device": "cpu",
    "dataset_path": "",
    "hook_head_index": None,
    "context_size": 128,
    "model_name": "",
    "hook_name": "",
    "hook_layer": 0,
    "dtype": "float32",
}
# Keys that no version up to 5 writes, and without which the SAE would compute something else.
NEWER_KEYS = ("d_out", "k", "rescale_acts_by_decoder_norm", "reshape_activations")


def read(stored: dict[str, Any]) -> dict[str, Any]:
    """Fields of an `SAEConfig`: keys are renamed, missing ones filled in, others left out.

    Raises:
        InvalidInput: a size is missing, or the file is of two layouts at once.
    """
    newer = [key for key in NEWER_KEYS if key in stored]
    if newer:
        raise InvalidInput(
            "SaeInvalid",
            f"cfg.json has the key {newer[0]} of SAELens 6, but no metadata.sae_lens_version, by which SAELens 6 knows "
            "its own files; add it, or leave the key out",
        )
    values = DEFAULTS | {RENAMED.get(key, key): value for key, value in stored.items()}
    missing = sorted({"d_in", "d_sae"} - values.keys())
    if missing:
        raise InvalidInput("SaeInvalid", f"cfg.json has no {' and no '.join(missing)}")
    values.setdefault("activation_fn_str", "topk" if values["architecture"] == "topk" else "relu")
    if isinstance(values["normalize_activations"], bool):
        values["normalize_activations"] = "expected_average_only_in" if values["normalize_activations"] else "none"
    if values["normalize_activations"] is None:
        values["normalize_activations"] = "none"
    for key in ("activation_fn_kwargs", "model_from_pretrained_kwargs"):
        values[key] = values.get(key) or {}
    values["dtype"] = str(values["dtype"]).removeprefix("torch.")
    values["seqpos_slice"] = positions(values.get("seqpos_slice"))
    return {key: values[key] for key in KEYS}


def positions(stored: Any) -> tuple[Any, ...]:
    """`seqpos_slice` as a tuple: older files may hold its one number alone."""
    return tuple(stored) if isinstance(stored, list | tuple) else (stored,)


def write(config: SAEConfig) -> dict[str, Any]:
    """The 22 keys; of an autoencoder, since SAELens 5 knows no transcoders."""
    assert not config.is_transcoder
    return {key: getattr(config, key) for key in KEYS} | {"seqpos_slice": list(config.seqpos_slice)}
