"""The CustomResourceDefinitions: structural, bounded, described, and what is checked in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sae_operator.api import crd, reference
from sae_operator.api.base import ApiModel
from sae_operator.api.generated import differing_files, write_or_check
from sae_operator.api.manifest import read_yaml
from sae_operator.api.resources import KINDS, Kind
from sae_operator.api.schema import structural_schema

ROOT = Path(__file__).parents[3]
DEFINITIONS = {name: crd.custom_resource_definition(kind) for name, kind in KINDS.items()}


def schema_of(kind: str) -> dict[str, Any]:
    return DEFINITIONS[kind]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node of a schema with its path; `metadata` is Kubernetes' own."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        if (path, name) != ("", "metadata"):
            yield from nodes(child, f"{path}.{name}")
    for inner in ("items", "additionalProperties"):
        if inner in schema:
            yield from nodes(schema[inner], f"{path}.{inner}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_node_is_structural_and_bounded(kind: str) -> None:
    for path, node in nodes(schema_of(kind)):
        assert not {"$ref", "anyOf", "oneOf", "allOf", "not", "nullable", "const"} & set(node), path
        assert _is_bounded(node), path


def _is_bounded(node: dict[str, Any]) -> bool:
    if node.get("x-kubernetes-int-or-string"):
        return "type" not in node and node["maxLength"] <= 32
    if node.get("x-kubernetes-preserve-unknown-fields"):
        # Whatever a field of a sweep's template takes: bounded by what a request may hold, and in no rule.
        return list(node) == ["x-kubernetes-preserve-unknown-fields"]
    match node["type"]:
        case "string":
            return "enum" in node or node["maxLength"] <= 32768
        case "array":
            return node["maxItems"] <= 1024 and node["x-kubernetes-list-type"] in ("atomic", "map")
        case "object":
            return node.get("maxProperties", 1000) <= 32 if "additionalProperties" in node else True
        case "integer":
            return node["format"] == "int64"
        case "number":
            return node["format"] == "double"
        case other:
            return other == "boolean"


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_a_spec_has_bounds(kind: str) -> None:
    for path, node in nodes(schema_of(kind)["properties"]["spec"]):
        if node.get("type") in ("integer", "number"):
            assert {"minimum", "maximum"} <= set(node), path


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_described(kind: str) -> None:
    for path, node in nodes(schema_of(kind)):
        for name, child in node.get("properties", {}).items():
            assert child.get("description") or (path, name) == ("", "metadata"), f"{path}.{name}"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_defaults_are_those_of_the_models(kind: Kind) -> None:
    def check(schema: dict[str, Any], model: type[ApiModel]) -> None:
        expected = {name for name, child in schema["properties"].items() if "default" not in child}
        for field in model.model_fields.values():
            default = field.get_default(call_default_factory=True)
            assert (field.alias in schema.get("required", ())) == field.is_required()
            if field.is_required() or default is None:
                assert field.alias in expected
            elif not isinstance(default, ApiModel):
                assert schema["properties"][field.alias]["default"] == default
            else:
                assert schema["properties"][field.alias]["default"] == {}
                check(schema["properties"][field.alias], type(default))

    check(schema_of(kind.kind)["properties"]["spec"], kind.spec)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_resource_is_never_taken_for_current(kind: str) -> None:
    status = schema_of(kind)["properties"]["status"]
    assert status["default"] == {"observedGeneration": -1}
    assert status["properties"]["observedGeneration"]["default"] == -1
    assert DEFINITIONS[kind]["spec"]["versions"][0]["subresources"] == {"status": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_columns_point_at_fields_that_exist(kind: str) -> None:
    for column in DEFINITIONS[kind]["spec"]["versions"][0]["additionalPrinterColumns"]:
        at = schema_of(kind)
        steps = column["jsonPath"].strip(".").split(".")
        if steps[0] == "metadata":
            continue
        for step in steps:
            at = at["properties"][step]
        assert at["type"] == column["type"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_field_may_be_changed_or_has_a_rule_that_says_how(kind: str) -> None:
    """What may change: run and parallelism, suspend, retry upwards, tokens upwards, hooks by more of them."""

    def free(schema: dict[str, Any], path: str) -> Iterator[str]:
        ruled = {
            rule["fieldPath"].split(".")[1]
            for rule in schema.get("x-kubernetes-validations", ())
            if "oldSelf" in rule["rule"]
        }
        for name, child in schema["properties"].items():
            inner = f"{path}.{name}"
            if name in ("activations", "training", "cache", "live", "template"):
                yield from free(child, inner)
            elif name not in ruled:
                yield inner

    cache = {"parallelism", "run", "suspend"}
    job = {"parallelism", "run", "suspend", "wandb", *(f"activations.cache.{name}" for name in cache)}
    sweep = {"space", "trialsPerJob", "maxParallel", "maxFailedTrials", "objective", "report", "suspend"}
    expected = {
        "ActivationCache": {f"spec.{name}" for name in cache},
        "SAETrainingJob": {f"spec.{name}" for name in job},
        "SAESweep": {*(f"spec.{name}" for name in sweep), *(f"spec.template.{name}" for name in job)},
    }
    assert set(free(schema_of(kind)["properties"]["spec"], "spec")) == expected[kind]


def test_bounds_behind_a_validator_are_kept() -> None:
    batch = structural_schema(KINDS["ActivationCache"].spec)["properties"]["model"]["properties"]["batchSize"]
    assert (batch["minimum"], batch["maximum"], batch["default"]) == (1, 4096, 16)


@pytest.mark.parametrize(("generator", "folder"), [(crd, "manifests/crds"), (reference, "docs/reference")])
def test_what_is_checked_in_is_what_the_models_say(generator: Any, folder: str) -> None:
    assert differing_files(generator.generated_files(), ROOT / folder) == []


def test_the_yaml_says_what_the_definition_is() -> None:
    for text in crd.generated_files().values():
        (document,) = read_yaml(text)
        assert document == DEFINITIONS[document["spec"]["names"]["kind"]]


class TestGeneratorsCommandLine:
    FILES: ClassVar = {"a.yaml": "a: 1\n", "b.yaml": "b: 2\n"}

    def run(self, *arguments: str) -> int:
        return write_or_check(self.FILES, arguments, program="generator")

    def test_it_writes_what_the_check_then_accepts(self, tmp_path: Path) -> None:
        out = ("--out", str(tmp_path / "new"))
        assert self.run(*out, "--check") == 1
        assert self.run(*out) == 0
        assert self.run(*out, "--check") == 0
        assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == self.FILES

    def test_the_check_names_what_differs_and_writing_mends_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.run("--out", str(tmp_path))
        (tmp_path / "b.yaml").write_text("changed")
        (tmp_path / "left-over").write_text("")
        assert self.run("--out", str(tmp_path), "--check") == 1
        assert capsys.readouterr().err.splitlines() == [
            f"{tmp_path / name} is not what the models say; run `make generate`" for name in ("b.yaml", "left-over")
        ]
        assert self.run("--out", str(tmp_path)) == 0
        assert self.run("--out", str(tmp_path), "--check") == 0
