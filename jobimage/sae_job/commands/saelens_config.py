"""Configurations of SAELens 5 as manifests: every key is carried over, or it is told why not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_job.commands.saelens_keys import DEFAULTS, HUB_NAMES, LENS_ONLY, RENAMED, WITHOUT_EFFECT
from sae_job.commands.saelens_values import checked
from sae_job.errors import InvalidInput
from sae_operator.api.base import API_VERSION, MAX_NAME_LENGTH

# What SAELens clips the norm of the gradient to.
CLIP_NORM = 1.0
# `name`s in a manifest.
_NOT_IN_A_NAME = re.compile(r"[^a-z0-9]+")


@dataclass
class Conversion:
    """A manifest, and what it does not say.

    Attributes:
        manifest: a `SAETrainingJob`.
        notes: `key: what became of it`, for keys that were not carried over as they are.
    """

    manifest: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Places:
    """Where a converted job reads and writes, which a configuration does not tell.

    Attributes:
        storage: URI below which its cache lies.
        output: URI of its output.
    """

    storage: str
    output: str


def convert(config: Mapping[str, Any], *, name: str | None, places: Places) -> Conversion:
    """The manifest of a training configuration of SAELens 5.

    Args:
        config: the configuration, as `cfg.json` of a checkpoint or a script's keyword arguments tell it.
        name: name of the resource; made of model and hook when None.

    Raises:
        InvalidInput: a key is not one of SAELens 5's, or the configuration is one that it refuses.
    """
    values = _complete(config)
    notes = [f"{key}: {reason}" for key, reason in WITHOUT_EFFECT.items() if reason and _was_set(config.get(key), key)]
    steps = _Steps.of(values)
    spec: dict[str, Any] = {"activations": _activations(values, steps, places, notes)}
    spec["saes"] = [_sae(values, notes)]
    spec["normalization"] = _one_of(
        values,
        "normalize_activations",
        {mode: mode for mode in ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")},
        none="none",
    )
    spec["training"] = _training(values, steps, notes)
    spec["evaluation"] = {"everyTokens": steps.evaluation_tokens, "heldOutTokens": steps.held_out}
    if steps.held_out > 0:
        spec["evaluation"] |= {
            "modelEveryTokens": steps.evaluation_tokens,
            "metrics": ["explained_variance", "l0", "mse", "dead_fraction", "ce_loss_score"],
        }
    if (count := values["n_checkpoints"]) > 0:
        spec["checkpoints"] = {"everyTokens": max(1, steps.tokens // (count + 1)), "keep": count}
        notes.append("n_checkpoints: checkpoints are for resuming; they are removed when the job has succeeded")
    spec["output"] = {"uri": places.output}
    if values["log_to_wandb"]:
        entity = values["wandb_entity"]
        spec["wandb"] = {"project": values["wandb_project"]} | ({} if entity is None else {"entity": entity})
    if str(values["device"]).startswith("cuda"):
        spec["run"] = {"resources": {"limits": {"nvidia.com/gpu": 1}}}
    manifest = {
        "apiVersion": API_VERSION,
        "kind": "SAETrainingJob",
        "metadata": {"name": name or resource_name(f"{values['model_name']}-{values['hook_name']}")},
        "spec": spec,
    }
    return Conversion(manifest, notes)


def resource_name(text: str) -> str:
    """The nearest name that a resource may have."""
    return _NOT_IN_A_NAME.sub("-", text.lower()).strip("-")[:MAX_NAME_LENGTH].strip("-")


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration under today's names, with defaults.

    Raises:
        InvalidInput: a key is unknown, or its value of another type.
    """
    if isinstance(config.get("sae"), Mapping):
        raise InvalidInput(
            "ConfigurationUnknown",
            "this is a configuration of SAELens 6 (settings of the SAE are nested in `sae`); only those of SAELens 5 "
            "can be converted",
        )
    values = dict(DEFAULTS)
    for key, value in config.items():
        known = RENAMED.get(key, key)
        if known in DEFAULTS:
            values[known] = checked(known, value)
        elif known not in WITHOUT_EFFECT:
            near = difflib.get_close_matches(key, [*DEFAULTS, *RENAMED, *WITHOUT_EFFECT], n=1)
            hint = f"did you mean {near[0]}?" if near else "SAELens 5 has no such key; remove it"
            raise InvalidInput("ConfigurationUnknown", f"unknown key: {hint}", field=key)
    return values


