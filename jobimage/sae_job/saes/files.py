"""The folder of a saved SAE: cfg.json, sae_weights.safetensors and sparsity.safetensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.saes.config import DTYPES, Layout, SAEConfig
from sae_job.saes.encoders import ENCODERS
from sae_job.storage.base import ObjectNotFound, ObjectStore

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SPARSITY_FILE = "sparsity.safetensors"
FACTOR = "finetuning_scaling_factor"
# The name under which SAELens 5 looks for the factor, though it writes the other.
_FACTOR_IN_FILES = "scaling_factor"


def write(
    store: ObjectStore,
    prefix: str,
    config: SAEConfig,
    tensors: Mapping[str, Tensor],
    *,
    log_sparsity: Tensor | None,
    layout: Layout,
) -> None:
    """Write the folder, the weights last; see `SAE.save`."""
    config, tensors = _for_layout(config, tensors, config.layout(layout))
    cfg = json.dumps(config.to_dict(layout), indent=1).encode()
    dtype = DTYPES[config.dtype]
    weights = save_tensors({name: tensor.to(dtype).cpu().contiguous() for name, tensor in tensors.items()})
    folder = _folder(prefix)
    if log_sparsity is not None:
        sparsity = log_sparsity.to(torch.float32).cpu().contiguous()
        store.put(f"{folder}{SPARSITY_FILE}", save_tensors({"sparsity": sparsity}))
    store.put(f"{folder}{CONFIG_FILE}", cfg)
    store.put(f"{folder}{WEIGHTS_FILE}", weights)


def read(store: ObjectStore, prefix: str) -> tuple[SAEConfig, dict[str, Tensor]]:
    """The configuration, and the tensors as they are stored.

    Raises:
        InvalidInput: a file is missing or damaged, or the SAE is not one that can be loaded.
    """
    folder = _folder(prefix)
    where = f"{store.uri}/{folder}"
    config = _parse(_get(store, folder, CONFIG_FILE), where)
    try:
        tensors = load_tensors(_get(store, folder, WEIGHTS_FILE))
    except SafetensorError as error:
        raise InvalidInput("SaeInvalid", f"{where}{WEIGHTS_FILE} is damaged: {error}") from error
    try:
        return SAEConfig.from_dict(config), tensors
    except InvalidInput as error:
        raise InvalidInput(error.reason, f"{where}: {error.message}") from error


def fitting(config: SAEConfig, tensors: Mapping[str, Tensor]) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Stored tensors under the names that an SAE gives them, and the configuration that goes with them.

    A scaling factor is taken under either of its names, and left out where it is all ones.

    Raises:
        InvalidInput: they are not the tensors of the configuration.
    """
    tensors = dict(tensors)
    for name in (FACTOR, _FACTOR_IN_FILES):
        if (factor := tensors.pop(name, None)) is not None and not bool((factor == 1).all()):
            if not config.finetuning_scaling_factor:
                raise InvalidInput("SaeInvalid", f"{name} is there, but cfg.json has {FACTOR} off")
            tensors[FACTOR] = factor
    config = dataclasses.replace(config, finetuning_scaling_factor=FACTOR in tensors)
    _check_shapes(config, tensors)
    return config, tensors


def shapes_of(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an SAE's tensors."""
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (config.d_in, config.d_sae),
        **dict.fromkeys(ENCODERS[config.architecture].parameters, (config.d_sae,)),
        "W_dec": (config.d_sae, config.width_out),
        "b_dec": (config.width_out,),
    }
    if config.skip_connection:
        shapes["W_skip"] = (config.width_out, config.d_in)
    if config.finetuning_scaling_factor:
        shapes[FACTOR] = (config.d_sae,)
    return shapes


def _for_layout(
    config: SAEConfig, tensors: Mapping[str, Tensor], layout: Layout
) -> tuple[SAEConfig, dict[str, Tensor]]:
    """What goes into the files: SAELens 6 has no factor of fine-tuning, and SAELens 5 none in gated SAEs; there it
    goes into the decoder, which leaves activations and reconstructions as they are."""
    tensors = dict(tensors)
    if (factor := tensors.pop(FACTOR, None)) is not None:
        if layout == "saelens6" or config.architecture == "gated":
            tensors["W_dec"] = tensors["W_dec"] * factor.unsqueeze(1)
            config = dataclasses.replace(config, finetuning_scaling_factor=False)
        else:
            tensors[_FACTOR_IN_FILES] = factor
    return config, tensors


def _check_shapes(config: SAEConfig, tensors: Mapping[str, Tensor]) -> None:
    wanted = shapes_of(config)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    faults = [f"{name} is not there" for name in wanted if name not in found]
    faults += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    faults += [f"{name} is not one of them" for name in found if name not in wanted]
    if faults:
        raise InvalidInput(
            "SaeInvalid", f"tensors are not those of cfg.json's {config.architecture} SAE: {'; '.join(faults)}"
        )


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        config = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput("SaeInvalid", f"{where}{CONFIG_FILE} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise InvalidInput("SaeInvalid", f"{where}{CONFIG_FILE} is damaged: it holds no object")
    return config


def _get(store: ObjectStore, folder: str, name: str) -> bytes:
    try:
        return store.get(f"{folder}{name}")
    except ObjectNotFound as error:
        others = (CONFIG_FILE, WEIGHTS_FILE)
        there = [other for other in others if store.head(f"{folder}{other}") is not None]
        message = f"{store.uri}/{folder} holds no SAE: {name} is not there"
        message += f", though {there[0]} is" if there else f"; an SAE's folder holds {' and '.join(others)}"
        raise InvalidInput("SaeNotFound", message) from error


def _folder(prefix: str) -> str:
    return f"{prefix.rstrip('/')}/" if prefix else ""
