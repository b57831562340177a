"""Models that bring Python code: it runs where the spec trusts it, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.errors import InvalidInput
from sae_job.models.load import inspect_model, load_full_model, load_hooked_model
from sae_job.text.tokenize import load_tokenizer
from sae_operator.api.activation_cache import ModelSource
from tests.tiny_model import WIDTH, write_tiny_model

HOOK = "model.layers.1"
TOKENS = torch.arange(24).reshape(2, 12)
# Llama under a name that Transformers does not know.
CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own-llama"
"""
MODEL = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module", autouse=True)
def _modules_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Transformers copies code into a folder that it imports from."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_tiny_model(tmp_path / "own")
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODEL)
    change(
        folder / "config.json",
        model_type="own-llama",
        architectures=["OwnForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    )
    return folder


def source_of(folder: Path, *, trusted: bool) -> ModelSource:
    return ModelSource.model_validate({"name": str(folder), "dtype": "float32", "trustRemoteCode": trusted})


def test_trusted_code_gives_the_activations_that_the_model_has(folder: Path, tmp_path: Path) -> None:
    plain = source_of(write_tiny_model(tmp_path / "plain"), trusted=False)
    source = source_of(folder, trusted=True)
    facts = inspect_model(source, [HOOK])
    assert facts.d_in == {HOOK: WIDTH}
    assert facts.layers == 2
    found = load_hooked_model(source, [HOOK], device="cpu").activations(TOKENS)[HOOK]
    assert torch.equal(found, load_hooked_model(plain, [HOOK], device="cpu").activations(TOKENS)[HOOK])
    whole = load_full_model(source, device="cpu")
    assert torch.equal(whole.logits(TOKENS), load_full_model(plain, device="cpu").logits(TOKENS))


def test_code_that_is_not_trusted_does_not_run_and_the_field_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "configuration_own.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'run')!r}).touch()\n{CONFIGURATION}"
    )
    for act in (
        lambda source: inspect_model(source, [HOOK]),
        lambda source: load_hooked_model(source, [HOOK], device="cpu"),
        lambda source: load_full_model(source, device="cpu"),
    ):
        with pytest.raises(InvalidInput) as caught:
            act(source_of(folder, trusted=False))
        assert caught.value.field == "spec.model.trustRemoteCode"
        assert "needs Python code of its repository to run" in caught.value.message
        assert "set model.trustRemoteCode to true" in caught.value.message
    assert not (tmp_path / "run").exists()
    inspect_model(source_of(folder, trusted=True), [HOOK])
    assert (tmp_path / "run").exists()


def test_a_model_that_transformers_knows_does_not_need_the_code_that_it_brings(folder: Path) -> None:
    change(folder / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    (folder / "modeling_own.py").write_text("raise RuntimeError('this code must not run')")
    assert inspect_model(source_of(folder, trusted=False), [HOOK]).d_in == {HOOK: WIDTH}


def test_code_that_needs_a_package_that_is_not_there_is_told(folder: Path) -> None:
    (folder / "modeling_own.py").write_text(f"import no_such_package\n{MODEL}")
    with pytest.raises(InvalidInput, match=r"the code that .* brings cannot be used here: .*") as caught:
        inspect_model(source_of(folder, trusted=True), [HOOK])
    assert caught.value.reason == "ModelCodeUnusable"


@pytest.mark.parametrize(
    ("module", "code", "told"),
    [
        ("modeling_own.Own", "def (", "invalid syntax"),
        ("modeling_own.Own", "raise RuntimeError('not here')", "not here"),
        ("modeling_own.Own", "", "has no attribute 'Own'"),
        ("missing.Own", "", "missing.py"),
        ("nothing", "", "not enough values"),
    ],
)
def test_code_that_is_broken_is_told(folder: Path, module: str, code: str, told: str) -> None:
    (folder / "modeling_own.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": module}
    change(folder / "config.json", auto_map=auto_map)
    with pytest.raises(InvalidInput, match=told) as caught:
        inspect_model(source_of(folder, trusted=True), [HOOK])
    assert (caught.value.reason, caught.value.field) == ("ModelCodeUnusable", "spec.model.name")


def test_a_configuration_whose_code_is_broken_is_told(folder: Path) -> None:
    (folder / "configuration_own.py").write_text("def (")
    with pytest.raises(InvalidInput, match="cannot be used here: invalid syntax"):
        inspect_model(source_of(folder, trusted=True), [HOOK])


def test_a_list_of_classes_that_is_none_is_no_code(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "plain")
    change(folder / "config.json", auto_map="nothing")
    assert inspect_model(source_of(folder, trusted=False), [HOOK]).d_in == {HOOK: WIDTH}


def test_a_tokenizer_may_bring_code_too(folder: Path) -> None:
    (folder / "tokenization_own.py").write_text(TOKENIZER)
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    )
    assert type(load_tokenizer(source_of(folder, trusted=True))).__name__ == "OwnTokenizer"
    with pytest.raises(InvalidInput) as caught:
        load_tokenizer(source_of(folder, trusted=False))
    assert caught.value.field == "spec.model.trustRemoteCode"
