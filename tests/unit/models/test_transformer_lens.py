"""TransformerLens' view of a model: its names, the Transformers library's activations, no more layers than needed."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae_job.errors import InvalidInput
from sae_job.models.facts import forward_bytes
from sae_job.models.load import inspect_model, load_full_model, load_hooked_model
from sae_operator.api.activation_cache import ModelSource
from tests.testbed.data import ensure_small_model
from tests.tiny_model import LAYERS, WIDTH, write_tiny_model

TOKENS = torch.arange(16).reshape(2, 8)
RESIDUAL = "blocks.1.hook_resid_post"
HEAD_OUTPUTS = "blocks.1.attn.hook_z"
VOCABULARY = 64
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "hidden_size": 16}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return str(write_tiny_model(tmp_path_factory.mktemp("llama")))


def save_random(directory: Path, config: Any, kind: str) -> str:
    """Write a model whose biases and norms do something, unlike fresh ones."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, kind)(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    getattr(model, "save_pretrained")(directory)  # noqa: B009
    return str(directory)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import GPT2Config

    torch.set_num_threads(1)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0, initializer_range=0.3
    )
    return save_random(tmp_path_factory.mktemp("gpt2"), config, "GPT2LMHeadModel")


def lens(name: str, **options: Any) -> ModelSource:
    return ModelSource.model_validate({"name": name, "dtype": "float32", "loader": "TransformerLens", **options})


def plain(name: str) -> ModelSource:
    return ModelSource(name=name, dtype="float32", attention_implementation="eager")


def refusal(source: ModelSource, hooks: list[str]) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        inspect_model(source, hooks)
    return caught.value


def test_activations_are_those_of_the_module_that_a_hook_stands_for(llama: str) -> None:
    pairs = {
        RESIDUAL: "model.layers.1",
        "blocks.0.hook_attn_out": "model.layers.0.self_attn",
        "blocks.1.hook_mlp_out": "model.layers.1.mlp",
        HEAD_OUTPUTS: "model.layers.1.self_attn.o_proj.input",
        f"{HEAD_OUTPUTS}:2": "model.layers.1.self_attn.o_proj.input:2",
        "blocks.0.attn.hook_k:1": "model.layers.0.self_attn.k_proj:1",
    }
    activations = load_hooked_model(lens(llama), list(pairs), device="cpu").activations(TOKENS)
    expected = load_hooked_model(plain(llama), list(pairs.values()), device="cpu").activations(TOKENS)
    assert list(activations) == list(pairs)
    for hook, module in pairs.items():
        torch.testing.assert_close(activations[hook], expected[module], rtol=1e-5, atol=1e-5)


def test_new_and_old_names_are_one_hook(llama: str) -> None:
    hooks = [RESIDUAL, "blocks.1.hook_out"]
    activations = load_hooked_model(lens(llama), hooks, device="cpu").activations(TOKENS)
    assert torch.equal(activations[hooks[0]], activations[hooks[1]])


def test_facts_come_without_weights(llama: str, tmp_path: Path) -> None:
    for file in Path(llama).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    facts = inspect_model(lens(str(tmp_path)), [RESIDUAL, HEAD_OUTPUTS, f"{HEAD_OUTPUTS}:3", "blocks.0.mlp.hook_post"])
    assert facts.d_in == {RESIDUAL: WIDTH, HEAD_OUTPUTS: WIDTH, f"{HEAD_OUTPUTS}:3": 8, "blocks.0.mlp.hook_post": 64}
    assert (facts.layers, facts.total_layers, facts.predicts_tokens) == (2, LAYERS, True)
    # Its attention keeps the scores of 4 heads, in float32 for the softmax and in the model's own format.
    sources = [lens(llama), ModelSource(name=llama, dtype="float32")]
    with_scores, without = (forward_bytes(facts, source, 32) for source in sources)
    assert with_scores - without == 16 * 32 * 32 * 4 * (4 + 4)


def test_only_the_needed_layers_are_loaded_and_run(llama: str) -> None:
    hooked = load_hooked_model(lens(llama), ["blocks.1.hook_mlp_in"], device="cpu")
    assert len(list(hooked.module.get_submodule("model.layers").children())) == 2
    assert inspect_model(lens(llama), ["blocks.1.hook_mlp_in"]).parameter_bytes == hooked.parameter_bytes()
    ran: list[str] = []
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        module = hooked.module.get_submodule(name)
        module.register_forward_pre_hook(partial(lambda name, *_: ran.append(name), name))
    hooked.activations(TOKENS)
    assert ran == ["model.embed_tokens"]


