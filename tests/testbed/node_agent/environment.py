"""Environment variables and arguments of a container, resolved as the kubelet resolves them."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any

# Returns the data of a ConfigMap or Secret ("configmaps" or "secrets", name, optional), or None when it is optional
# and not there; raises `ConfigurationError` otherwise.
ReadData = Callable[[str, str, bool], dict[str, bytes] | None]

_REFERENCE = re.compile(r"\$\$|\$\(([\w.-]+)\)")
_LABEL = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


class ConfigurationError(Exception):
    """What a container needs is not there; the text is what the kubelet shows."""


def data_of(obj: dict[str, Any], kind: str) -> dict[str, bytes]:
    """Content of a ConfigMap or Secret by key."""
    data = obj.get("data") or {}
    if kind == "secrets":
        return {key: base64.b64decode(value) for key, value in data.items()}
    binary = obj.get("binaryData") or {}
    return {
        **{key: value.encode() for key, value in data.items()},
        **{key: base64.b64decode(value) for key, value in binary.items()},
    }


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replace `$(NAME)` by its variable; an unknown name stays as it is, and `$$` is one dollar."""

    def replaced(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return _REFERENCE.sub(replaced, text)


def field_value(pod: dict[str, Any], path: str, *, pod_ip: str, host_ip: str) -> str:
    """Value of a `fieldRef`; raises `ConfigurationError` for a path that the downward API does not know."""
    metadata = pod["metadata"]
    if match := _LABEL.fullmatch(path):
        return metadata.get(match[1], {}).get(match[2], "")
    values = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "metadata.labels": _lines(metadata.get("labels", {})),
        "metadata.annotations": _lines(metadata.get("annotations", {})),
        "spec.nodeName": pod["spec"]["nodeName"],
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", "default"),
        "status.podIP": pod_ip,
        "status.podIPs": pod_ip,
        "status.hostIP": host_ip,
    }
    if path not in values:
        raise ConfigurationError(f"unsupported fieldPath: {path}")
    return values[path]


def _lines(entries: Mapping[str, str]) -> str:
    return "\n".join(f'{key}="{value}"' for key, value in sorted(entries.items()))


def container_environment(
    container: dict[str, Any], *, base: Mapping[str, str], read_data: ReadData, field: Callable[[str], str]
) -> dict[str, str]:
    """All variables of a container: those of its image, then `envFrom`, then `env` in order."""
    variables = dict(base)
    for source in container.get("envFrom", []):
        kind, reference = _reference(source, "configMapRef", "secretRef")
        data = read_data(kind, reference["name"], reference.get("optional", False)) or {}
        variables.update({source.get("prefix", "") + key: value.decode() for key, value in data.items()})
    for entry in container.get("env", []):
        value = _entry_value(entry, container, variables, read_data, field)
        if value is not None:
            variables[entry["name"]] = value
    return variables


def _reference(source: dict[str, Any], config_map: str, secret: str) -> tuple[str, dict[str, Any]]:
    return ("configmaps", source[config_map]) if config_map in source else ("secrets", source[secret])


def _entry_value(
    entry: dict[str, Any],
    container: dict[str, Any],
    variables: Mapping[str, str],
    read_data: ReadData,
    field: Callable[[str], str],
) -> str | None:
    source = entry.get("valueFrom")
    if source is None:
        return expand(entry.get("value", ""), variables)
    if "fieldRef" in source:
        return field(source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        part, resource = source["resourceFieldRef"]["resource"].split(".", 1)
        return str(container.get("resources", {}).get(part, {}).get(resource, "0"))
    kind, reference = _reference(source, "configMapKeyRef", "secretKeyRef")
    optional = reference.get("optional", False)
    data = read_data(kind, reference["name"], optional) or {}
    if reference["key"] in data:
        return data[reference["key"]].decode()
    if optional:
        return None
    raise ConfigurationError(f"couldn't find key {reference['key']} in {kind[:-1]} {reference['name']}")
