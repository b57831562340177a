"""How the forward pass runs: attention kernels, autocast, compilation, spreading over devices."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from sae_job.errors import InvalidInput
from sae_job.models.facts import forward_bytes
from sae_job.models.forward import Forward, entrance_of
from sae_job.models.load import inspect_model, load_full_model, load_hooked_model
from sae_operator.api.activation_cache import ModelSource
from tests.tiny_model import write_tiny_model

TOKENS = torch.arange(24).reshape(2, 12)
HOOK = "model.layers.0"
INSIDE = "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(write_tiny_model(tmp_path_factory.mktemp("model"), layers=2))


def source_of(folder: str, **options: Any) -> ModelSource:
    return ModelSource.model_validate({"name": folder, "dtype": "float32", **options})


def activations_of(source: ModelSource, hook: str = HOOK) -> torch.Tensor:
    return load_hooked_model(source, [hook], device="cpu").activations(TOKENS)[hook]


def refusal(source: ModelSource) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        inspect_model(source, [HOOK])
    return caught.value


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_attention_kernel_is_the_one_asked_for(folder: str, kernel: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel)
    with torch.no_grad():
        hidden = model(TOKENS, output_hidden_states=True).hidden_states
    source = source_of(folder, attentionImplementation=kernel)
    hooked = load_hooked_model(source, [HOOK], device="cpu")
    assert getattr(hooked.module, "config")._attn_implementation == kernel  # noqa: B009
    assert torch.equal(hooked.activations(TOKENS)[HOOK], hidden[1])


def test_a_kernel_that_is_not_installed_is_told_before_weights_are_loaded(folder: str) -> None:
    error = refusal(source_of(folder, attentionImplementation="flash_attention_2"))
    assert (error.reason, error.field) == ("AttentionMissing", "spec.model.attentionImplementation")


def test_a_kernel_that_a_model_cannot_use_is_told(tmp_path: Any) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    error = refusal(source_of(str(tmp_path), attentionImplementation="sdpa"))
    assert (error.reason, error.field) == ("AttentionUnsupported", "spec.model.attentionImplementation")


def test_autocast_computes_in_bfloat16_and_keeps_the_weights(folder: str) -> None:
    source = source_of(folder, autocast=True)
    hooked = load_hooked_model(source, [INSIDE, HOOK], device="cpu")
    activations = hooked.activations(TOKENS)
    assert {parameter.dtype for parameter in hooked.module.parameters()} == {torch.float32}
    # A linear map gives bfloat16; the residual stream, which it is added to, stays as the weights are.
    assert (activations[INSIDE].dtype, activations[HOOK].dtype) == (torch.bfloat16, torch.float32)
    exact = activations_of(source_of(folder), INSIDE)
    assert not torch.equal(activations[INSIDE], exact)
    assert (activations[INSIDE].float() - exact).norm() < 0.02 * exact.norm()


def test_autocast_changes_the_loss_a_little(folder: str) -> None:
    exact, _ = load_full_model(source_of(folder), device="cpu").cross_entropy(TOKENS)
    rounded, _ = load_full_model(source_of(folder, autocast=True), device="cpu").cross_entropy(TOKENS)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


def test_a_replacement_is_not_cast_with_the_model(folder: str) -> None:
    casts: list[bool] = []

    def look(activations: torch.Tensor) -> torch.Tensor:
        casts.append(torch.is_autocast_enabled("cpu"))
        return activations

    load_full_model(source_of(folder, autocast=True), device="cpu").cross_entropy(TOKENS, replace={HOOK: look})
    assert casts == [False]


def test_a_compiled_model_gives_the_same_and_still_ends_at_its_last_hook(folder: str) -> None:
    hooks = [INSIDE, HOOK]
    expected = load_hooked_model(source_of(folder), hooks, device="cpu").activations(TOKENS)
    source = source_of(folder, compile=True)
    hooked = load_hooked_model(source, hooks, device="cpu")
    ran: list[str] = []
    hooked.module.get_submodule("model.norm").register_forward_pre_hook(lambda *_: ran.append("model.norm"))
    for _ in range(2):
        for hook, activation in hooked.activations(TOKENS).items():
            torch.testing.assert_close(activation, expected[hook])
    assert ran == []
    # Hooks that come after compilation are seen, and leave nothing behind.
    compiled, plain = (load_full_model(source_of(folder, compile=on), device="cpu") for on in (True, False))
    for replace in (None, {INSIDE: torch.zeros_like}, {HOOK: torch.zeros_like}, None):
        expected_loss = plain.cross_entropy(TOKENS, replace=replace)
        assert compiled.cross_entropy(TOKENS, replace=replace) == pytest.approx(expected_loss, rel=1e-6)


def test_without_a_compiler_compile_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InvalidInput, match=r"needs a compiler \(no-such-compiler\)") as caught:
        load_hooked_model(source_of(folder, compile=True), [HOOK], device="cpu")
    assert (caught.value.reason, caught.value.field) == ("NoCompiler", "spec.model.compile")


def test_a_failing_compiler_is_told() -> None:
    from torch._dynamo.exc import TorchDynamoException

    def fail(_tokens: torch.Tensor) -> None:
        raise TorchDynamoException("no backend\n\nSet TORCH_LOGS for more")

    with pytest.raises(InvalidInput, match="no backend; set compile false") as caught:
        Forward(fail, device=torch.device("cpu"), compiled=True)(TOKENS)
    assert (caught.value.reason, caught.value.field) == ("CompileFailed", "spec.model.compile")


def test_a_model_that_is_spread_gives_the_same(folder: str) -> None:
    source = source_of(folder, deviceMap="auto")
    assert torch.equal(activations_of(source), activations_of(source_of(folder)))
    expected = load_full_model(source_of(folder), device="cpu").cross_entropy(TOKENS)
    assert load_full_model(source, device="cpu").cross_entropy(TOKENS) == expected


def test_hooks_of_a_spread_model_are_gathered_on_one_device(folder: str) -> None:
    from sae_job.models.hooked import HookedModel
    from sae_job.models.sites import ModuleOutput

    module = torch.nn.Linear(4, 4)
    forward = Forward(lambda tokens: module(tokens.float()), device=torch.device("meta"), entrance=torch.device("cpu"))
    activations = HookedModel(module, forward, {"map": ModuleOutput("map", module)}, ["map"]).activations(TOKENS[:, :4])
    assert activations["map"].device.type == "meta"


def test_tokens_enter_where_the_first_part_lies() -> None:
    model = torch.nn.Linear(1, 1)
    gpu = torch.device("cuda")
    assert entrance_of(model, gpu) == gpu
    setattr(model, "hf_device_map", {"model.embed_tokens": 1, "model.layers.0": 0})  # noqa: B010
    assert entrance_of(model, gpu) == torch.device("cuda:1")
    setattr(model, "hf_device_map", {"model": "cpu"})  # noqa: B010
    assert entrance_of(model, gpu) == gpu


def test_spreading_needs_accelerate(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    error = refusal(source_of(folder, deviceMap="auto"))
    assert (error.reason, error.field) == ("PackageMissing", "spec.model.deviceMap")


def test_memory_of_a_forward_pass(folder: str) -> None:
    facts = inspect_model(source_of(folder), [HOOK])
    # Two norms, four maps of attention (keys and values half as wide), the MLP's maps and its activation.
    assert facts.forward_width == 32 * (1 + 1) + 32 * (1 + 0.5 + 0.5 + 1) + 32 * (2 + 2 + 2 + 1)
    tokens = 16 * 64
    assert forward_bytes(facts, source_of(folder), 64) == tokens * (facts.forward_width + 32) * 4
    # Scores of 4 heads for each pair of positions, in float32 and in the model's own format.
    eager = source_of(folder, attentionImplementation="eager")
    assert forward_bytes(facts, eager, 64) == forward_bytes(facts, source_of(folder), 64) + tokens * 64 * 4 * (4 + 4)
