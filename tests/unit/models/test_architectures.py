"""Architectures beside Llama's: hooks, widths and truncation are found in each without knowing it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sae_job.models.load import inspect_model, load_hooked_model
from sae_operator.api.activation_cache import ModelSource

VOCABULARY = 64
TOKENS = torch.arange(16).reshape(2, 8)


@dataclass(frozen=True)
class Case:
    """A kind of model.

    Attributes:
        layers: where it keeps its layers.
        own_head: whether its head has weights of its own.
        embeddings_first: whether its hidden states begin with the embeddings.
    """

    layers: str
    own_head: bool
    config: str
    model: str
    options: dict[str, Any]
    embeddings_first: bool = True


COMMON = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2}
CASES = {
    "gpt2": Case(
        "transformer.h",
        False,
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 4, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "gpt-neox, whose head is not tied": Case(
        "gpt_neox.layers", True, "GPTNeoXConfig", "GPTNeoXForCausalLM", {**COMMON, "intermediate_size": 32}
    ),
    "gemma2, whose layers are of two types": Case(
        "model.layers",
        False,
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**COMMON, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
    ),
    "mixtral, a mixture of experts": Case(
        "model.layers",
        True,
        "MixtralConfig",
        "MixtralForCausalLM",
        {**COMMON, "intermediate_size": 32, "num_key_value_heads": 1, "num_local_experts": 4},
    ),
    "bert, an encoder without a head": Case(
        "encoder.layer", False, "BertConfig", "BertModel", {**COMMON, "intermediate_size": 32}
    ),
    "mamba, a state-space model": Case(
        "backbone.layers",
        False,
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "hidden_size": 16, "state_size": 4},
        embeddings_first=False,
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path, nn.Module]:
    import transformers

    torch.set_num_threads(1)
    chosen = CASES[request.param]
    config = getattr(transformers, chosen.config)(**chosen.options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, chosen.model)(config).eval()
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return chosen, path, model


def test_a_layer_in_the_middle(case: tuple[Case, Path, nn.Module]) -> None:
    chosen, path, model = case
    source = ModelSource(name=str(path), dtype="float32")
    hooks = [f"{chosen.layers}.0", f"{chosen.layers}.1"]
    facts = inspect_model(source, hooks)
    assert facts.d_in == dict.fromkeys(hooks, 16)
    assert (facts.layers, facts.total_layers) == (2, 4)
    hooked = load_hooked_model(source, hooks, device="cpu")
    with torch.no_grad():
        hidden = model(TOKENS, output_hidden_states=True).hidden_states
    activations = hooked.activations(TOKENS)
    after_first = int(chosen.embeddings_first)
    assert torch.equal(activations[hooks[0]], hidden[after_first])
    assert torch.equal(activations[hooks[1]], hidden[after_first + 1])


def test_nothing_behind_the_last_hook_runs(case: tuple[Case, Path, nn.Module]) -> None:
    chosen, path, _ = case
    hooked = load_hooked_model(ModelSource(name=str(path), dtype="float32"), [f"{chosen.layers}.0"], device="cpu")
    ran: list[str] = []
    for name, module in hooked.module.named_modules():
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: ran.append(name))
    hooked.activations(TOKENS)
    assert [name for name in ran if name.startswith(f"{chosen.layers}.0.")]
    assert not {"lm_head", "embed_out", "model.norm", "transformer.ln_f", "backbone.norm_f"} & set(ran)


def test_contexts_do_not_see_each_other(case: tuple[Case, Path, nn.Module]) -> None:
    chosen, path, _ = case
    hook = f"{chosen.layers}.1"
    hooked = load_hooked_model(ModelSource(name=str(path), dtype="float32"), [hook], device="cpu")
    together = hooked.activations(TOKENS)[hook]
    alone = torch.cat([hooked.activations(row[None])[hook] for row in TOKENS])
    torch.testing.assert_close(together, alone)


def test_no_more_weights_than_needed(case: tuple[Case, Path, nn.Module]) -> None:
    chosen, path, model = case
    source = ModelSource(name=str(path), dtype="float32")
    hooked = load_hooked_model(source, [f"{chosen.layers}.1"], device="cpu")
    layer = sum(parameter.numel() for parameter in model.get_submodule(f"{chosen.layers}.0").parameters())
    head = VOCABULARY * 16 if chosen.own_head else 0
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert hooked.parameter_bytes() == 4 * (whole - 2 * layer - head)
    assert inspect_model(source, [f"{chosen.layers}.1"]).parameter_bytes == hooked.parameter_bytes()
