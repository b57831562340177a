"""Activations: the full model's, from no more of the model than they need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sae_job.errors import InvalidInput
from sae_job.models.facts import check_context_size
from sae_job.models.load import inspect_model, load_hooked_model
from sae_operator.api.activation_cache import ModelSource
from tests.tiny_model import CONTEXT_LIMIT, LAYERS, WIDTH, write_tiny_model

TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    torch.set_num_threads(1)
    return ModelSource(name=str(write_tiny_model(tmp_path_factory.mktemp("llama"))), dtype="float32")


def full_model(source: ModelSource) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source.name, dtype=getattr(torch, source.dtype))


def outputs_of(model: nn.Module, hooks: list[str]) -> dict[str, torch.Tensor]:
    """Outputs of modules in a whole pass, each copied when it was made."""
    seen: dict[str, torch.Tensor] = {}

    def keep(hook: str) -> Callable[..., None]:
        def see(_module: Any, _inputs: Any, output: Any) -> None:
            seen[hook] = (output[0] if isinstance(output, tuple) else output).clone()

        return see

    for hook in hooks:
        model.get_submodule(hook).register_forward_hook(keep(hook))
    with torch.no_grad():
        model(TOKENS)
    return seen


def test_facts_come_from_the_config_alone(llama: ModelSource) -> None:
    facts = inspect_model(llama, ["model.layers.1", "model.layers.0.mlp.gate_proj"])
    assert facts.d_in == {"model.layers.1": WIDTH, "model.layers.0.mlp.gate_proj": 2 * WIDTH}
    assert (facts.layers, facts.total_layers, facts.context_limit) == (2, LAYERS, CONTEXT_LIMIT)
    assert facts.revision is None
    assert facts.predicts_tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_the_full_models_bit_for_bit(llama: ModelSource, dtype: str) -> None:
    source = ModelSource.model_validate({"name": llama.name, "dtype": dtype})
    hooks = ["model.layers.1", "model.embed_tokens", "model.layers.0", "model.layers.0.self_attn"]
    activations = load_hooked_model(source, hooks, device="cpu").activations(TOKENS)
    assert list(activations) == hooks
    for hook, expected in outputs_of(full_model(source), hooks).items():
        assert activations[hook].dtype == getattr(torch, dtype)
        assert torch.equal(activations[hook], expected), hook


def test_the_output_of_a_layer_is_the_hidden_state_after_it(llama: ModelSource) -> None:
    hooked = load_hooked_model(llama, ["model.layers.1"], device="cpu")
    with torch.no_grad():
        hidden = full_model(llama)(TOKENS, output_hidden_states=True).hidden_states
    assert torch.equal(hooked.activations(TOKENS)["model.layers.1"], hidden[2])


def test_only_the_needed_layers_are_loaded(llama: ModelSource) -> None:
    whole = sum(parameter.numel() for parameter in full_model(llama).parameters())
    layer = sum(parameter.numel() for parameter in full_model(llama).get_submodule("model.layers.0").parameters())
    for needed in range(1, LAYERS + 1):
        hook = f"model.layers.{needed - 1}"
        hooked = load_hooked_model(llama, [hook], device="cpu")
        assert len(list(hooked.module.get_submodule("model.layers").children())) == needed
        assert hooked.parameter_bytes() == 4 * (whole - (LAYERS - needed) * layer)
        assert inspect_model(llama, [hook]).parameter_bytes == hooked.parameter_bytes()


def test_nothing_behind_the_last_hook_runs(llama: ModelSource) -> None:
    hooked = load_hooked_model(llama, ["model.layers.1.self_attn"], device="cpu")
    ran: list[str] = []
    for name, module in hooked.module.named_modules():
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: ran.append(name))
    hooked.activations(TOKENS)
    assert "model.layers.1.self_attn" in ran
    assert not {"model.layers.1.mlp", "model.norm", "lm_head"} & set(ran)


def test_a_pass_can_be_repeated(llama: ModelSource) -> None:
    hooked = load_hooked_model(llama, ["model.layers.0"], device="cpu")
    first, second = hooked.activations(TOKENS), hooked.activations(TOKENS)
    assert torch.equal(first["model.layers.0"], second["model.layers.0"])
    assert not first["model.layers.0"].requires_grad


def refusal(source: ModelSource, hooks: list[str]) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        inspect_model(source, hooks)
    return caught.value


@pytest.mark.parametrize("wrong", ["transformer.h.1", "blocks.1.hook_resid_post", "model.layer.1"])
def test_an_unknown_hook_is_told_with_the_nearest_names(llama: ModelSource, wrong: str) -> None:
    error = refusal(llama, ["model.layers.0", wrong])
    assert (error.reason, error.field) == ("HookNotFound", "spec.hooks[1].name")
    assert "nearest: model.layers.1," in error.message


def test_a_module_that_never_runs_is_no_hook(llama: ModelSource) -> None:
    assert refusal(llama, ["model.layers"]).reason == "HookNotCalled"


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    error = refusal(ModelSource(name=str(tmp_path)), ["model.layers.0"])
    assert (error.reason, error.field) == ("ModelUnreadable", "spec.model.name")


def test_a_path_that_does_not_exist_is_told() -> None:
    error = refusal(ModelSource(name="/nowhere/model"), ["model.layers.0"])
    assert (error.reason, error.field) == ("ModelNotFound", "spec.model.name")


def test_missing_weights_are_told_instead_of_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_tiny_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match="up_proj") as caught:
        load_hooked_model(ModelSource(name=str(tmp_path)), ["model.layers.1"], device="cpu")
    assert caught.value.reason == "WeightsMissing"


def test_damaged_weights_are_told(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        load_hooked_model(ModelSource(name=str(tmp_path)), ["model.layers.1"], device="cpu")
    assert (caught.value.reason, caught.value.field) == ("ModelUnreadable", "spec.model.name")


def test_contexts_must_fit_the_model(llama: ModelSource) -> None:
    facts = inspect_model(llama, ["model.layers.0"])
    check_context_size(facts, CONTEXT_LIMIT)
    with pytest.raises(InvalidInput, match="64") as caught:
        check_context_size(facts, CONTEXT_LIMIT + 1)
    assert (caught.value.reason, caught.value.field) == ("ContextTooLong", "spec.contextSize")
