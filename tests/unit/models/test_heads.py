"""Attention heads: all of them side by side, or one, from one forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sae_job.errors import InvalidInput
from sae_job.models.load import inspect_model, load_full_model, load_hooked_model
from sae_job.models.sites import ModuleOutput, put, take
from sae_operator.api.activation_cache import ModelSource
from tests.tiny_model import WIDTH, write_tiny_model

TOKENS = torch.arange(24).reshape(2, 12)
HEADS, KEY_HEADS = 4, 2
HEAD_WIDTH = WIDTH // HEADS
QUERIES = "model.layers.1.self_attn.q_proj"
KEYS = "model.layers.1.self_attn.k_proj"
HEAD_OUTPUTS = "model.layers.1.self_attn.o_proj.input"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    torch.set_num_threads(1)
    return ModelSource(name=str(write_tiny_model(tmp_path_factory.mktemp("model"))), dtype="float32")


def test_widths_of_heads_come_from_the_config_alone(source: ModelSource) -> None:
    facts = inspect_model(source, [QUERIES, f"{QUERIES}:3", f"{KEYS}:1", HEAD_OUTPUTS, f"{HEAD_OUTPUTS}:0"])
    assert facts.d_in == {
        QUERIES: WIDTH,
        f"{QUERIES}:3": HEAD_WIDTH,
        f"{KEYS}:1": HEAD_WIDTH,
        HEAD_OUTPUTS: WIDTH,
        f"{HEAD_OUTPUTS}:0": HEAD_WIDTH,
    }


def test_heads_are_slices_of_the_whole_in_order(source: ModelSource) -> None:
    keys = [HEAD_OUTPUTS, *(f"{HEAD_OUTPUTS}:{head}" for head in range(HEADS))]
    activations = load_hooked_model(source, keys, device="cpu").activations(TOKENS)
    assert list(activations) == keys
    assert torch.equal(torch.cat([activations[key] for key in keys[1:]], dim=-1), activations[HEAD_OUTPUTS])


def test_what_heads_give_becomes_the_attentions_output(source: ModelSource) -> None:
    attention = "model.layers.1.self_attn"
    hooked = load_hooked_model(source, [HEAD_OUTPUTS, attention], device="cpu")
    activations = hooked.activations(TOKENS)
    weight = hooked.module.get_parameter(f"{attention}.o_proj.weight")
    torch.testing.assert_close(activations[HEAD_OUTPUTS] @ weight.T, activations[attention])


def test_a_head_that_is_not_there_is_told_with_their_number(source: ModelSource) -> None:
    with pytest.raises(InvalidInput, match="has 2 heads, 0 to 1: there is no head 2") as caught:
        inspect_model(source, ["model.layers.0", f"{KEYS}:2"])
    assert (caught.value.reason, caught.value.field) == ("HeadOutOfRange", "spec.hooks[1].headIndex")


@pytest.mark.parametrize("name", ["model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp.gate_proj"])
def test_what_is_not_split_into_heads_has_none(source: ModelSource, name: str) -> None:
    with pytest.raises(InvalidInput, match="leave headIndex out") as caught:
        inspect_model(source, [f"{name}:0"])
    assert (caught.value.reason, caught.value.field) == ("HookHasNoHeads", "spec.hooks[0].headIndex")


def test_an_ablated_head_is_a_head_whose_output_weights_are_0(source: ModelSource, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    lesioned = AutoModelForCausalLM.from_pretrained(source.name)
    weight = lesioned.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        weight[:, 2 * HEAD_WIDTH : 3 * HEAD_WIDTH] = 0
    lesioned.save_pretrained(tmp_path)
    expected = load_full_model(source.model_copy(update={"name": str(tmp_path)}), device="cpu").cross_entropy(TOKENS)
    model = load_full_model(source, device="cpu")
    ablated = model.cross_entropy(TOKENS, replace={f"{HEAD_OUTPUTS}:2": torch.zeros_like})
    assert ablated == pytest.approx(expected, rel=1e-6)
    assert ablated[0] != pytest.approx(model.cross_entropy(TOKENS)[0], rel=1e-4)


def test_heads_in_a_dimension_of_their_own_are_laid_side_by_side() -> None:
    activation = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert take(activation, None).tolist() == [[list(range(12)), list(range(12, 24))]]
    assert take(activation, 1).tolist() == [[[4, 5, 6, 7], [16, 17, 18, 19]]]


@pytest.mark.parametrize("head", [None, 0, 2])
def test_what_is_put_back_is_what_was_taken(head: int | None) -> None:
    activation = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(put(activation, head, take(activation, head)), activation)
    changed = put(activation, head, take(activation, head) + 1)
    assert torch.equal(take(changed, head), take(activation, head) + 1)
    assert int((changed != activation).sum()) == take(activation, head).numel()


def test_the_rest_of_a_tuple_stays() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x, "cache"

    layer = Layer()
    ModuleOutput("layer", layer).watch(lambda x: 2 * x)
    output, cache = layer(torch.ones(1, 2, 3))
    assert (output.tolist(), cache) == ([[[2.0] * 3] * 2], "cache")
