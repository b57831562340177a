"""Whether values in SAELens 5's training configuration are of their keys' types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sae_job.commands.saelens_keys import DEFAULTS
from sae_job.errors import InvalidInput

# Of keys that are nothing by default.
_TYPES: dict[str, type] = {
    "hook_head_index": int,
    "cached_activations_path": str,
    "d_sae": int,
    "activation_fn": str,
    "activation_fn_kwargs": dict,
    "from_pretrained_path": str,
    "expansion_factor": float,
    "finetuning_method": str,
    "mse_loss_normalization": str,
    "lr_end": float,
    "eval_batch_size_prompts": int,
    "wandb_entity": str,
    "run_name": str,
    "model_kwargs": dict,
    "model_from_pretrained_kwargs": dict,
    "normalize_activations": str,
}
# Numbers that are whole by default, and need not be.
_FLOATS = ("lp_norm",)
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}


def checked(key: str, value: Any) -> Any:
    """A value of a key of `DEFAULTS`; of whole numbers an int, however they are written.

    Raises:
        InvalidInput: it is of another type.
    """
    if key == "seqpos_slice":
        return _positions(value)
    if key == "exclude_special_tokens" and isinstance(value, list):
        return [_of_type(key, item, int) for item in value]
    default = DEFAULTS[key]
    if value is None and (default is None or key == "normalize_activations"):
        return None
    kind = float if key in _FLOATS else _TYPES.get(key, type(default))
    return _of_type(key, value, kind)


def _of_type(key: str, value: Any, kind: type) -> Any:
    if kind is dict and isinstance(value, Mapping):
        return dict(value)
    if kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value) and (kind is float or value == int(value)):
            return value if kind is float else int(value)
    elif kind not in (int, float) and isinstance(value, kind):
        return value
    raise InvalidInput("ConfigurationInvalid", f"{value!r} is not {_NAMES[kind]}", field=key)


def _positions(value: Any) -> tuple[int | None, ...]:
    """Of a slice: stop, or start and stop, or these and the step."""
    parts = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not 1 <= len(parts) <= 3:
        raise InvalidInput(
            "ConfigurationInvalid", f"{value!r} is not one to three positions, as of a slice", field="seqpos_slice"
        )
    return tuple(None if part is None else _of_type("seqpos_slice", part, int) for part in parts)
