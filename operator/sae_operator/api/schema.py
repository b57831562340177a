"""Structural OpenAPI v3 schemas, as CustomResourceDefinitions hold them, from the pydantic models.

Structural means: every node has one type, nothing is a reference or a union. An optional field is one that is not
required; a field whose default is a model defaults to `{}`, which the API server then fills from the nested defaults.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from sae_operator.api.base import ApiModel

# Texts of a status come from the operator alone; they are bounded like a Kubernetes condition's message.
STATUS_TEXT_LENGTH = 32_768
STATUS_LIST_LENGTH = 64
MAP_KEY_LENGTH = 253
MAP_KEY_MESSAGE = f"keys must be at most {MAP_KEY_LENGTH} characters"
# What a JSON schema and an OpenAPI v3 schema name alike.
_SHARED = ("type", "enum", "pattern", "minLength", "maxLength", "minItems", "maxItems")

Schema = dict[str, Any]


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation holds, at any depth of lists, maps and unions."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)


def structural_schema(model: type[BaseModel]) -> Schema:
    """The structural schema of a model: an object with its fields, defaults, bounds, descriptions and rules."""
    document = model.model_json_schema(by_alias=True)
    definitions = document.get("$defs", {})
    required, properties = [], {}
    for name, field in model.model_fields.items():
        alias = field.alias or name
        nested = next(models_in(field.annotation), None)
        schema = _convert(document["properties"][alias], definitions, nested)
        if field.description:
            schema["description"] = _one_line(field.description)
        default = field.get_default(call_default_factory=True)
        if default is PydanticUndefined:
            required.append(alias)
        elif default is not None:
            schema["default"] = {} if isinstance(default, BaseModel) else default
        properties[alias] = _ordered(schema)
    result: Schema = {"type": "object", "description": _one_line(model.__doc__ or ""), "properties": properties}
    if required:
        result["required"] = required
    if list(properties) == ["name"] or set(properties) == {"name", "key"}:
        # A reference to another object is replaced as a whole.
        result["x-kubernetes-map-type"] = "atomic"
    validations = _validations(model) if issubclass(model, ApiModel) else []
    if validations:
        result["x-kubernetes-validations"] = validations
    if not issubclass(model, ApiModel):
        _bound_status(result)
    return _ordered(result)


def _convert(node: Schema, definitions: dict[str, Schema], nested: type[BaseModel] | None) -> Schema:
    """One JSON schema node as an OpenAPI v3 node; `nested` is the model that it refers to, if any."""
    if "anyOf" in node:
        (choice,) = (option for option in node["anyOf"] if option.get("type") != "null")
        return _convert(choice, definitions, nested)
    if "$ref" in node:
        if nested is None:
            return _convert(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions, None)
        return structural_schema(nested)
    schema: Schema = {key: node[key] for key in _SHARED if key in node}
    if "const" in node:
        schema = {"type": "string", "enum": [node["const"]]}
    schema |= _bounds(node)
    match schema.get("type"):
        case "integer":
            schema["format"] = "int64"
        case "number":
            schema["format"] = "double"
        case "array":
            schema["items"] = _convert(node["items"], definitions, nested)
            schema["x-kubernetes-list-type"] = "atomic"
        case "object":
            schema["additionalProperties"] = _convert(node["additionalProperties"], definitions, nested)
            schema["maxProperties"] = node["maxProperties"]
            # A structural schema has no bound for keys.
            rule = f"self.all(key, key.size() <= {MAP_KEY_LENGTH})"
            schema["x-kubernetes-validations"] = [{"rule": rule, "message": MAP_KEY_MESSAGE}]
    for extension in ("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields"):
        if node.get(extension):
            schema[extension] = True
    return schema


def _bounds(node: Schema) -> Schema:
    """Bounds of a number. After a validator of its own, pydantic names them as Python does: `ge` for `minimum`."""
    bounds: Schema = {}
    lowest = [node[key] for key in ("minimum", "ge") if key in node]
    highest = [node[key] for key in ("maximum", "le") if key in node]
    if lowest:
        bounds["minimum"] = max(lowest)
    if highest:
        bounds["maximum"] = min(highest)
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if exclusive in node:
            bounds |= {bound: node[exclusive], exclusive: True}
    return {key: int(value) if value == int(value) and value is not True else value for key, value in bounds.items()}


def _validations(model: type[ApiModel]) -> list[Schema]:
    """The model's rules as CEL; the message's path is told where it names a field."""
    rules = [(rule.cel, rule.message, rule.field) for rule in model.RULES]
    rules += [(rule.cel, rule.message, rule.field) for rule in model.TRANSITION_RULES]
    return [
        {"rule": cel, "message": message, **({"fieldPath": f".{field}"} if field else {})}
        for cel, message, field in rules
    ]


def _bound_status(node: Schema) -> None:
    """Bound every text and list of a status, whose models are lenient so that any version's status can be read."""
    if node.get("type") == "string" and "enum" not in node:
        node.setdefault("maxLength", STATUS_TEXT_LENGTH)
    if node.get("type") == "array":
        node.setdefault("maxItems", STATUS_LIST_LENGTH)
        _bound_status(node["items"])
    for child in node.get("properties", {}).values():
        _bound_status(child)


def _one_line(text: str) -> str:
    return " ".join(text.split())


_ORDER = ("description", "type", "format", "enum", "default")


def _ordered(schema: Schema) -> Schema:
    """Keys in the order in which people read them; empty descriptions left out."""
    first = {key: schema[key] for key in _ORDER if key in schema and schema[key] != ""}
    rest = {key: value for key, value in schema.items() if key not in _ORDER}
    return first | rest
