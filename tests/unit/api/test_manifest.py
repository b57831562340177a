"""Reading manifests: YAML 1.2, and one line in plain words for each thing that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAMLError

from sae_operator.api.manifest import ManifestError, load_manifests, parse_manifests, read_yaml, validate_spec
from sae_operator.api.schema import MAP_KEY_MESSAGE
from tests.specs import CACHE_SPEC, JOB_SPEC, REMOVED, edited

CACHE_YAML = """\
apiVersion: sae-operator.dev/v1alpha1
kind: ActivationCache
metadata: {name: small}
spec:
  model: {name: gpt2}
  dataset: {path: some/text}
  hooks: [{name: transformer.h.7}]
  tokens: 3e8
  storage: {uri: "s3://saes/caches"}
"""


A_PATH = "must be the dotted path of a module, such as transformer.h.7"
TEXT, QUOTES = "must be text", "put it in quotes"


def problems_of(text: str) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        parse_manifests(text, source="a.yaml")
    return [str(problem) for problem in caught.value.problems]


def messages(kind: str, spec: Any) -> list[tuple[str, str]]:
    problems = validate_spec(kind, spec)
    assert isinstance(problems, list), "the spec is valid"
    return [(problem.field, problem.message) for problem in problems]


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("3e-4", 3e-4),
            ("3e8", 3e8),
            ("1E3", 1e3),
            ("0.5", 0.5),
            ("-7", -7),
            ("0o17", 15),
            ("0", 0),
            ("0x10", 16),
            ("yes", "yes"),
            ("off", "off"),
            ("true", True),
            ("~", None),
            ("2026-01-31", "2026-01-31"),
            ("'3e8'", "3e8"),
            ("1:30", "1:30"),
        ],
    )
    def test_scalars_follow_yaml_1_2(self, text: str, value: Any) -> None:
        (document,) = read_yaml(f"key: {text}")
        assert document == {"key": value}
        assert type(document["key"]) is type(value)

    def test_a_key_given_twice_is_refused_with_its_place(self) -> None:
        assert problems_of("a: 1\nb: 2\na: 3\n") == [
            "a.yaml: line 3, column 1: the key 'a' stands here twice; remove one"
        ]

    def test_a_number_that_readers_of_yaml_disagree_about_is_refused(self) -> None:
        assert problems_of("a:\n  b: 017\n") == [
            "a.yaml: line 2, column 6: the number 017 begins with 0; write it without, or in quotes if it is text"
        ]

    def test_text_that_is_not_yaml_is_told_on_one_line_with_its_place(self) -> None:
        (line,) = problems_of("spec:\n  - a\n b: [1\n")
        assert line.startswith("a.yaml: line 3, column 2: ")
        assert "\n" not in line

    @pytest.mark.parametrize("spec", ["&spec {model: *spec}", f"{'[' * 2000}{']' * 2000}"], ids=["alias", "depth"])
    def test_what_has_no_end_is_told_on_one_line(self, spec: str) -> None:
        text = CACHE_YAML.partition("spec:")[0] + f"spec: {spec}\n"
        with pytest.raises(ManifestError, match=r"^a.yaml: is nested too deeply") as caught:
            parse_manifests(text, source="a.yaml")
        assert len(caught.value.problems) == 1

    def test_objects_of_python_are_not_made(self) -> None:
        with pytest.raises(YAMLError):
            read_yaml("a: !!python/object/apply:os.getcwd []")


class TestResources:
    def test_every_document_is_a_resource_in_the_files_order(self, tmp_path: Path) -> None:
        path = tmp_path / "two.yaml"
        path.write_text(f"# first\n{CACHE_YAML}---\n---\n{CACHE_YAML.replace('small', 'large')}")
        first, second = load_manifests(path)
        assert (first.kind.kind, first.name, first.namespace) == ("ActivationCache", "small", "default")
        assert (second.name, second.spec) == ("large", first.spec)

    def test_an_integral_float_is_a_whole_number(self) -> None:
        (cache,) = parse_manifests(CACHE_YAML, source="a.yaml")
        assert cache.spec.tokens == 300_000_000
        assert isinstance(cache.spec.tokens, int)

    def test_the_same_resource_twice_is_refused(self) -> None:
        assert problems_of(f"{CACHE_YAML}---\n{CACHE_YAML}") == [
            "a.yaml: ActivationCache/small: metadata.name: is used twice; rename one"
        ]

    @pytest.mark.parametrize(
        ("old", "new", "line"),
        [
            ("v1alpha1", "v1", "ActivationCache/small: apiVersion: must be sae-operator.dev/v1alpha1"),
            (
                "kind: ActivationCache",
                "kind: activationcache",
                "kind: unknown kind 'activationcache'; write ActivationC",
            ),
            ("kind: ActivationCache", "kind: Secret", "write ActivationCache or SAETrainingJob"),
            ("{name: small}", "{}", "ActivationCache/?: metadata.name: required field is missing"),
            ("small", "Small", "metadata.name: metadata.name must consist of lower-case letters, digits and '-'"),
            ("small", "a.b", "metadata.name: metadata.name must consist of lower-case letters, digits and '-'"),
            ("small", "a" * 41, "metadata.name: metadata.name must be at most 40 characters"),
            ("small", "12", "metadata.name: must be text; put it in quotes"),
            ("spec:", "specs:", "specs: unknown field 'specs'; the fields here are apiVersion, kind, metadata, spec"),
        ],
    )
    def test_what_is_wrong_around_the_spec_is_told(self, old: str, new: str, line: str) -> None:
        assert any(line in problem for problem in problems_of(CACHE_YAML.replace(old, new)))

    def test_a_name_of_40_characters_is_accepted(self) -> None:
        (cache,) = parse_manifests(CACHE_YAML.replace("small", "a" * 40), source="a.yaml")
        assert cache.name == "a" * 40

    @pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
    def test_an_empty_file_is_a_mistake(self, text: str) -> None:
        assert problems_of(text) == ["a.yaml: holds no resource; begin with apiVersion: sae-operator.dev/v1alpha1"]

    def test_a_document_that_is_no_mapping_is_told(self) -> None:
        assert "must hold a resource" in problems_of("- 1\n")[0]

    def test_a_file_that_cannot_be_read_is_a_problem_of_the_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(ManifestError, match=r"absent\.yaml: cannot be read: No such file"):
            load_manifests(tmp_path / "absent.yaml")

    def test_a_file_that_is_not_utf8_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "latin.yaml"
        path.write_bytes("a: é".encode("latin-1"))
        with pytest.raises(ManifestError, match="is not UTF-8 text"):
            load_manifests(path)

    def test_every_problem_is_one_line_with_file_resource_field_message_and_fix(self) -> None:
        text = CACHE_YAML.replace("tokens: 3e8", "tokens: many\n  contextsize: 4\n  suspend: yes")
        assert problems_of(text) == [
            "a.yaml: ActivationCache/small: spec.tokens: must be a whole number, not the text 'many'",
            "a.yaml: ActivationCache/small: spec.suspend: must be true or false, not the text 'yes'; write true",
            "a.yaml: ActivationCache/small: spec.contextsize: unknown field 'contextsize'; did you mean contextSize?",
        ]


class TestMessages:
    """`validate_spec`: the words for each kind of mistake."""

    @pytest.mark.parametrize(
        ("edits", "field", "message"),
        [
            ({"tokens": REMOVED}, "spec.tokens", "required field is missing"),
            ({"tokens": None}, "spec.tokens", "required field is missing"),
            ({"tokens": 2.5}, "spec.tokens", "must be a whole number, not the number 2.5"),
            ({"tokens": True}, "spec.tokens", "must be a whole number, not true"),
            ({"tokens": 0}, "spec.tokens", "must be at least 1, not 0"),
            ({"tokens": 2**60}, "spec.tokens", f"must be at most {2**53}, not {2**60}"),
            ({"sampling.maxNormRatio": -1}, "spec.sampling.maxNormRatio", "must be at least 0, not -1"),
            ({"sampling.maxNormRatio": float("nan")}, "spec.sampling.maxNormRatio", "must be a finite number, not nan"),
            ({"sampling.prependBos": 1}, "spec.sampling.prependBos", "must be true or false, not the number 1"),
            ({"model": "gpt2"}, "spec.model", "must be a mapping, not the text 'gpt2'; write field: value"),
            ({"model.name": 7}, "spec.model.name", "must be text, not the number 7; put it in quotes"),
            ({"model.name": ""}, "spec.model.name", "must have at least 1 character"),
            ({"model.name": "a" * 513}, "spec.model.name", "must have at most 512 characters"),
            ({"model.name": "a\nb"}, "spec.model.name", "must not contain control characters, not 'a\\nb'"),
            ({"hooks": {"name": "a"}}, "spec.hooks", "must be a list, not a mapping; begin each item with '- '"),
            ({"hooks": []}, "spec.hooks", "must have at least 1 item"),
            ({"hooks.0.name": "a-b"}, "spec.hooks[0].name", f"{A_PATH}, not 'a-b'"),
            ({"hooks.0.name": "a:3"}, "spec.hooks[0].name", f"{A_PATH}, not 'a:3'"),
            ({"hooks.0.headIndex": -1}, "spec.hooks[0].headIndex", "must be at least 0, not -1"),
            (
                {"sampling.separators.beginContext": "<s>"},
                "spec.sampling.separators.beginContext",
                "must be none, bos, eos, sep or a token id in quotes, not '<s>'",
            ),
            (
                {"sampling.separators.betweenDocuments": 2},
                "spec.sampling.separators.betweenDocuments",
                f"{TEXT}, not the number 2; {QUOTES}",
            ),
            ({"sampling.positions.step": 0}, "spec.sampling.positions.step", "must be at least 1, not 0"),
            (
                {"storage.uri": "gs://a/b"},
                "spec.storage.uri",
                "must be s3://bucket/prefix or file://path, not 'gs://a/b'",
            ),
            ({"run.nodeSelector": {"a/b": 1}}, "spec.run.nodeSelector[a/b]", f"{TEXT}, not the number 1; {QUOTES}"),
            ({"run.podAnnotations": {"a" * 254: "b"}}, "spec.run.podAnnotations", MAP_KEY_MESSAGE),
        ],
    )
    def test_a_mistake_is_told_in_plain_words(self, edits: dict[str, Any], field: str, message: str) -> None:
        assert messages("ActivationCache", edited(CACHE_SPEC, edits)) == [(field, message)]

    @pytest.mark.parametrize("hook", ["a:", "a:b", "a:03", "a:12345", "a:1:2"])
    def test_the_hook_of_an_sae_is_a_module_or_one_of_its_heads(self, hook: str) -> None:
        told = "must be a hook, such as transformer.h.7, or one of its heads, such as blocks.7.attn.hook_z:3"
        assert messages("SAETrainingJob", edited(JOB_SPEC, {"saes.0.hook": hook})) == [
            ("spec.saes[0].hook", f"{told}, not '{hook}'")
        ]

    @pytest.mark.parametrize(
        ("path", "text"),
        [
            ("storage.region", "eu\n1"),
            ("storage.region", "A_b"),
            ("storage.endpointUrl", "https://host/\x00"),
            ("storage.endpointUrl", "https://host name"),
            ("storage.uri", "s3://saes/a\tb"),
            ("dataset.split", "train\r"),
            ("dataset.column", "text\x1b"),
            ("model.name", "gpt2\n"),
        ],
    )
    def test_what_cannot_be_seen_stands_in_no_name_or_address(self, path: str, text: str) -> None:
        (found,) = messages("ActivationCache", edited(CACHE_SPEC, {path: text}))
        assert found[0] == f"spec.{path}"

    @pytest.mark.parametrize("quantity", [0.5, -1, "half", "1 Gi", "1Gi\n", "", True, "9" * 33])
    def test_a_quantity_that_kubernetes_would_refuse_is_told(self, quantity: Any) -> None:
        (found,) = messages("ActivationCache", edited(CACHE_SPEC, {"run.resources.limits": {"cpu": quantity}}))
        assert found[0] == "spec.run.resources.limits.cpu"
        assert found[1].startswith("must be a quantity: a whole number, or text such as")

    @pytest.mark.parametrize("quantity", [1, 2.0, "500m", "0.5", "8Gi", "1e3"])
    def test_quantities_of_kubernetes_are_accepted(self, quantity: Any) -> None:
        spec = validate_spec("ActivationCache", edited(CACHE_SPEC, {"run.resources.limits": {"cpu": quantity}}))
        assert spec.run.resources.limits["cpu"] == quantity

    def test_values_that_come_later_are_refused_naming_those_that_work(self) -> None:
        found = messages("ActivationCache", edited(CACHE_SPEC, {"model.loader": "nnsight"}))
        assert found == [
            ("spec.model.loader", "must be one of 'HuggingFace' or 'TransformerLens', not the text 'nnsight'")
        ]
        found = messages("SAETrainingJob", edited(JOB_SPEC, {"training.optimizer": "sgd"}))
        assert found == [
            ("spec.training.optimizer", "must be one of 'adam', 'adamw' or 'adafactor', not the text 'sgd'")
        ]

    @pytest.mark.parametrize(
        ("path", "field", "suggestion"),
        [
            ("training.learningrate", "spec.training.learningrate", "did you mean learningRate or learningRateEnd"),
            ("training.batch_size", "spec.training.batch_size", "did you mean batchSize?"),
            ("saes.0.architecture.kk", "spec.saes[0].architecture.kk", "did you mean k?"),
            ("outputs", "spec.outputs", "did you mean output?"),
            ("activations.stream", "spec.activations.stream", "the fields here are cacheRef, cache, uri, endpointUrl"),
            ("activations.cache.run.gpus", "spec.activations.cache.run.gpus", "the fields here are image, "),
        ],
    )
    def test_an_unknown_field_is_told_with_the_nearest_ones(self, path: str, field: str, suggestion: str) -> None:
        ((where, message),) = messages("SAETrainingJob", edited(JOB_SPEC, {path: 1}))
        assert where == field
        assert message.startswith(f"unknown field '{path.rsplit('.', 1)[-1]}'; ")
        assert suggestion in message

    def test_a_field_left_empty_counts_as_left_out(self) -> None:
        spec = validate_spec("ActivationCache", edited(CACHE_SPEC, {"seed": None, "model.revision": None, "run": None}))
        assert spec == validate_spec("ActivationCache", CACHE_SPEC)

    def test_a_spec_that_is_no_mapping_is_told(self) -> None:
        ((field, message),) = messages("ActivationCache", [1])
        assert field == "spec"
        assert message.startswith("must be a mapping, not a list")
