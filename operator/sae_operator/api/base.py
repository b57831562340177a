"""What every resource model shares: strictness, camelCase names, bounded types, rules in Python and in CEL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

GROUP = "sae-operator.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

# Children are named `<name>-<uid8>-<step>-<attempt>` and must stay below the 63 characters of a label value.
MAX_NAME_LENGTH = 40
NAME_LENGTH_MESSAGE = f"metadata.name must be at most {MAX_NAME_LENGTH} characters"
DNS_LABEL_PATTERN = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
NAME_LABEL_MESSAGE = (
    "metadata.name must consist of lower-case letters, digits and '-', and begin and end with a letter or digit"
)
# JSON numbers above this are not exact in every parser on the way (API server, JavaScript tools).
MAX_COUNT = 2**53


@dataclass(frozen=True)
class Rule:
    """A condition on one model, evaluated by the API server as CEL and locally as Python, with one message.

    Attributes:
        cel: CEL expression over `self`, with camelCase field names.
        holds: the same condition on the validated model.
        message: what the user reads, in both places.
        field: camelCase path below the model that the message is about; empty for the model itself.
    """

    cel: str
    holds: Callable[[Any], bool]
    message: str
    field: str = ""


@dataclass(frozen=True)
class TransitionRule:
    """A condition on an update, evaluated by the API server as CEL over `self` and `oldSelf`."""

    cel: str
    message: str
    field: str = ""


def immutable(field: str) -> TransitionRule:
    """The rule that a field keeps its value, and keeps being set or not."""
    cel = f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"
    return TransitionRule(cel, f"{field} is immutable; create a new resource instead", field)


def raised_only(field: str) -> TransitionRule:
    """The rule that a number, once set, never falls."""
    cel = f"!has(oldSelf.{field}) || (has(self.{field}) && self.{field} >= oldSelf.{field})"
    return TransitionRule(cel, f"{field} can only be raised", field)


class ApiModel(BaseModel):
    """A part of a resource: camelCase in YAML, snake_case in Python, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
    )

    RULES: ClassVar[tuple[Rule, ...]] = ()
    TRANSITION_RULES: ClassVar[tuple[TransitionRule, ...]] = ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        broken = [rule for rule in type(self).RULES if not rule.holds(self)]
        if broken:
            first = broken[0]
            context: dict[str, Any] = {"message": first.message, "field": first.field}
            # A validator can raise one error; the others travel with it, so that all are told at once.
            context["broken"] = tuple((rule.message, rule.field) for rule in broken)
            raise PydanticCustomError("rule", "{message}", context)
        return self

    def to_manifest(self) -> dict[str, Any]:
        """The model as it stands in a manifest: camelCase, without fields that are null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _integral(value: Any) -> Any:
    """`3e8` in YAML is a float with an integral value; the API server takes it for an integer, and so do we."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def one_of_set(*names: str) -> Callable[[Any], bool]:
    """True when exactly one of the attributes is not None."""
    return lambda model: sum(getattr(model, name) is not None for name in names) == 1


Count = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[int, BeforeValidator(_integral), Field(ge=0, le=MAX_COUNT)]
NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
OBJECT_NAME_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
TEXT_PATTERN = r"^[^\x00-\x1f\x7f]*$"
# A bucket's name, and where it ends.
S3_PATTERN = r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/|$)"
URI_PATTERN = r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\x00-\x1f\x7f]*)?|file://[^\x00-\x1f\x7f]+)$"
# Without a user in it: everybody who may read the resource would read the password.
URL_PATTERN = r"^https?://[^@/?#\x00-\x20\x7f]+(/[^\x00-\x20\x7f]*)?$"

Name = Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=NAME_PATTERN)]
ObjectName = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=OBJECT_NAME_PATTERN)]
ShortText = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=TEXT_PATTERN)]
Uri = Annotated[str, StringConstraints(max_length=1024, pattern=URI_PATTERN)]
EndpointUrl = Annotated[str, StringConstraints(max_length=512, pattern=URL_PATTERN)]
# What the AWS client takes.
REGION_PATTERN = r"^[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"
Region = Annotated[str, StringConstraints(min_length=1, max_length=63, pattern=REGION_PATTERN)]