def _was_set(value: Any, key: str) -> bool:
    return value is not None and value is not False and not (key == "verbose" and value is True)


@dataclass(frozen=True)
class _Steps:
    """Lengths in tokens, which a configuration of SAELens tells in steps and batches."""

    batch: int
    tokens: int
    held_out: int
    evaluation_tokens: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> _Steps:
        batch = values["train_batch_size_tokens"]
        prompts = values["eval_batch_size_prompts"] or values["store_batch_size_prompts"]
        tokens = values["training_tokens"]
        # Evaluated on fresh text there, on held-out rows here: as many of them, but no more than a tenth.
        held_out = min(values["n_eval_batches"] * prompts * values["context_size"], max(1, tokens // 10))
        every = values["wandb_log_frequency"] * values["eval_every_n_wandb_logs"] * batch
        return cls(batch=batch, tokens=tokens, held_out=held_out, evaluation_tokens=every)


def _one_of(values: Mapping[str, Any], key: str, known: Mapping[str, str], *, none: str | None = None) -> str:
    value = values[key]
    if value is None and none is not None:
        return none
    if not isinstance(value, str) or value not in known:
        raise InvalidInput("ConfigurationInvalid", f"{value!r} is none of {', '.join(known)}", field=key)
    return known[value]


def _activations(values: Mapping[str, Any], steps: _Steps, places: Places, notes: list[str]) -> dict[str, Any]:
    if values["use_cached_activations"]:
        path = values["cached_activations_path"]
        if path is None:
            raise InvalidInput(
                "ConfigurationInvalid",
                "name the folder of the cached activations, which use_cached_activations needs",
                field="cached_activations_path",
            )
        notes.append(
            "cached_activations_path: `sae-job cache import` turns a data set of SAELens into a cache; put its URI here"
        )
        return {"uri": path if "://" in str(path) else f"file://{path}"}
    hook: dict[str, Any] = {"name": values["hook_name"]}
    if values["hook_head_index"] is not None:
        hook["headIndex"] = values["hook_head_index"]
    formats = ("float32", "bfloat16", "float16")
    storage_dtype = _one_of(values, "dtype", {f"{prefix}{name}": name for prefix in ("", "torch.") for name in formats})
    if values["dataset_trust_remote_code"]:
        notes.append("dataset_trust_remote_code: code of data sets is never run; name one in a plain format")
    if not values["dataset_path"]:
        raise InvalidInput("ConfigurationInvalid", "name the data set", field="dataset_path")
    if storage_dtype == "float32":
        notes.append("dtype: storage.dtype float32 is kept; bfloat16 takes half the bytes and trains as well")
    return {
        "cache": {
            "model": _model(values, notes),
            "dataset": {"path": values["dataset_path"]} | ({} if values["streaming"] else {"streaming": False}),
            "hooks": [hook],
            "contextSize": values["context_size"],
            "tokens": steps.tokens + steps.held_out,
            "sampling": _sampling(values, notes),
            "storage": {"uri": places.storage, "dtype": storage_dtype},
        }
    }


def _model(values: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    loaders = {"HookedTransformer": "TransformerLens", "AutoModelForCausalLM": "HuggingFace"}
    if values["model_class_name"] == "HookedMamba":
        loaders["HookedMamba"] = "HuggingFace"
        notes.append(
            "model_class_name: Mamba is loaded by Transformers, where hooks are paths of modules: hook_ssm_input is "
            "backbone.layers.N.mixer.x_proj.input"
        )
    model: dict[str, Any] = {
        "name": _hub_name(values["model_name"], notes),
        "loader": _one_of(values, "model_class_name", loaders),
        "dtype": "float32",
        "batchSize": values["store_batch_size_prompts"],
    }
    options = dict(values["model_from_pretrained_kwargs"] or {})
    processing = {
        "fold_ln": "foldLayerNorm",
        "center_writing_weights": "centerWritingWeights",
        "center_unembed": "centerUnembed",
        "fold_value_biases": "foldValueBiases",
    }
    asked = {ours: True for theirs, ours in processing.items() if options.pop(theirs, False)}
    if asked:
        model["processing"] = asked
    for key in ("dtype", "torch_dtype"):
        if key in options:
            model["dtype"] = str(options.pop(key)).removeprefix("torch.")
    if options.pop("revision", None) is not None:
        model["revision"] = dict(values["model_from_pretrained_kwargs"])["revision"]
    if options.pop("n_devices", 1) > 1:
        model["deviceMap"] = "auto"
    if options.pop("trust_remote_code", False):
        model["trustRemoteCode"] = True
    notes.extend(f"model_from_pretrained_kwargs.{key}: there is no such option" for key in options)
    notes.extend(f"model_kwargs.{key}: there is no such option" for key in values["model_kwargs"] or {})
    for theirs, ours in (("autocast_lm", "autocast"), ("compile_llm", "compile")):
        if values[theirs]:
            model[ours] = True
    if model.get("compile") and model["loader"] == "TransformerLens":
        del model["compile"]
        notes.append("compile_llm: models that TransformerLens shows are not compiled")
    return model


def _hub_name(name: str, notes: list[str]) -> str:
    """The name by which the Hub knows a model."""
    if name.startswith(LENS_ONLY):
        notes.append(
            f"model_name: the checkpoint of {name} is in a format of TransformerLens alone, which cannot be loaded; "
            "cache its activations with SAELens and take them over by `sae-job cache import`, or name another model"
        )
    return HUB_NAMES.get(name, name)


def _sampling(values: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    excluded = values["exclude_special_tokens"]
    sampling: dict[str, Any] = {
        "prependBos": values["prepend_bos"],
        "excludeSpecialTokens": excluded is True,
        # SAELens has no such filter.
        "maxNormRatio": 0,
    }
    notes.append("(attention sinks): kept, as SAELens does; remove sampling.maxNormRatio to drop them, which is better")
    if isinstance(excluded, list):
        sampling["excludeTokenIds"] = excluded
    positions = values["seqpos_slice"]
    if positions != (None,):
        # As Python's slice: one number is the stop.
        start, stop, step = (*((None, *positions) if len(positions) == 1 else positions), None, None)[:3]
        named = {"start": start, "stop": stop, "step": step}
        sampling["positions"] = {key: value for key, value in named.items() if value is not None}
    return sampling


def _architecture(values: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    kind = _one_of(values, "architecture", {name: name for name in ("standard", "gated", "jumprelu", "topk")})
    activation = values["activation_fn"] or ("topk" if kind == "topk" else "relu")
    coefficient, warm_up = values["l1_coefficient"], values["l1_warm_up_steps"]
    noise = {"noiseScale": values["noise_scale"]} if values["noise_scale"] else {}
    if kind == "topk" or activation == "topk":
        k = (values["activation_fn_kwargs"] or {}).get("k", 100)
        if kind not in ("topk", "standard"):
            raise InvalidInput("ConfigurationInvalid", f"topk is not for architecture {kind}", field="activation_fn")
        # A standard SAE with this activation function has no auxiliary loss.
        auxiliary = {"auxKForm": "saelens"} if kind == "topk" else {"auxKCoefficient": 0}
        return {"type": "topk", "k": k, **auxiliary, **noise}
    if activation != "relu" and (kind, activation) != ("standard", "tanh-relu"):
        raise InvalidInput(
            "ConfigurationInvalid", f"{activation!r} is not for architecture {kind}", field="activation_fn"
        )
    if kind == "jumprelu":
        notes.append(
            "jumprelu_bandwidth, jumprelu_init_threshold: SAELens trains the thresholds' logarithm, this trains "
            "themselves, which move further with the defaults; leave both out"
        )
        return {
            "type": kind,
            "l0Coefficient": coefficient,
            "l0WarmUpSteps": warm_up,
            "bandwidth": values["jumprelu_bandwidth"],
            "initialThreshold": values["jumprelu_init_threshold"],
            **noise,
        }
    penalty = {"l1Coefficient": coefficient, "l1WarmUpSteps": warm_up}
    if kind == "gated":
        if noise:
            notes.append("noise_scale: SAELens has no noise for gated SAEs, whatever it is set to")
        return {"type": kind, **penalty}
    options: dict[str, Any] = {"scaleSparsityPenaltyByDecoderNorm": values["scale_sparsity_penalty_by_decoder_norm"]}
    if values["lp_norm"] != 1:
        options["lpNorm"] = values["lp_norm"]
    if activation != "relu":
        options["activation"] = activation
    if values["use_ghost_grads"]:
        options["ghostGradients"] = True
    return {"type": kind, **penalty, **options, **noise}


def _sae(values: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    if values["d_sae"] is not None:
        # cfg.json of a checkpoint tells both.
        size = {"dSae": values["d_sae"]}
    else:
        size = {"expansionFactor": values["expansion_factor"] or 4}
    decoder = "kaiming_uniform"
    if values["decoder_orthogonal_init"]:
        decoder = "orthogonal"
    elif values["decoder_heuristic_init"]:
        decoder = "heuristic"
        notes.append("decoder_heuristic_init: directions are uniform over all orthants; SAELens's lie in one")
    sae: dict[str, Any] = {
        "name": resource_name(values["run_name"] or values["architecture"]),
        "architecture": _architecture(values, notes),
        **size,
        "applyBDecToInput": values["apply_b_dec_to_input"],
        "normalizeDecoder": values["normalize_sae_decoder"],
        "initialization": {
            "decoder": decoder,
            "encoder": "transpose" if values["init_encoder_as_decoder_transpose"] else "kaiming_uniform",
            "decoderBias": _one_of(
                values, "b_dec_init_method", {name: name for name in ("geometric_median", "mean", "zeros")}
            ),
        },
    }
    dtype = str(values["dtype"]).removeprefix("torch.")
    if dtype != "float32":
        sae["dtype"] = dtype
        notes.append("dtype: training keeps weights in float32; what is saved has this format")
    if values["from_pretrained_path"] is not None:
        sae["startFrom"] = {"uri": f"file://{values['from_pretrained_path']}"}
    return sae


def _training(values: Mapping[str, Any], steps: _Steps, notes: list[str]) -> dict[str, Any]:
    training: dict[str, Any] = {
        "tokens": steps.tokens,
        "batchSize": steps.batch,
        "learningRate": values["lr"],
        "learningRateSchedule": _one_of(
            {"lr_scheduler_name": str(values["lr_scheduler_name"]).lower()},
            "lr_scheduler_name",
            {name: name for name in ("constant", "cosineannealing", "cosineannealingwarmrestarts")},
        ),
        "warmUpSteps": values["lr_warm_up_steps"],
        "decaySteps": values["lr_decay_steps"],
        "adamBeta1": values["adam_beta1"],
        "adamBeta2": values["adam_beta2"],
        "gradientClipNorm": CLIP_NORM,
        "deadAfterTokens": values["dead_feature_window"] * steps.batch,
        "logEverySteps": values["wandb_log_frequency"],
    }
    if values["lr_end"] is not None:
        training["learningRateEnd"] = values["lr_end"]
    if values["n_restart_cycles"] != 1:
        training["restartCycles"] = values["n_restart_cycles"]
    if values["mse_loss_normalization"] not in (None, "None"):
        training["mseLossNormalization"] = _one_of(values, "mse_loss_normalization", {"dense_batch": "dense_batch"})
    if values["autocast"]:
        training["precision"] = "bfloat16"
    if values["compile_sae"]:
        training["compile"] = True
    if values["finetuning_method"] is not None and values["finetuning_tokens"] > 0:
        training["finetuning"] = {
            "method": _one_of(
                values, "finetuning_method", {name: name for name in ("scale", "decoder", "unrotated_decoder")}
            ),
            "tokens": values["finetuning_tokens"],
        }
        notes.append("finetuning_method: this phase trains on the reconstruction alone, with a fresh optimiser")
    if values["n_batches_in_buffer"] != DEFAULTS["n_batches_in_buffer"]:
        notes.append("n_batches_in_buffer: rows are mixed over as many shards as 2 GiB hold")
    return training
