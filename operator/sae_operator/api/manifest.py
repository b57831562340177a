"""Manifests as people write them: YAML 1.2 in, validated resources or one line per problem out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode

from sae_operator.api.base import (
    API_VERSION,
    DNS_LABEL_PATTERN,
    MAX_NAME_LENGTH,
    NAME_LABEL_MESSAGE,
    NAME_LENGTH_MESSAGE,
    ApiModel,
)
from sae_operator.api.problems import Problem, describe_errors, nearest
from sae_operator.api.resources import KINDS, Kind, Resource

DEFAULT_NAMESPACE = "default"
_TOP_LEVEL = ("apiVersion", "kind", "metadata", "spec", "status")


class ManifestError(Exception):
    """A manifest that is not valid.

    Attributes:
        problems: everything that is wrong with it; each is one line as text.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = list(problems)


class _JsonConstructor(SafeConstructor):
    """YAML as JSON can hold it, and as kubectl reads it: a date stays text."""

    def construct_whole_number(self, node: ScalarNode) -> int:
        # 017 is seventeen in YAML 1.2 and fifteen to kubectl.
        if re.fullmatch(r"[-+]?0[0-9_]+", node.value):
            problem = f"the number {node.value} begins with 0; write it without, or in quotes if it is text"
            raise ConstructorError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node)


_JsonConstructor.add_constructor("tag:yaml.org,2002:int", _JsonConstructor.construct_whole_number)
_JsonConstructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def load_manifests(path: str | Path) -> list[Resource]:
    """The resources of a YAML file, in its order.

    Raises:
        ManifestError: anything is wrong with the file; it tells every problem.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ManifestError([Problem(str(path), "", "", "is not UTF-8 text")]) from None
    except OSError as error:
        raise ManifestError([Problem(str(path), "", "", f"cannot be read: {error.strerror}")]) from None
    return parse_manifests(text, source=str(path))


def parse_manifests(text: str, *, source: str) -> list[Resource]:
    """The resources of a YAML text; `source` begins each problem's line.

    Raises:
        ManifestError: anything is wrong with the text.
    """
    try:
        documents = [document for document in read_yaml(text) if document is not None]
        results = [validate_manifest(document, source=source) for document in documents]
    except YAMLError as error:
        raise ManifestError([Problem(source, "", *_yaml_problem(error))]) from None
    except RecursionError:
        message = "is nested too deeply, or an alias stands inside of what it names"
        raise ManifestError([Problem(source, "", "", message)]) from None
    resources: list[Resource] = []
    problems: list[Problem] = []
    for result in results:
        if isinstance(result, Resource):
            resources.append(result)
        else:
            problems += result
    keys = [(resource.kind.kind, resource.namespace, resource.name) for resource in resources]
    for kind, _, name in sorted({key for key in keys if keys.count(key) > 1}):
        problems.append(Problem(source, f"{kind}/{name}", "metadata.name", "is used twice; rename one"))
    if not documents:
        problems.append(Problem(source, "", "", f"holds no resource; begin with apiVersion: {API_VERSION}"))
    if problems:
        raise ManifestError(problems)
    return resources


def read_yaml(text: str) -> list[Any]:
    """The documents of a YAML text, by the rules of YAML 1.2: `3e-4` is a number, `yes` is text.

    Raises:
        YAMLError: the text is not YAML, or a mapping holds a key twice.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _JsonConstructor
    yaml.allow_duplicate_keys = False
    return list(yaml.load_all(text))


def validate_manifest(document: Any, *, source: str = "") -> Resource | list[Problem]:
    """A resource from a parsed manifest, or everything that is wrong with it."""
    if not isinstance(document, Mapping):
        return [Problem(source, "", "", f"must hold a resource; begin with apiVersion: {API_VERSION}")]
    kind_name, metadata = document.get("kind"), document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    label = f"{kind_name}/{name if isinstance(name, str) else '?'}" if isinstance(kind_name, str) else ""
    if document.get("apiVersion") != API_VERSION:
        return [Problem(source, label, "apiVersion", f"must be {API_VERSION}, not {document.get('apiVersion')!r}")]
    kind = KINDS.get(kind_name) if isinstance(kind_name, str) else None
    if kind is None:
        near = nearest(str(kind_name), list(KINDS), count=1) or list(KINDS)
        return [Problem(source, label, "kind", f"unknown kind {kind_name!r}; write {' or '.join(near)}")]

    problems = [
        Problem(source, label, str(key), f"unknown field '{key}'; the fields here are {', '.join(_TOP_LEVEL)}")
        for key in document
        if key not in _TOP_LEVEL
    ]
    problems += [Problem(source, label, "metadata.name", message) for message in name_problems(name)]
    namespace = metadata.get("namespace", DEFAULT_NAMESPACE) if isinstance(metadata, Mapping) else DEFAULT_NAMESPACE
    if not isinstance(namespace, str) or not re.fullmatch(DNS_LABEL_PATTERN, namespace):
        problems.append(Problem(source, label, "metadata.namespace", "must be the name of a namespace"))
    if "spec" not in document:
        return [*problems, Problem(source, label, "spec", "required field is missing")]
    spec = validate_spec(kind, document["spec"], source=source, resource=label)
    if isinstance(spec, list):
        return problems + spec
    return problems or Resource(kind, str(name), namespace, spec)


def name_problems(name: Any) -> list[str]:
    """What is wrong with a resource's name."""
    if name is None:
        return ["required field is missing"]
    if not isinstance(name, str):
        return ["must be text; put it in quotes"]
    problems = [] if len(name) <= MAX_NAME_LENGTH else [NAME_LENGTH_MESSAGE]
    return problems if re.fullmatch(DNS_LABEL_PATTERN, name) else [*problems, NAME_LABEL_MESSAGE]


def validate_spec(kind: Kind | str, spec: Any, *, source: str = "", resource: str = "") -> Any:
    """The spec model of a kind from a parsed `spec`, or the list of everything that is wrong with it.

    Args:
        kind: the kind, or its name; one of `KINDS`.
        spec: what stands below `spec:`.
        source: file, for the problems' lines.
        resource: `Kind/name`, for the problems' lines.
    """
    model: type[ApiModel] = (KINDS[kind] if isinstance(kind, str) else kind).spec
    try:
        # The cluster knows camelCase names alone.
        return model.model_validate(without_nulls(spec), by_alias=True, by_name=False)
    except ValidationError as error:
        return describe_errors(error, model, source=source, resource=resource)


def without_nulls(value: Any) -> Any:
    """The value without mappings' null entries, which the API server drops (`key:` with nothing after it)."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _yaml_problem(error: YAMLError) -> tuple[str, str]:
    """Where a text stops being YAML, and why, on one line."""
    if not isinstance(error, MarkedYAMLError):
        return "", " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    problem = " ".join((error.problem or error.context or "is not YAML").split())
    duplicate = re.match(r'found duplicate key "?(.*?)"? with value', problem)
    return place, f"the key '{duplicate[1]}' stands here twice; remove one" if duplicate else problem