@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_result", "blocks.1.hook_attn_in", "blocks.1.hook_q_input"])
def test_hook_points_that_are_computed_on_demand(llama: str, hook: str) -> None:
    one, whole = f"{hook}:1", 4 * WIDTH
    assert inspect_model(lens(llama), [hook, one]).d_in == {hook: whole, one: WIDTH}
    activations = load_hooked_model(lens(llama), [hook, one], device="cpu").activations(TOKENS)
    assert torch.equal(activations[hook][..., WIDTH : 2 * WIDTH], activations[one])


def test_a_hook_that_is_computed_on_demand_can_be_replaced(llama: str) -> None:
    """Without its result a head writes nothing, as without its output."""
    model = load_full_model(lens(llama), device="cpu")
    losses = [
        model.cross_entropy(TOKENS, replace={hook: torch.zeros_like})
        for hook in ("blocks.1.attn.hook_result:2", f"{HEAD_OUTPUTS}:2")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_results_of_heads_sum_up_to_the_attentions_output(llama: str) -> None:
    hooks = ["blocks.1.attn.hook_result", "blocks.1.hook_attn_out"]
    results, output = load_hooked_model(lens(llama), hooks, device="cpu").activations(TOKENS).values()
    torch.testing.assert_close(results.unflatten(-1, (4, WIDTH)).sum(dim=2), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", ["model.layers.1", "transformer.h.1.mlp", "blocks.1.hook_resid_pots"])
def test_an_unknown_hook_is_told_with_the_nearest_names(llama: str, wrong: str) -> None:
    error = refusal(lens(llama), ["blocks.0.hook_out", wrong])
    assert (error.reason, error.field) == ("HookNotFound", "spec.hooks[1].name")
    assert f"nearest: {RESIDUAL}," in error.message


def test_heads_that_are_not_there_and_shapes_that_are_no_activations(llama: str) -> None:
    error = refusal(lens(llama), [f"{HEAD_OUTPUTS}:4"])
    assert (error.reason, error.field) == ("HeadOutOfRange", "spec.hooks[0].headIndex")
    assert "has 4 heads" in error.message
    assert refusal(lens(llama), [f"{RESIDUAL}:0"]).reason == "HookHasNoHeads"
    # Attention patterns are [batch, heads, query, key]; the rotation's cosines are the same for every context.
    assert refusal(lens(llama), ["blocks.1.attn.hook_pattern"]).reason == "HookShape"
    assert refusal(lens(llama), ["rotary_emb.hook_cos"]).reason == "HookShape"


def test_the_loss_is_the_models_clean_and_spliced(llama: str) -> None:
    model, expected = load_full_model(lens(llama), device="cpu"), load_full_model(plain(llama), device="cpu")
    pairs = {RESIDUAL: "model.layers.1", f"{HEAD_OUTPUTS}:2": "model.layers.1.self_attn.o_proj.input:2"}
    assert model.cross_entropy(TOKENS) == pytest.approx(expected.cross_entropy(TOKENS), rel=1e-6)
    for hook, module in pairs.items():
        replaced = expected.cross_entropy(TOKENS, replace={module: torch.zeros_like})
        assert model.cross_entropy(TOKENS, replace={hook: torch.zeros_like}) == pytest.approx(replaced, rel=1e-6)


PROCESSING = ["foldLayerNorm", "centerWritingWeights", "centerUnembed", "foldValueBiases"]


@pytest.mark.parametrize("flags", [[flag] for flag in PROCESSING] + [PROCESSING], ids="+".join)
def test_processing_leaves_the_loss_as_it_is(gpt2: str, flags: list[str]) -> None:
    model = load_full_model(lens(gpt2, processing=dict.fromkeys(flags, True)), device="cpu")
    expected = load_full_model(plain(gpt2), device="cpu").cross_entropy(TOKENS)
    assert model.cross_entropy(TOKENS) == pytest.approx(expected, rel=1e-5)


def activations_of(source: ModelSource, hook: str) -> Tensor:
    return load_hooked_model(source, [hook], device="cpu").activations(TOKENS)[hook]


def test_centred_writing_weights_centre_the_residual_stream(gpt2: str) -> None:
    raw = activations_of(lens(gpt2), RESIDUAL)
    centred = activations_of(lens(gpt2, processing={"centerWritingWeights": True}), RESIDUAL)
    torch.testing.assert_close(centred, raw - raw.mean(dim=-1, keepdim=True), rtol=1e-5, atol=1e-5)
    assert raw.mean(dim=-1).abs().min() > 1e-3


def test_folded_layer_norms_normalise_and_nothing_more(gpt2: str) -> None:
    hook = "blocks.1.ln1.hook_out"
    folded = activations_of(lens(gpt2, processing={"foldLayerNorm": True}), hook)
    torch.testing.assert_close(folded.norm(dim=-1), torch.full(TOKENS.shape, 4.0), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(activations_of(lens(gpt2), hook), folded, rtol=0.01)


def test_folded_value_biases_are_gone_from_the_values(gpt2: str) -> None:
    hook = "blocks.1.attn.hook_v"
    difference = activations_of(lens(gpt2), hook) - activations_of(
        lens(gpt2, processing={"foldValueBiases": True}), hook
    )
    bias = load_hooked_model(plain(gpt2), ["transformer.h.1"], device="cpu").module.get_parameter(
        "transformer.h.1.attn.c_attn.bias"
    )[32:]
    torch.testing.assert_close(difference, bias.expand_as(difference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("processing", [None, {"foldLayerNorm": True, "centerWritingWeights": True}], ids=str)
def test_memory_of_the_weights_counts_what_the_bridge_adds(gpt2: str, processing: dict[str, bool] | None) -> None:
    source = lens(gpt2, processing=processing)
    hooked = load_hooked_model(source, [RESIDUAL], device="cpu")
    assert inspect_model(source, [RESIDUAL]).parameter_bytes == hooked.parameter_bytes()


def test_a_head_with_weights_of_its_own(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig

    config = GPTNeoXConfig(**COMMON, num_attention_heads=2, intermediate_size=32)
    name = save_random(tmp_path, config, "GPTNeoXForCausalLM")
    torch.testing.assert_close(activations_of(lens(name), RESIDUAL), activations_of(plain(name), "gpt_neox.layers.1"))


def test_a_state_space_model(tmp_path: Path) -> None:
    from transformers import MambaConfig

    name = save_random(tmp_path, MambaConfig(**COMMON, state_size=4), "MambaForCausalLM")
    expected = activations_of(ModelSource(name=name, dtype="float32"), "backbone.layers.1")
    assert inspect_model(lens(name), ["blocks.1.hook_out"]).layers == 2
    torch.testing.assert_close(activations_of(lens(name), "blocks.1.hook_out"), expected)


def test_a_model_that_the_bridge_does_not_know(tmp_path: Path) -> None:
    from transformers import BertConfig

    config = BertConfig(**COMMON, num_attention_heads=2, intermediate_size=32)
    error = refusal(lens(save_random(tmp_path, config, "BertModel")), [RESIDUAL])
    assert (error.reason, error.field) == ("ModelUnsupported", "spec.model.loader")


def test_what_the_loader_cannot_do_is_told(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(lens(llama, compile=True), [RESIDUAL]).field == "spec.model.compile"
    assert (
        refusal(lens(llama, attentionImplementation="sdpa"), [RESIDUAL]).field == "spec.model.attentionImplementation"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    error = refusal(lens(llama), [RESIDUAL])
    assert (error.reason, error.field) == ("PackageMissing", "spec.model.loader")
    assert "pip install 'sae-operator[transformerlens]'" in error.message


def test_a_real_model() -> None:
    torch.set_num_threads(1)
    name = str(ensure_small_model())
    tokens = torch.arange(1000, 1064).reshape(2, 32)
    hook = "blocks.15.hook_resid_post"
    activations = load_hooked_model(lens(name), [hook], device="cpu").activations(tokens)[hook]
    expected = load_hooked_model(plain(name), ["model.layers.15"], device="cpu").activations(tokens)["model.layers.15"]
    assert (activations - expected).norm() <= 1e-5 * expected.norm()
