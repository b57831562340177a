"""What is wrong with a manifest, in plain words: the field's path, what is expected, and the fix."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from sae_operator.api.activation_cache import HOOK_KEY_PATTERN, HOOK_NAME_PATTERN, SPECIAL_TOKEN_PATTERN
from sae_operator.api.base import (
    NAME_PATTERN,
    OBJECT_NAME_PATTERN,
    REGION_PATTERN,
    TEXT_PATTERN,
    URI_PATTERN,
    URL_PATTERN,
)
from sae_operator.api.redaction import redact
from sae_operator.api.run_settings import ENV_NAME_PATTERN, LABEL_VALUE_PATTERN
from sae_operator.api.schema import MAP_KEY_MESSAGE, models_in

# More would push the message out of a line that people read.
_SHOWN_VALUE_LENGTH = 60
_SHOWN_FIELDS = 3

_PATTERN_WORDS = {
    NAME_PATTERN: "must consist of lower-case letters, digits and '-', and begin and end with a letter or digit",
    OBJECT_NAME_PATTERN: "must be the name of a Kubernetes object: lower-case letters, digits, '-' and '.'",
    TEXT_PATTERN: "must not contain control characters",
    URI_PATTERN: "must be s3://bucket/prefix or file://path",
    HOOK_NAME_PATTERN: "must be the dotted path of a module, such as transformer.h.7",
    HOOK_KEY_PATTERN: "must be a hook, such as transformer.h.7, or one of its heads, such as blocks.7.attn.hook_z:3",
    SPECIAL_TOKEN_PATTERN: "must be none, bos, eos, sep or a token id in quotes",
    ENV_NAME_PATTERN: "must be the name of an environment variable: letters, digits and '_'",
    LABEL_VALUE_PATTERN: "must be a label's value: letters, digits, '-', '_' and '.'",
    REGION_PATTERN: "must be the name of a region such as us-east-1: letters, digits and '-'",
    URL_PATTERN: "must be an address such as https://host:port, without credentials, which belong in secretRef",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        source: file that it is in; empty when there is none.
        resource: `Kind/name`; empty when it is not known yet.
        field: camelCase path, e.g. `spec.saes[0].architecture.k`; empty for the whole.
        message: what is wrong; fix.
    """

    source: str
    resource: str
    field: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.source, self.resource, self.field, self.message) if part)


def describe_errors(
    error: ValidationError, model: type[BaseModel], *, source: str = "", resource: str = "", root: str = "spec"
) -> list[Problem]:
    """Every problem that pydantic found, one each, in the order of the fields."""
    problems: dict[Problem, None] = {}
    for item in error.errors(include_url=False):
        location, context = item["loc"], item.get("ctx") or {}
        if item["type"] == "rule":
            for message, field in context["broken"]:
                path = path_of(location, root) + (f".{field}" if field else "")
                problems[Problem(source, resource, path, message)] = None
            continue
        if location and location[-1] == "[key]":
            problems[Problem(source, resource, path_of(location[:-2], root), MAP_KEY_MESSAGE)] = None
            continue
        if item["type"] == "extra_forbidden":
            message = _unknown_field(str(location[-1]), fields_at(model, location[:-1]))
        else:
            message = _message(item["type"], context, item["input"], item["msg"])
        problems[Problem(source, resource, path_of(location, root), message)] = None
    return list(problems)


def path_of(location: Sequence[str | int], root: str = "spec") -> str:
    """`("saes", 0, "architecture", "k")` as `spec.saes[0].architecture.k`; keys with dots or slashes in brackets."""
    path = root
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier():
            path += f".{part}" if path else part
        else:
            path += f"[{part}]"
    return path


def fields_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """camelCase names of the fields of the model at a location below `model`; empty where there is a map."""
    at: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int) or at is None:
            continue
        field = next((field for field in at.model_fields.values() if field.alias == part), None)
        at = next(models_in(field.annotation), None) if field is not None else None
    return [] if at is None else [field.alias or name for name, field in at.model_fields.items()]


