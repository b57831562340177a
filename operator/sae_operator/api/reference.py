"""The reference documentation: `python -m sae_operator.api.reference --out docs/reference [--check]`.

Written from the same schemas as the CRDs, so that it says what the cluster does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sae_operator.api.base import API_VERSION
from sae_operator.api.crd import PRINTER_COLUMNS, custom_resource_definition
from sae_operator.api.generated import write_or_check
from sae_operator.api.resources import KINDS, Kind
from sae_operator.api.schema import MAP_KEY_MESSAGE, STATUS_TEXT_LENGTH, Schema

_HEADER = "<!-- Generated from the models of sae_operator.api by `make generate`; do not edit. -->\n"


@dataclass(frozen=True)
class FieldRow:
    """One field of a resource, as the tables show it."""

    path: str
    type: str
    default: str
    description: str


def field_rows(schema: Schema, path: str) -> Iterator[FieldRow]:
    """Every field below a schema, depth first; a list's items are `path[]`, a map's values `path{}`."""
    required = schema.get("required", ())
    for name, child in schema.get("properties", {}).items():
        child_path = f"{path}.{name}"
        yield FieldRow(child_path, _type(child), _default(child, name in required), child.get("description", ""))
        items = child.get("items", {})
        yield from field_rows(items, f"{child_path}[]")
        yield from field_rows(child, child_path)


def rule_messages(schema: Schema, path: str, *, transitions: bool) -> Iterator[tuple[str, str]]:
    """Path and message of every rule below a schema, depth first: of those about updates, or of the others."""
    for rule in schema.get("x-kubernetes-validations", ()):
        if ("oldSelf" in rule["rule"]) == transitions and rule["message"] != MAP_KEY_MESSAGE:
            yield path + rule.get("fieldPath", ""), rule["message"]
    for name, child in schema.get("properties", {}).items():
        yield from rule_messages(child, f"{path}.{name}", transitions=transitions)
    if "items" in schema:
        yield from rule_messages(schema["items"], f"{path}[]", transitions=transitions)


def _type(schema: Schema) -> str:
    """A field's type and bounds, in a few words."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return "quantity"
    if "x-kubernetes-preserve-unknown-fields" in schema:
        return "any value"
    kind = schema["type"]
    if kind == "array":
        return f"list of {_range(schema.get('minItems', 0), schema['maxItems'])}: {_type(schema['items'])}"
    if "additionalProperties" in schema:
        return f"map of at most {schema['maxProperties']}: {_type(schema['additionalProperties'])}"
    if kind in ("integer", "number"):
        bounds = []
        if "minimum" in schema:
            bounds.append(f"{'>' if schema.get('exclusiveMinimum') else '≥'} {schema['minimum']}")
        if "maximum" in schema and schema["maximum"] < 2**53:
            bounds.append(f"{'<' if schema.get('exclusiveMaximum') else '≤'} {schema['maximum']}")
        return " ".join([kind, ", ".join(bounds)]).strip()
    if kind == "string":
        if schema["maxLength"] == STATUS_TEXT_LENGTH:
            return "text"
        return f"text of {_range(schema.get('minLength', 0), schema['maxLength'])} characters"
    return kind


def _range(lowest: int, highest: int) -> str:
    return f"{lowest} to {highest}" if lowest else f"at most {highest}"


def _default(schema: Schema, required: bool) -> str:
    if required:
        return "*required*"
    default = schema.get("default")
    return "" if default is None or default == {} else f"`{json.dumps(default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(heading: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [heading, tuple("---" for _ in heading), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _rule_table(schema: Schema, path: str, *, transitions: bool) -> str:
    rules = rule_messages(schema, path, transitions=transitions)
    return _table(("field", "message"), ((f"`{field}`", message) for field, message in rules))


def reference_page(kind: Kind) -> str:
    """The markdown page of a kind."""
    definition: dict[str, Any] = custom_resource_definition(kind)
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    fields = ("field", "type", "default", "description")
    parts = [
        _HEADER,
        f"# {kind.kind}\n",
        f"{schema['description']}\n",
        f"`apiVersion: {API_VERSION}`, `kind: {kind.kind}`; `kubectl get {kind.short_names[0]}`.\n",
        "An empty default means that the field may be left out; its description says what happens then.\n",
    ]
    for part, title in (("spec", "Spec"), ("status", "Status")):
        rows = (
            (f"`{row.path}`", row.type, row.default, row.description)
            for row in field_rows(schema["properties"][part], part)
        )
        parts += [f"## {title}\n", _table(fields, rows)]
        if part == "spec":
            parts += ["## Rules\n", "The API server and `sae-job validate` refuse what breaks one, with its message.\n"]
            parts.append(_rule_table(schema["properties"][part], part, transitions=False))
            parts += ["## Updates\n", "What is not listed here may be changed at any time.\n"]
            parts.append(_rule_table(schema["properties"][part], part, transitions=True))
    columns = ((column["name"], f"`{column['jsonPath']}`") for column in PRINTER_COLUMNS[kind.kind])
    parts += ["## Columns of `kubectl get`\n", _table(("column", "field"), columns)]
    return "\n".join(parts)


def generated_files() -> dict[str, str]:
    """File name -> markdown text, one file per kind."""
    return {f"{kind.singular}.md": reference_page(kind) for kind in KINDS.values()}


if __name__ == "__main__":
    sys.exit(write_or_check(generated_files(), sys.argv[1:], program="python -m sae_operator.api.reference"))
