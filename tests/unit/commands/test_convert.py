"""`sae-job convert`: a configuration of SAELens becomes a manifest that trains the same; nothing is lost in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_job.cli import run_command_line
from sae_job.commands.saelens_config import Conversion, Places, convert, resource_name
from sae_job.commands.saelens_keys import DEFAULTS, RENAMED, WITHOUT_EFFECT
from sae_job.errors import InvalidInput
from sae_operator.api.base import MAX_NAME_LENGTH
from sae_operator.api.manifest import parse_manifests, validate_spec
from sae_operator.api.training_job import SAETrainingJobSpec

PLACES = Places(storage="s3://saes/caches", output="s3://saes/job")
# What SAELens's tutorial sets.
TUTORIAL: dict[str, Any] = {
    "model_name": "tiny-stories-1L-21M",
    "hook_name": "blocks.0.hook_mlp_out",
    "d_in": 1024,
    "expansion_factor": 16,
    "dataset_path": "apollo-research/roneneldan-TinyStories-tokenizer-gpt2",
    "context_size": 256,
    "training_tokens": 30_000 * 4096,
    "lr": 5e-5,
    "lr_decay_steps": 6000,
    "l1_coefficient": 5,
    "l1_warm_up_steps": 1500,
    "adam_beta1": 0.9,
    "apply_b_dec_to_input": False,
    "decoder_heuristic_init": True,
    "init_encoder_as_decoder_transpose": True,
    "scale_sparsity_penalty_by_decoder_norm": True,
    "normalize_sae_decoder": False,
    "b_dec_init_method": "zeros",
    "normalize_activations": "expected_average_only_in",
    "store_batch_size_prompts": 16,
    "wandb_log_frequency": 30,
    "eval_every_n_wandb_logs": 20,
}


def converted(**changes: Any) -> Conversion:
    return convert({**TUTORIAL, **changes}, name=None, places=PLACES)


def spec_of(done: Conversion) -> SAETrainingJobSpec:
    spec = validate_spec("SAETrainingJob", done.manifest["spec"])
    assert isinstance(spec, SAETrainingJobSpec), spec
    return spec


def test_the_tutorial_becomes_a_job_with_its_settings() -> None:
    done = converted()
    spec = spec_of(done)
    assert done.manifest["metadata"]["name"] == resource_name("tiny-stories-1L-21M-blocks.0.hook_mlp_out")
    cache, sae, training = spec.activations.cache, spec.saes[0], spec.training
    assert cache is not None
    assert (cache.model.name, cache.model.loader) == ("roneneldan/TinyStories-1Layer-21M", "TransformerLens")
    assert (cache.hooks[0].key, cache.context_size) == ("blocks.0.hook_mlp_out", 256)
    assert cache.sampling.prepend_bos
    assert not cache.sampling.exclude_special_tokens
    assert cache.sampling.max_norm_ratio == 0
    held_out = spec.evaluation.held_out_tokens
    assert held_out == 10 * 16 * 256  # evaluation batches x prompts x context
    assert cache.tokens == 30_000 * 4096 + held_out
    architecture = sae.architecture
    assert (architecture.type, architecture.l1_coefficient, architecture.l1_warm_up_steps) == ("standard", 5, 1500)
    assert architecture.scale_sparsity_penalty_by_decoder_norm
    assert (sae.expansion_factor, sae.d_sae, sae.subtracts_b_dec, sae.normalize_decoder) == (16, None, False, False)
    start = sae.initialization
    assert (start.decoder, start.encoder, start.decoder_bias) == ("heuristic", "transpose", "zeros")
    assert (training.tokens, training.batch_size, training.learning_rate) == (30_000 * 4096, 4096, 5e-5)
    assert (training.decay_steps, training.adam_beta1, training.gradient_clip_norm) == (6000, 0.9, 1.0)
    assert training.dead_after_tokens == 1000 * 4096
    assert spec.evaluation.every_tokens == spec.evaluation.model_every_tokens == 30 * 20 * 4096
    assert spec.normalization == "expected_average_only_in"
    assert spec.wandb is not None
    assert spec.wandb.project == DEFAULTS["wandb_project"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architecture": "topk", "activation_fn_kwargs": {"k": 32}}, {"type": "topk", "k": 32, "auxKForm": "saelens"}),
        ({"architecture": "topk"}, {"type": "topk", "k": 100, "auxKForm": "saelens"}),
        # The same selection, without an auxiliary loss.
        (
            {"activation_fn": "topk", "activation_fn_kwargs": {"k": 8}},
            {"type": "topk", "k": 8, "auxKCoefficient": 0},
        ),
        ({"architecture": "gated"}, {"type": "gated", "l1Coefficient": 5, "l1WarmUpSteps": 1500}),
        (
            {"architecture": "jumprelu"},
            {
                "type": "jumprelu",
                "l0Coefficient": 5,
                "l0WarmUpSteps": 1500,
                "bandwidth": 0.001,
                "initialThreshold": 0.001,
            },
        ),
        (
            {"scale_sparsity_penalty_by_decoder_norm": False},
            {
                "type": "standard",
                "l1Coefficient": 5,
                "l1WarmUpSteps": 1500,
                "scaleSparsityPenaltyByDecoderNorm": False,
            },
        ),
        (
            {"activation_fn": "tanh-relu", "use_ghost_grads": True, "lp_norm": 2, "noise_scale": 0.1},
            {
                "type": "standard",
                "l1Coefficient": 5,
                "l1WarmUpSteps": 1500,
                "lpNorm": 2,
                "scaleSparsityPenaltyByDecoderNorm": True,
                "activation": "tanh-relu",
                "ghostGradients": True,
                "noiseScale": 0.1,
            },
        ),
    ],
    ids=["topk", "topk default", "standard with topk", "gated", "jumprelu", "standard", "standard with all"],
)
def test_architectures(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    done = converted(**changes)
    assert done.manifest["spec"]["saes"][0]["architecture"] == expected
    spec_of(done)


@pytest.mark.parametrize(
    ("changes", "path", "expected"),
    [
        ({"seqpos_slice": [5, -5]}, "activations.cache.sampling.positions", {"start": 5, "stop": -5}),
        ({"seqpos_slice": [None, 10, 2]}, "activations.cache.sampling.positions", {"stop": 10, "step": 2}),
        ({"seqpos_slice": [7]}, "activations.cache.sampling.positions", {"stop": 7}),
        ({"exclude_special_tokens": [3, 4]}, "activations.cache.sampling.excludeTokenIds", [3, 4]),
        ({"exclude_special_tokens": True}, "activations.cache.sampling.excludeSpecialTokens", True),
        ({"hook_point": "blocks.1.attn.hook_z", "hook_point_head_index": 3}, "activations.cache.hooks.0.headIndex", 3),
        ({"streaming": False}, "activations.cache.dataset.streaming", False),
        ({"autocast_lm": True}, "activations.cache.model.autocast", True),
        (
            {"model_from_pretrained_kwargs": {"fold_ln": True, "center_writing_weights": False}},
            "activations.cache.model.processing",
            {"foldLayerNorm": True},
        ),
        ({"model_from_pretrained_kwargs": {"n_devices": 4}}, "activations.cache.model.deviceMap", "auto"),
        (
            {"model_from_pretrained_kwargs": {"trust_remote_code": True}},
            "activations.cache.model.trustRemoteCode",
            True,
        ),
        ({"dtype": "torch.bfloat16"}, "activations.cache.storage.dtype", "bfloat16"),
        ({"dtype": "bfloat16"}, "saes.0.dtype", "bfloat16"),
        ({"from_pretrained_path": "/sae"}, "saes.0.startFrom.uri", "file:///sae"),
        ({"autocast": True}, "training.precision", "bfloat16"),
        ({"compile_sae": True}, "training.compile", True),
        ({"lr_scheduler_name": "CosineAnnealing"}, "training.learningRateSchedule", "cosineannealing"),
        ({"lr_end": 1e-6}, "training.learningRateEnd", 1e-6),
        ({"mse_loss_normalization": "dense_batch"}, "training.mseLossNormalization", "dense_batch"),
        (
            {"finetuning_method": "scale", "finetuning_tokens": 4096},
            "training.finetuning",
            {"method": "scale", "tokens": 4096},
        ),
        ({"n_checkpoints": 2}, "checkpoints", {"everyTokens": 30_000 * 4096 // 3, "keep": 2}),
        ({"device": "cuda"}, "run.resources.limits", {"nvidia.com/gpu": 1}),
        (
            {"use_cached_activations": True, "cached_activations_path": "/cached"},
            "activations",
            {"uri": "file:///cached"},
        ),
    ],
)
def test_each_setting_has_its_place(changes: dict[str, Any], path: str, expected: Any) -> None:
    done = converted(**changes)
    value: Any = done.manifest["spec"]
    for part in path.split("."):
        value = value[int(part)] if part.isdecimal() else value[part]
    assert value == expected
    spec_of(done)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 42}, "seed: SAELens does not use it"),
        ({"model_name": "gelu-1l"}, "sae-job cache import"),
        ({"model_class_name": "HookedMamba"}, "model_class_name: Mamba is loaded by Transformers"),
        ({"dataset_trust_remote_code": True}, "dataset_trust_remote_code: code of data sets is never run"),
        ({"model_from_pretrained_kwargs": {"fold_ln": True, "hf_model": 1}}, "model_from_pretrained_kwargs.hf_model"),
        ({"compile_llm": True}, "compile_llm: models that TransformerLens shows are not compiled"),
    ],
)
def test_what_is_not_carried_over_is_told(changes: dict[str, Any], told: str) -> None:
    assert any(told in note for note in converted(**changes).notes)


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"l1_coeff": 5}, "l1_coeff", "did you mean l1_coefficient?"),
        ({"architecture": "topkk"}, "architecture", "none of standard, gated, jumprelu, topk"),
        ({"architecture": "jumprelu", "activation_fn": "tanh-relu"}, "activation_fn", "not for architecture jumprelu"),
        ({"lr_scheduler_name": "linear"}, "lr_scheduler_name", "none of constant"),
        ({"use_cached_activations": True}, "cached_activations_path", "name the folder"),
        ({"dataset_path": ""}, "dataset_path", "name the data set"),
        ({"sae": {"d_in": 3}}, "", "SAELens 6"),
    ],
)
def test_what_cannot_be_converted_is_refused_naming_the_key(changes: dict[str, Any], field: str, told: str) -> None:
    with pytest.raises(InvalidInput, match=told) as refused:
        converted(**changes)
    assert refused.value.field == field


def test_every_key_of_the_reference_is_known() -> None:
    known = {*DEFAULTS, *WITHOUT_EFFECT}
    assert {"hook_eval", "act_store_device", "seed", "verbose", "sae_compilation_mode"} <= known
    assert set(RENAMED.values()) <= known
    # As SAELens 5 writes it: every key, derived ones included.
    everything = {**dict.fromkeys(WITHOUT_EFFECT), **DEFAULTS, **TUTORIAL, "d_sae": 16_384, "tokens_per_buffer": 9}
    assert spec_of(convert(everything, name="job", places=PLACES)).saes[0].d_sae == 16_384


@given(st.text(max_size=40), st.sampled_from("abz09"), st.text(max_size=40))
def test_text_with_a_letter_becomes_a_name(before: str, letter: str, after: str) -> None:
    name = resource_name(before + letter + after)
    assert len(name) <= MAX_NAME_LENGTH
    assert not name.startswith("-")
    assert not name.endswith("-")


def test_the_command_prints_a_manifest_that_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cfg.json").write_text(json.dumps({**TUTORIAL, "seed": 42}))
    assert (
        run_command_line(["convert", str(tmp_path / "cfg.json"), "--name", "mine", "--output", "s3://saes/mine"]) == 0
    )
    shown = capsys.readouterr()
    (job,) = parse_manifests(shown.out, source="")
    assert (job.name, job.spec.output.uri) == ("mine", "s3://saes/mine")
    assert "# - seed: SAELens does not use it" in shown.out
    assert "seed: SAELens does not use it" in shown.err


@pytest.mark.parametrize("content", ["[1]", "{", "\xff"])
def test_a_file_that_is_no_configuration_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "cfg.json").write_text(content, encoding="latin-1")
    assert run_command_line(["convert", str(tmp_path / "cfg.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_saelens_refuses_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cfg.json").write_text(json.dumps({**TUTORIAL, "normalize_sae_decoder": True}))
    assert run_command_line(["convert", str(tmp_path / "cfg.json")]) == 2
    assert "needs normalizeDecoder: false" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("training_tokens", "1e6 ", "'1e6 ' is not a whole number"),
        ("training_tokens", None, "None is not a whole number"),
        ("context_size", 128.5, "128.5 is not a whole number"),
        ("lr", float("nan"), "nan is not a number"),
        ("model_name", 5, "5 is not a text"),
        ("prepend_bos", "no", "'no' is not true or false"),
        ("model_kwargs", [1], "[1] is not a mapping"),
        ("seqpos_slice", [], "[] is not one to three positions"),
        ("seqpos_slice", [1, 2, 3, 4], "[1, 2, 3, 4] is not one to three positions"),
        ("exclude_special_tokens", ["a"], "'a' is not a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, value: object, told: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        converted(**{key: value})
    assert (caught.value.field, caught.value.message.startswith(told)) == (key, True)


def test_without_evaluation_the_model_is_not_asked() -> None:
    """It would be, on held-out rows, and there are none."""
    evaluation = spec_of(converted(n_eval_batches=0)).evaluation
    assert evaluation.held_out_tokens == 0
    assert evaluation.model_every_tokens is None
    assert "ce_loss_score" not in evaluation.metrics


def test_whole_numbers_may_be_written_as_others() -> None:
    """As YAML reads 1e6."""
    assert spec_of(converted(training_tokens=1e6)).training.tokens == 1_000_000


@pytest.mark.parametrize("value", ["x", None, [], -1, 0, 1.5, {"a": 1}, True, [1, 2, 3, 4], float("inf")])
def test_whatever_a_value_is_it_is_converted_or_refused_by_its_key(value: object) -> None:
    for key in DEFAULTS:
        refused: list[InvalidInput] = []
        try:
            converted(**{key: value})
        except InvalidInput as error:
            refused.append(error)
        assert all(error.field for error in refused)