def nearest(name: str, known: Sequence[str], count: int = _SHOWN_FIELDS) -> list[str]:
    """The known names that look most like `name`, however it is capitalised or separated; best first."""
    plain = {_plain(candidate): candidate for candidate in known}
    return [plain[match] for match in difflib.get_close_matches(_plain(name), list(plain), n=count, cutoff=0.6)]


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").casefold()


def _unknown_field(name: str, known: Sequence[str]) -> str:
    matches = nearest(name, known)
    if matches:
        return f"unknown field '{name}'; did you mean {' or '.join(matches)}?"
    return f"unknown field '{name}'; the fields here are {', '.join(known)}"


def _kind(value: Any) -> str:
    """A value as its writer would call it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"{str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {_short(value)}"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list"


def _short(value: str) -> str:
    # Half of a credential would not be known for one.
    value = redact(value)
    if len(value) > _SHOWN_VALUE_LENGTH:
        value = value[: _SHOWN_VALUE_LENGTH - 1] + "…"
    return repr(value)


def _expects(what: str, fix: str = "") -> Callable[[dict[str, Any], Any], str]:
    return lambda _context, value: f"must be {what}, not {_kind(value)}" + (f"; {fix}" if fix else "")


def _bound(words: str, key: str) -> Callable[[dict[str, Any], Any], str]:
    def message(context: dict[str, Any], value: Any) -> str:
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a finite number, not {value}"
        return f"must be {words} {_number(context[key])}, not {_number(value)}"

    return message


def _number(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _pattern(context: dict[str, Any], value: Any) -> str:
    words = _PATTERN_WORDS.get(context["pattern"], f"must match {context['pattern']}")
    return f"{words}, not {_short(str(value))}"


def _size(words: str, key: str, unit: str) -> Callable[[dict[str, Any], Any], str]:
    return lambda context, _value: f"must have {words} {context[key]} {unit}{'' if context[key] == 1 else 's'}"


_TRUTH_WORDS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def _truth(_context: dict[str, Any], value: Any) -> str:
    fix = _TRUTH_WORDS.get(str(value).casefold())
    return f"must be true or false, not {_kind(value)}" + (f"; write {fix}" if fix else "")


def _choice(context: dict[str, Any], value: Any) -> str:
    expected = str(context["expected"])
    return f"must be {'one of ' if ' or ' in expected else ''}{expected}, not {_kind(value)}"


_WORDS: dict[str, Callable[[dict[str, Any], Any], str]] = {
    # What is stored was JSON once.
    "json_invalid": lambda _context, _value: "is nested too deep to be read",
    "missing": lambda _context, _value: "required field is missing",
    "int_type": _expects("a whole number"),
    "int_from_float": _expects("a whole number"),
    "float_type": _expects("a number"),
    "finite_number": _expects("a finite number"),
    "string_type": _expects("text", "put it in quotes"),
    "bool_type": _truth,
    "list_type": _expects("a list", "begin each item with '- '"),
    "dict_type": _expects("a mapping", "write key: value"),
    "model_type": _expects("a mapping", "write field: value"),
    "model_attributes_type": _expects("a mapping", "write field: value"),
    "literal_error": _choice,
    "greater_than_equal": _bound("at least", "ge"),
    "less_than_equal": _bound("at most", "le"),
    "greater_than": _bound("greater than", "gt"),
    "less_than": _bound("less than", "lt"),
    "string_pattern_mismatch": _pattern,
    "string_too_short": _size("at least", "min_length", "character"),
    "string_too_long": _size("at most", "max_length", "character"),
    "too_short": _size("at least", "min_length", "item"),
    "too_long": _size("at most", "max_length", "item"),
}


def _message(kind: str, context: dict[str, Any], value: Any, fallback: str) -> str:
    words = _WORDS.get(kind)
    return fallback if words is None else words(context, value)
